"""Serve the fake engine in a process of its own: ``python -m tests.support.serve_fake``.

Logs to standard error as the real server does. Prints ``entered`` when a batch with the word
``wait`` begins to run, and lets it go on when a line comes on standard input.

``--faults`` makes words in a text dangerous: see ``FAULTS``. ``--tokens-per-second N`` paces the
engine as a model would that forwards so many padded tokens times samples. ``--adapter-root DIR``
serves fake adapters at run time, one for each directory in it (see ``stored_card``). ``--set
name=value`` sets any setting of the server.
"""

import argparse
import hashlib
import json
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from server.app import create_app
from server.logs import configure_logging
from server.ports import (
    AdapterCard,
    BatchRow,
    BatchScores,
    EngineFatalError,
    EngineMemoryError,
    Wanted,
)
from server.run import leave, run_server
from server.settings import Settings
from tests.support.fake_engine import TOPICS, TOPICS_CERTIFIED, FakeEngine

__all__ = ["FAULTS", "ToldEngine", "main", "stored_card"]


def _raise(error: BaseException) -> None:
    raise error


def _hang() -> None:
    threading.Event().wait(3600)


FAULTS: Mapping[str, Callable[[], None]] = {
    "boom": lambda: _raise(ValueError("a fault that was asked for")),
    "nan": lambda: _raise(FloatingPointError("a probability is no number")),
    "oom": lambda: _raise(EngineMemoryError("out of memory, as was asked for")),
    "fatal": lambda: _raise(EngineFatalError("device lost, as was asked for")),
    "hang": _hang,
}
"""What a word in a text does to its batch under ``--faults``; ``misshape`` loses a row."""


class ToldEngine(FakeEngine):
    """Runs a batch with the word ``wait`` only when it is told to; paced and faulty if asked.

    Attributes:
        tokens_per_second: Padded tokens times samples it pretends to forward; 0 is at once.
        faulty: Whether the words of ``FAULTS`` do what they say.
    """

    def __init__(self, *cards: AdapterCard, tokens_per_second: float = 0.0) -> None:
        super().__init__(*cards)
        self.tokens_per_second = tokens_per_second
        self.faulty = False

    def run_batch(self, rows: Sequence[BatchRow], wanted: Wanted) -> BatchScores:
        words = " ".join(str(row.row.payload) for row in rows)
        if "wait" in words:
            say("entered")
            sys.stdin.readline()
        if self.faulty:
            for word, fault in FAULTS.items():
                if word in words:
                    fault()
        began_s = time.perf_counter()
        self._forward(rows, wanted)
        took_s = time.perf_counter() - began_s
        found = super().run_batch(rows, wanted)
        found = replace(found, forward_s=found.forward_s + took_s)
        if self.faulty and "misshape" in words:
            return replace(found, rows=found.rows[:-1])
        return found

    def _forward(self, rows: Sequence[BatchRow], wanted: Wanted) -> None:
        """Take the time of the forward passes, chunk by chunk, for rows that are waited for."""
        if not self.tokens_per_second:
            return
        for start in range(0, len(rows), self.chunk_rows):
            chunk = rows[start : start + self.chunk_rows]
            if any(wanted(start + place) for place in range(len(chunk))):
                longest = max(row.row.num_tokens for row in chunk)
                cost = longest * len(chunk) * chunk[0].key.sampling.passes
                time.sleep(cost / self.tokens_per_second)


def stored_card(directory: Path) -> AdapterCard:
    """Return what lies in a fake adapter directory.

    ``fake.json`` in it may say ``name`` and ``labels``; the name is else the directory's, up to an
    ``@``. The revision follows from the directory's name.
    """
    file = directory / "fake.json"
    said = json.loads(file.read_text("utf-8")) if file.is_file() else {}
    return replace(
        TOPICS,
        name=said.get("name", directory.name.partition("@")[0]),
        labels=tuple(said.get("labels", TOPICS.labels)),
        revision=hashlib.sha256(directory.name.encode()).hexdigest()[:12],
    )


def say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--slow-load", action="store_true", help="the model never loads")
    parser.add_argument("--bad-load", action="store_true", help="the model cannot be loaded")
    parser.add_argument("--certified", action="store_true", help="as after calibration")
    parser.add_argument("--faults", action="store_true", help="dangerous words are dangerous")
    parser.add_argument("--tokens-per-second", type=float, default=0.0)
    parser.add_argument("--adapter-root", type=Path)
    parser.add_argument("--keys-file", type=Path)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--locked-policy")
    parser.add_argument("--state-dir", type=Path)
    parser.add_argument("--feedback-url")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE")
    return parser


def _settings(options: argparse.Namespace) -> Settings:
    values: dict[str, object] = {
        "port": options.port,
        "drain_seconds": 1.5,
        "locked_policy": options.locked_policy,
        "state_dir": options.state_dir,
        "feedback_url": options.feedback_url or (None if options.state_dir else "off"),
        "adapter_root": options.adapter_root,
        "api_keys_file": options.keys_file,
    }
    for one in options.set:
        name, _, value = one.partition("=")
        values[name] = value
    return Settings.model_validate(values)


def make_engine(options: argparse.Namespace) -> ToldEngine:
    """Return a new engine; a restart of the engine makes another one."""
    card = TOPICS_CERTIFIED if options.certified else TOPICS
    engine = ToldEngine(card, tokens_per_second=options.tokens_per_second)
    engine.faulty = options.faults
    if options.slow_load:
        engine.load_gate.clear()
    if options.bad_load:
        engine.load_fault = ValueError("a byte has changed")
    if options.adapter_root is not None:
        folders = [entry for entry in options.adapter_root.iterdir() if entry.is_dir()]
        engine.library = {folder.name: stored_card(folder) for folder in folders}
    return engine


def main(arguments: list[str]) -> int:
    options = _parser().parse_args(arguments)
    configure_logging("info")
    settings = _settings(options)
    app = create_app(lambda: make_engine(options), settings)
    exit_code = run_server(app, settings)
    if app.state.service.lifecycle.abandoned:
        leave(exit_code)
    return exit_code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
