"""A private Prometheus for a test: it scrapes servers on loopback and applies the shipped rules."""

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from benchmarks.scene.processes import prometheus
from deploy.prometheus.rule_settings import RuleSettings

__all__ = ["find_prometheus", "prometheus_server"]


def find_prometheus() -> str | None:
    """Return the program, or None when there is none."""
    return shutil.which("prometheus")


@contextlib.contextmanager
def prometheus_server(folder: Path, targets: list[str], rules: RuleSettings) -> Iterator[str]:
    """Run a Prometheus and yield its address, without a slash at the end.

    Like the one in docker-compose.yml it sends a key from a file, which a server without keys
    must ignore.

    Args:
        folder: Empty; for its configuration, log and data.
        targets: ``host:port`` of what it scrapes.
        rules: Numbers in the rules.
    """
    with prometheus(folder, targets, rules, key="not-asked-for") as service:
        yield f"http://127.0.0.1:{service.port}"
