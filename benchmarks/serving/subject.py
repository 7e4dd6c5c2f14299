"""Which server is put under load: the real one with an adapter, or the paced fake engine."""

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.serving.load import made_texts, read_texts

__all__ = ["Subject", "add_options", "subject_of"]


@dataclass(frozen=True)
class Subject:
    """A server to start and what to ask it.

    Attributes:
        command: Starts it; ``--port`` is added.
        environment: Its settings.
        body: From a request's number to its body, one row each, all different.
        says: What is said about it in the result.
    """

    command: list[str]
    environment: dict[str, str]
    body: Callable[[int], dict[str, Any]]
    says: dict[str, Any] = field(default_factory=dict)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that say which server."""
    parser.add_argument("--adapter", type=Path, default=Path("adapters/clinc150"))
    parser.add_argument("--base", help="base model; the one the adapter names if left out")
    parser.add_argument("--texts", type=Path, help="JSONL with a text field; made up if left out")
    parser.add_argument("--num-samples", type=int, help="M; the adapter's own if left out")
    parser.add_argument("--fake", type=float, metavar="TOKENS_PER_SECOND", help="a paced fake")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="a setting of the server, such as max_requests=16",
    )
    parser.add_argument("--output", type=Path, help="file for the result as JSON")


def subject_of(options: argparse.Namespace, **settings: object) -> Subject:
    """Return the server that the options ask for; ``settings`` are those they do not name."""
    said = dict(one.split("=", 1) for one in options.set)
    values = {name: str(value) for name, value in settings.items()} | said
    texts = made_texts(5000) if options.texts is None else read_texts(options.texts)
    fields = {} if options.num_samples is None else {"num_samples": options.num_samples}

    def body(number: int) -> dict[str, Any]:
        return {"input": texts[number % len(texts)], **fields}

    says = {"settings": values, **fields}
    if options.fake is not None:
        command = [sys.executable, "-m", "tests.support.serve_fake"]
        command += ["--tokens-per-second", str(options.fake)]
        command += [f"--set={name}={value}" for name, value in values.items()]
        return Subject(command, {}, body, {"engine": f"fake, {options.fake:g} tokens/s", **says})
    program = "from server.cli import main; main()"
    command = [sys.executable, "-c", program, "serve", str(options.adapter)]
    command += ["--base", options.base] if options.base else []
    environment = {f"DALORRA_{name.upper()}": value for name, value in values.items()}
    environment.setdefault("DALORRA_FEEDBACK_URL", "off")
    return Subject(
        command, environment, body, {"engine": f"adapter {options.adapter.name}", **says}
    )
