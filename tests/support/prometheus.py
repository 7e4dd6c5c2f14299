"""A private Prometheus for a test: it scrapes servers on loopback and applies the shipped rules."""

import contextlib
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import yaml

from deploy.prometheus.drift_rules import write
from deploy.prometheus.rule_settings import RuleSettings

__all__ = ["find_prometheus", "prometheus_server"]

START_S = 30


def find_prometheus() -> str | None:
    """Return the program, or None when there is none."""
    return shutil.which("prometheus")


@contextlib.contextmanager
def prometheus_server(
    folder: Path, targets: list[str], rules: RuleSettings, scrape_interval: str = "1s"
) -> Iterator[str]:
    """Run a Prometheus and yield its address, without a slash at the end.

    Like the one in docker-compose.yml it sends a key from a file, which a server without keys
    must ignore.

    Args:
        folder: Empty; for its configuration, log and data.
        targets: ``host:port`` of what it scrapes.
        rules: Numbers in the rules.
        scrape_interval: How often it scrapes.
    """
    url = f"http://127.0.0.1:{_free_port()}"
    write(rules, folder / "rules")
    (folder / "key").write_text("not-asked-for", encoding="utf-8")
    config = {
        "global": {"scrape_interval": scrape_interval, "scrape_timeout": scrape_interval},
        "rule_files": [str(folder / "rules" / "*.yml")],
        "scrape_configs": [
            {
                "job_name": "dalorra",
                "authorization": {"credentials_file": str(folder / "key")},
                "static_configs": [{"targets": targets}],
            }
        ],
    }
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config), encoding="utf-8")
    program = find_prometheus()
    assert program is not None, "call require_or_skip first"
    command = [
        program,
        f"--config.file={folder / 'prometheus.yml'}",
        f"--storage.tsdb.path={folder / 'data'}",
        f"--web.listen-address={url.removeprefix('http://')}",
    ]
    with (folder / "log").open("wb") as log, subprocess.Popen(command, stderr=log) as process:
        try:
            _wait_ready(url, process, folder / "log")
            yield url
        finally:
            process.terminate()


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _wait_ready(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    end_s = time.monotonic() + START_S
    while process.poll() is None and time.monotonic() < end_s:
        with contextlib.suppress(URLError, ConnectionError), urlopen(f"{url}/-/ready"):
            return
        time.sleep(0.05)
    raise AssertionError(f"Prometheus does not start:\n{log.read_text(encoding='utf-8')[-2000:]}")
