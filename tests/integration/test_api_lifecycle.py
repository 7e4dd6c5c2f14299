"""The real uvicorn server in a process of its own: signals, drain, exit codes."""

import json
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import httpx
import pytest

ROOT = Path(__file__).parents[2]
WAIT_S = 30.0


class Process:
    """A serving process; a thread reads its log, so that events may come in any order."""

    def __init__(self, popen: "subprocess.Popen[str]") -> None:
        self.popen = popen
        self.port = 0
        self._log: list[dict[str, Any]] = []
        self._ended = False
        self._grown = threading.Condition()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def read_log(self, event: str) -> dict[str, Any]:
        """Return the log line of an event, as soon as it is there."""
        with self._grown:
            assert self._grown.wait_for(lambda: self._ended or self._find(event), WAIT_S), event
            found = self._find(event)
        assert found, f"{event} is not in {self._log}"
        return found[0]

    def _find(self, event: str) -> list[dict[str, Any]]:
        return [entry for entry in self._log if event in entry["event"]]

    def _read(self) -> None:
        for line in self.pipe("stderr"):
            with self._grown:
                self._log.append(json.loads(line))
                self._grown.notify_all()
        with self._grown:
            self._ended = True
            self._grown.notify_all()

    def pipe(self, name: str) -> IO[str]:
        pipe: IO[str] | None = getattr(self.popen, name)
        assert pipe is not None
        return pipe

    def close(self) -> None:
        self.popen.kill()
        self._reader.join(WAIT_S)


@contextmanager
def serving(*arguments: str) -> Iterator[Process]:
    command = [sys.executable, "-m", "tests.support.serve_fake", *arguments]
    with subprocess.Popen(
        command,
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as popen:
        process = Process(popen)
        try:
            yield process
        finally:
            process.close()


@pytest.mark.parametrize("arguments", [(), ("--set", "selftest_interval_s=0.05")])
def test_sigterm_drains_answers_what_is_inside_and_exits_0(arguments: tuple[str, ...]) -> None:
    with serving(*arguments) as process, ThreadPoolExecutor(1) as pool, httpx.Client() as client:
        process.port = process.read_log("listening")["port"]
        process.read_log("ready")
        assert client.get(f"{process.url}/health/ready").status_code == 200

        body = {"input": "please wait"}
        inside = pool.submit(httpx.post, f"{process.url}/v1/classify", json=body, timeout=WAIT_S)
        assert process.pipe("stdout").readline() == "entered\n"
        process.popen.send_signal(signal.SIGTERM)
        process.read_log("draining")
        # in the drain window: not ready, yet still serving
        assert client.get(f"{process.url}/health/ready").status_code == 503
        assert client.get(f"{process.url}/health/live").status_code == 200
        process.read_log("Shutting down")

        process.pipe("stdin").write("go on\n")
        process.pipe("stdin").flush()
        answer = inside.result(WAIT_S)
        assert answer.status_code == 200
        assert answer.json()["data"][0]["label"]
        assert process.popen.wait(WAIT_S) == 0
        with pytest.raises(httpx.ConnectError):
            client.get(f"{process.url}/health/live")


def test_sigterm_while_loading_exits_0_at_once() -> None:
    with serving("--slow-load") as process:
        process.port = process.read_log("listening")["port"]
        assert httpx.get(f"{process.url}/health/live").status_code == 200
        assert httpx.get(f"{process.url}/health/ready").status_code == 503
        process.popen.send_signal(signal.SIGTERM)
        assert process.popen.wait(WAIT_S) == 0


def test_sigint_does_not_wait_and_exits_130() -> None:
    with serving() as process:
        process.read_log("ready")
        process.popen.send_signal(signal.SIGINT)
        assert process.popen.wait(WAIT_S) == 130


def test_a_failed_load_exits_1_with_its_reason() -> None:
    with serving("--bad-load") as process:
        assert process.read_log("load failed")["reason"] == "a byte has changed"
        assert process.popen.wait(WAIT_S) == 1


def test_a_port_that_is_taken_exits_1() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        with serving("--port", port) as process:
            assert process.popen.wait(WAIT_S) == 1
            told = process.read_log("cannot listen")
            assert told["level"] == "error"
            assert "address already in use" in told["reason"]


@pytest.mark.parametrize("word", ["hang", "fatal"])
def test_sigterm_while_the_engine_is_lost_exits_0(word: str) -> None:
    stall = ("--set", "stall_s=1")
    with serving("--faults", *stall) as process, ThreadPoolExecutor(1) as pool:
        process.port = process.read_log("listening")["port"]
        process.read_log("ready")
        body = {"input": word}
        inside = pool.submit(httpx.post, f"{process.url}/v1/classify", json=body, timeout=WAIT_S)
        if word == "fatal":
            process.read_log("engine lost")
        process.popen.send_signal(signal.SIGTERM)
        process.read_log("draining")
        assert httpx.get(f"{process.url}/health/ready").status_code == 503
        assert httpx.get(f"{process.url}/health/live").status_code == 200
        assert inside.result(WAIT_S).status_code == 503
        assert process.popen.wait(WAIT_S) == 0
