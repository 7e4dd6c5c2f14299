"""The two processes of the drift scene, and what is asked of them; on the loopback interface."""

import contextlib
import json
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import yaml

from deploy.prometheus.drift_rules import write
from deploy.prometheus.rule_settings import RuleSettings

__all__ = ["PrometheusApi", "Service", "free_port", "prometheus", "running"]

_STOP_S = 20.0


def free_port() -> int:
    """Return a port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Service:
    """An HTTP service on a loopback port.

    Attributes:
        port: Where it listens.
    """

    def __init__(self, port: int) -> None:
        self.port = port

    def call(self, method: str, path: str, body: Any = None) -> tuple[int, bytes]:
        """Return status and body of one request.

        Raises:
            OSError: Nobody listens.
        """
        connection = HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            sent = None if body is None else json.dumps(body)
            connection.request(method, path, sent, {"Content-Type": "application/json"})
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()


@contextlib.contextmanager
def running(
    command: Sequence[str], log: Path, service: Service, ready: str, timeout_s: float = 180.0
) -> Iterator[None]:
    """Run a program until the block ends, however it ends; enter the block when it is ready.

    Args:
        command: The program and its arguments.
        log: File for its output.
        service: Where it will listen.
        ready: Path that answers 200 when it is ready.
        timeout_s: How long that may take.

    Raises:
        RuntimeError: It ended or did not get ready; the text has the end of its output.
    """
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)  # noqa: S603
    try:
        end_s = time.monotonic() + timeout_s
        while not _is_ready(service, ready):
            if process.poll() is not None or time.monotonic() > end_s:
                tail = log.read_text(encoding="utf-8", errors="replace")[-2000:]
                raise RuntimeError(f"{command[0]} did not get ready:\n{tail}")
            time.sleep(0.1)
        yield
    finally:
        process.terminate()
        try:
            process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _is_ready(service: Service, path: str) -> bool:
    try:
        return service.call("GET", path)[0] == 200  # noqa: PLR2004 - OK
    except (OSError, HTTPException):
        return False


@contextlib.contextmanager
def prometheus(
    folder: Path,
    targets: Sequence[str],
    rules: RuleSettings,
    scrape_interval_s: float = 1.0,
    *,
    key: str | None = None,
) -> Iterator[Service]:
    """Run a Prometheus that scrapes servers and applies the shipped rules.

    Args:
        folder: For its configuration, rules, log and data.
        targets: ``host:port`` of what it scrapes.
        rules: Numbers in the rules.
        scrape_interval_s: How often it scrapes and evaluates.
        key: Sent with every scrape, from a file, like the one in docker-compose.yml.
    """
    service = Service(free_port())
    write(rules, folder / "rules")
    job: dict[str, Any] = {"job_name": "dalorra", "static_configs": [{"targets": list(targets)}]}
    if key is not None:
        (folder / "key").write_text(key, encoding="utf-8")
        job["authorization"] = {"credentials_file": "key"}
    interval = f"{round(scrape_interval_s * 1000)}ms"
    times = ("scrape_interval", "scrape_timeout", "evaluation_interval")
    config = folder / "prometheus.yml"
    content = {
        "global": dict.fromkeys(times, interval),
        "rule_files": ["rules/*.yml"],
        "scrape_configs": [job],
    }
    config.write_text(yaml.safe_dump(content), encoding="utf-8")
    command = [
        "prometheus",
        f"--config.file={config}",
        f"--storage.tsdb.path={folder / 'data'}",
        f"--web.listen-address=127.0.0.1:{service.port}",
    ]
    with running(command, folder / "prometheus.log", service, "/-/ready", 30.0):
        yield service


class PrometheusApi:
    """Questions to a running Prometheus."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def value(self, expression: str) -> float | None:
        """Return the value of an expression that gives one series; None when it gives none."""
        found = self._get("/api/v1/query?" + urlencode({"query": expression}))["result"]
        if len(found) > 1:
            raise RuntimeError(f"{expression} gives {len(found)} series, expected one")
        return float(found[0]["value"][1]) if found else None

    def alert_states(self) -> dict[str, str]:
        """Return ``pending`` or ``firing`` by the name of each active alert."""
        alerts = self._get("/api/v1/alerts")["alerts"]
        return {alert["labels"]["alertname"]: alert["state"] for alert in alerts}

    def _get(self, path: str) -> dict[str, Any]:
        status, body = self._service.call("GET", path)
        answer = json.loads(body)
        if answer["status"] != "success":
            raise RuntimeError(f"{path} answered {status}: {answer.get('error')}")
        data: dict[str, Any] = answer["data"]
        return data
