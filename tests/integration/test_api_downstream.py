"""The example app against a real socket: routes, asks a person, refuses, and waits when told to."""

import http.server
import importlib.util
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.integration.test_api_lifecycle import ROOT, Process, serving
from tests.support.fake_engine import TOPICS, score

PATH = ROOT / "examples" / "downstream_app.py"
ACCEPT, REVIEW, ABSTAIN = "a sure thing", "unclear", "lost words"


@pytest.fixture(scope="module")
def server() -> Iterator[Process]:
    with serving() as process:
        process.port = process.read_log("listening")["port"]
        process.read_log("ready")
        yield process


@pytest.fixture
def example() -> Any:
    spec = importlib.util.spec_from_file_location("downstream_app", PATH)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["downstream_app"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_routes_asks_and_refuses(server: Process, example: Any) -> None:
    asked: list[str] = []

    def person(message: str, top: list[dict[str, Any]]) -> str:
        asked.append(message)
        return str(top[1]["label"])

    accepted, reviewed, refused = example.run(server.url, [ACCEPT, REVIEW, ABSTAIN], person)
    expected = score(ACCEPT, TOPICS.labels, TOPICS.defaults, TOPICS).label
    assert (accepted.queue, accepted.decided_by) == (expected, "model")
    assert asked == [REVIEW]
    assert reviewed.queue in TOPICS.labels
    assert reviewed.decided_by == "person"
    assert (refused.queue, refused.decided_by) == (None, "nobody")


def test_waits_as_long_as_a_busy_server_says(example: Any, httpserver: Any) -> None:
    waited: list[float] = []
    httpserver.answers = [(429, {"Retry-After": "7"}), (503, {"Retry-After": "2"}), (200, {})]
    assert example.classify(httpserver.url, ["x"], waited.append) == []
    assert waited == [7.0, 2.0]


def test_gives_up_with_the_servers_own_words(example: Any, httpserver: Any) -> None:
    httpserver.answers = [(422, {})]
    with pytest.raises(RuntimeError, match="a title: a detail"):
        example.classify(httpserver.url, ["x"], lambda _seconds: None)


def test_as_a_program(server: Process) -> None:
    assert httpx.get(f"{server.url}/health/ready").status_code == 200
    done = subprocess.run(
        [sys.executable, str(PATH), server.url],
        input=f"{ACCEPT}\n\n{ABSTAIN}\n",
        capture_output=True,
        text=True,
        check=True,
        timeout=30,
    )
    first, second = done.stdout.splitlines()
    assert ACCEPT in first
    assert "decided by model" in first
    assert second.startswith("refused   lost words")


@pytest.fixture
def httpserver() -> Iterator[Any]:
    """A server that gives prepared answers."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["content-length"]))
            status, headers = self.server.answers.pop(0)  # type: ignore[attr-defined]
            body = json.dumps({"title": "a title", "detail": "a detail", "data": []}).encode()
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base's name
            del format, args

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        server.url = f"http://127.0.0.1:{server.server_port}"  # type: ignore[attr-defined]
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()
