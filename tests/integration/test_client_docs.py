"""Every example of README.md and docs/client.md, and examples/escalate.py, on a real server."""

import importlib.util
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import dalorra.client
from dalorra.client import Client, Row, errors
from tests.integration.test_api_lifecycle import ROOT, Process, serving

PAGE = (ROOT / "docs" / "client.md").read_text(encoding="utf-8")
PROGRAM = ROOT / "examples" / "escalate.py"
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
EXPECTED = [
    r"(accept|review|abstain) \w+ [\d.]+ \(.*\)\n(accept|review|abstain) \w+ [\d.]+ \(.*\)\n",
    r"a sure thing -> \w+ by model\nmy card was charged twice -> fraud by on_\w+\n",
    r"\w+\nNone\n",
    r"invalid_request #/num_samples\n",
]


@pytest.fixture(scope="module")
def server() -> Iterator[Process]:
    with serving() as process:
        process.port = process.read_log("listening")["port"]
        process.read_log("ready")
        yield process


def test_the_first_page_does_what_it_says(server: Process) -> None:
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert "http://localhost:8000" in block
    unsure = block.replace("what is my balance", "my card was charged twice")
    printed = ""
    # One of the two hooks is called for an unsure answer; which one is the policy's business.
    for text in (block, unsure, unsure.replace("on_abstain", "on_review")):
        done = subprocess.run(
            [sys.executable, "-c", text.replace("http://localhost:8000", server.url)],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
        assert done.returncode == 0, done.stderr
        assert re.search(r"^\w+ (accept|review|abstain)$", done.stdout, re.MULTILINE), done.stdout
        printed += done.stdout
    assert printed.count("ask a person: my card was charged twice") == 1


@pytest.mark.parametrize(("block", "printed"), list(zip(BLOCKS, EXPECTED, strict=True)))
def test_the_page_does_what_it_says(block: str, printed: str, server: Process) -> None:
    assert "http://127.0.0.1:8000" in block
    done = subprocess.run(
        [sys.executable, "-c", block.replace("http://127.0.0.1:8000", server.url)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(printed, done.stdout), done.stdout


def test_the_page_names_every_error_and_option() -> None:
    tree = re.findall(r"[├└]── (\w+)", PAGE)
    doc = errors.__doc__ or ""
    assert tree == re.findall(r"[├└]── (\w+)", doc)
    assert {*tree, "DalorraError"} == {name for name in errors.__all__ if name[0].isupper()}
    for option in dalorra.client.Options.__annotations__:
        assert f"`{option}`" in PAGE


def test_the_client_needs_no_model_and_no_server() -> None:
    program = (
        "import sys, dalorra.client\n"
        "heavy = {'torch', 'numpy', 'server', 'dalorra_core', 'fastapi'} & sys.modules.keys()\n"
        "sys.exit(', '.join(sorted(heavy)) or None)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr


@pytest.fixture
def example() -> Any:
    spec = importlib.util.spec_from_file_location("escalate", PROGRAM)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_example_asks_a_person_and_tells_the_server(
    example: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def person(row: Row) -> str | None:
        assert row.top is not None
        return row.top[1].label if row.input == "unclear" else None

    with serving("--state-dir", str(tmp_path)) as process:
        port = process.read_log("listening")["port"]
        process.read_log("ready")
        with Client(f"http://127.0.0.1:{port}") as client:
            texts = ["a sure thing", "unclear", "lost words"]
            sure, unclear, lost = example.label(client, texts, person)
            assert (sure.final_label, sure.settled_by) == (sure.label, "model")
            assert (unclear.decision, unclear.settled_by) == ("review", "on_review")
            assert unclear.final_label != unclear.label
            assert (lost.final_label, lost.settled_by) == (None, None)
            again = client.feedback(unclear.prediction_id, unclear.final_label)
            assert (again.outcome, again.stored) == ("wrong", False)  # it knew already
    (note,) = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert (note["message"], note["why"]) == ("lost words", ["high_entropy"])


def test_the_example_works_where_feedback_is_off(server: Process, example: Any) -> None:
    with Client(server.url) as client:
        (row,) = example.label(client, ["unclear"], lambda row: row.label)
    assert row.settled_by == "on_review"


def test_the_example_as_a_program(server: Process) -> None:
    def run(url: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [sys.executable, str(PROGRAM), url],
            cwd=ROOT,
            input="a sure thing\n\nlost words\n",
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )

    done = run(server.url)
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert re.fullmatch(r"\w+ +model +a sure thing", first)
    assert re.fullmatch(r"\? +nobody +lost words", second)
    assert json.loads(done.stderr)["message"] == "lost words"
    refused = run(f"{server.url}/nowhere")
    assert refused.returncode == 1
    assert refused.stderr.startswith("no answer: not_found")
