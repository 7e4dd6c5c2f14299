"""The server's reading of signals, in this process."""

import signal
import threading
import time
from typing import Any

import pytest
import uvicorn
from typer.testing import CliRunner

import server.cli
from server.app import create_app
from server.run import DrainingServer, run_server
from server.settings import Settings
from tests.support.fake_engine import FakeEngine

WAIT_S = 20.0


class Sender(threading.Thread):
    """Waits until a server is ready, then sends this process a signal."""

    def __init__(self, number: int, is_ready: Any) -> None:
        super().__init__(daemon=True)
        self._number = number
        self._is_ready = is_ready

    def run(self) -> None:
        end_s = time.monotonic() + WAIT_S
        while not self._is_ready() and time.monotonic() < end_s:
            time.sleep(0.005)
        signal.pthread_kill(threading.main_thread().ident or 0, self._number)


@pytest.mark.parametrize(("number", "expected"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_exit_code_of_a_signal(number: int, expected: int) -> None:
    app = create_app(FakeEngine, Settings(port=0, drain_seconds=0.05))
    lifecycle = app.state.service.lifecycle
    sender = Sender(number, lambda: lifecycle.phase == "serving")
    sender.start()
    assert run_server(app, Settings(port=0, drain_seconds=0.05)) == expected
    sender.join(WAIT_S)
    assert lifecycle.phase == "stopped"


def make_server(phase: str) -> DrainingServer:
    app = create_app(FakeEngine, Settings())
    lifecycle = app.state.service.lifecycle
    lifecycle.phase = phase
    return DrainingServer(uvicorn.Config(app), lifecycle, drain_seconds=60.0)


def test_a_second_sigterm_skips_the_drain() -> None:
    draining = make_server("serving")
    draining.handle_exit(signal.SIGTERM, None)
    assert not draining.should_exit
    draining.handle_exit(signal.SIGTERM, None)
    assert draining.should_exit
    assert (draining.force_exit, draining.exit_code) == (False, 0)


def test_a_second_sigint_waits_for_nothing() -> None:
    draining = make_server("serving")
    draining.handle_exit(signal.SIGINT, None)
    assert (draining.should_exit, draining.force_exit) == (True, False)
    draining.handle_exit(signal.SIGINT, None)
    assert (draining.force_exit, draining.exit_code) == (True, 130)


def test_the_command_serves_until_it_is_told_to_stop(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "manifest.json").write_text("{}")
    monkeypatch.setenv("DALORRA_MAX_ROW", "3")
    engines: list[FakeEngine] = []

    def make_engine(_settings: Settings) -> FakeEngine:
        engines.append(FakeEngine())
        engines[0].load_fault = ValueError("a byte has changed")
        return engines[0]

    monkeypatch.setattr(server.cli, "make_engine", make_engine)
    monkeypatch.setattr(server.cli, "configure_logging", lambda _level: None)
    result = CliRunner().invoke(server.cli.app, ["serve", str(tmp_path), "--port", "0"])
    assert result.exit_code == 1
    assert "dalorra serve: a byte has changed" in result.output
    assert len(engines) == 1
