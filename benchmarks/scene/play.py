"""Play the drift scene: serve, scrape, send in-scope rows, shift them, return."""

import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from benchmarks.scene.processes import (
    PrometheusApi,
    Service,
    free_port,
    prometheus,
    running,
)
from benchmarks.scene.values import (
    DRIFT_ALERTS,
    WATCHED,
    Observation,
    Report,
    SceneError,
    Script,
)

__all__ = ["play", "serve_command"]


class Traffic(threading.Thread):
    """Sends rows from the present source, one request after the other, until it is stopped."""

    def __init__(self, server: Service, script: Script) -> None:
        super().__init__(name="traffic", daemon=True)
        self.source = script.in_scope
        self.sent = 0
        self.failure: str | None = None
        self._server = server
        self._script = script
        self._stopped = threading.Event()

    def run(self) -> None:
        """Send until stopped or refused."""
        size = self._script.rows_per_request
        while not self._stopped.is_set():
            began_s = time.monotonic()
            source = self.source
            texts = [source[(self.sent + i) % len(source)] for i in range(size)]
            try:
                status, body = self._server.call("POST", "/v1/classify", {"input": texts})
            except OSError as error:
                self.failure = f"the server is gone: {error}"
                return
            if status != 200:  # noqa: PLR2004 - OK
                self.failure = f"the server answered {status}: {body[:300]!r}"
                return
            self.sent += size
            pause_s = size / self._script.rows_per_s - (time.monotonic() - began_s)
            self._stopped.wait(max(pause_s, 0.0))

    def stop(self) -> None:
        """End it."""
        self._stopped.set()
        self.join()


class Observer:
    """Asks Prometheus once per scrape and writes down what changed."""

    def __init__(self, api: PrometheusApi, traffic: Traffic, script: Script) -> None:
        self.report = Report()
        self._api = api
        self._traffic = traffic
        self._script = script
        self._began_s = time.monotonic()
        self._states: dict[str, str] = {}

    def watch(self, phase: str, until: Callable[[Observation], bool], limit_s: float) -> None:
        """Observe until a condition holds.

        Raises:
            SceneError: It did not within ``limit_s``, or the traffic failed.
        """
        end_s = time.monotonic() + limit_s
        self._say(f"-- {phase}")
        while True:
            time.sleep(self._script.scrape_s)
            seen = self._observe(phase)
            if self._traffic.failure is not None:
                raise SceneError(self._traffic.failure)
            if until(seen):
                self._say(seen.line())
                return
            if time.monotonic() > end_s:
                raise SceneError(f"{phase}: not reached within {limit_s:g} s; {seen.line()}")

    def _observe(self, phase: str) -> Observation:
        values = {name: self._api.value(expr) for name, expr in WATCHED.items()}
        alerts = self._api.alert_states()
        at_s = round(time.monotonic() - self._began_s, 1)
        seen = Observation(at_s, phase, values, alerts)
        self.report.observations.append(seen)
        for alert in sorted(self._states.keys() | alerts.keys()):
            state = alerts.get(alert, "resolved")
            if state != self._states.get(alert, "resolved"):
                self.report.life.append({"at_s": at_s, "alert": alert, "state": state})
                self._say(f"{alert} is {state}; {seen.line()}")
        self._states = alerts
        return seen

    def _say(self, text: str) -> None:
        sys.stderr.write(f"{time.monotonic() - self._began_s:7.1f} s  {text}\n")


def serve_command(adapter: Path, *options: str) -> list[str]:
    """Return the command that serves an adapter; its port is added."""
    dalorra = Path(sys.executable).with_name("dalorra")
    return [str(dalorra), "serve", str(adapter), "--drain-seconds", "0", *options]


def play(command: Sequence[str], script: Script) -> Report:
    """Play a scene: serve, scrape, shift, return.

    Args:
        command: Serves the adapter, given ``--port``.
        script: What to send, and how fast.

    Returns:
        What was seen.

    Raises:
        SceneError: The alerts did not fire or did not clear in time.
    """
    with _stage(command, script) as (server, api):
        traffic = Traffic(server, script)
        observer = Observer(api, traffic, script)
        traffic.start()
        try:
            _acts(observer, traffic, script)
        finally:
            traffic.stop()
        return observer.report


def _acts(observer: Observer, traffic: Traffic, script: Script) -> None:
    full_s = time.monotonic() + script.window_s + 2 * script.scrape_s

    def window_is_full(seen: Observation) -> bool:
        rows = seen.values["rows"] or 0.0
        return time.monotonic() > full_s and rows >= script.min_rows

    observer.watch("in scope", window_is_full, script.window_s + script.patience_s)
    traffic.source = script.shifted
    held_s = time.monotonic() + script.hold_s

    def fired(seen: Observation) -> bool:
        firing = all(seen.alerts.get(alert) == "firing" for alert in DRIFT_ALERTS)
        return firing and time.monotonic() > held_s

    observer.watch("shifted", fired, script.hold_s + script.patience_s)
    traffic.source = script.in_scope
    observer.watch(
        "back in scope",
        lambda seen: not any(alert in seen.alerts for alert in DRIFT_ALERTS),
        script.patience_s,
    )


@contextmanager
def _stage(command: Sequence[str], script: Script) -> Iterator[tuple[Service, PrometheusApi]]:
    if shutil.which("prometheus") is None:
        raise SceneError("prometheus is not on the PATH")
    server = Service(free_port())
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        # the server may write its state there and nowhere else
        serve = [*command, "--port", str(server.port), "--state-dir", str(folder / "state")]
        targets = [f"127.0.0.1:{server.port}"]
        with (
            running(serve, folder / "server.log", server, "/health/ready"),
            prometheus(folder, targets, script.rules(), script.scrape_s) as watcher,
        ):
            yield server, PrometheusApi(watcher)
