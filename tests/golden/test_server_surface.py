"""The public surface of the server: its HTTP schema and the names of its metrics."""

import json
from collections.abc import Callable

from server.app import create_app
from server.settings import Settings
from tests.support.fake_engine import FakeEngine


def test_openapi(golden: Callable[[str, str], None]) -> None:
    document = create_app(FakeEngine, Settings()).openapi()
    document["info"]["version"] = "0"
    golden("openapi.json", json.dumps(document, indent=1, sort_keys=True) + "\n")


def test_metrics(golden: Callable[[str, str], None]) -> None:
    telemetry = create_app(FakeEngine, Settings()).state.service.telemetry
    lines: list[str] = []
    for family in sorted(telemetry.registry.collect(), key=lambda family: family.name):
        labels = sorted(
            {name for sample in family.samples for name in sample.labels}
            or getattr(family, "_labelnames", ())  # of collectors that make their own families
            or telemetry.registry._names_to_collectors[family.name]._labelnames
        )
        name = f"{family.name}_total" if family.type == "counter" else family.name
        names = [label for label in labels if label != "le" or family.type != "histogram"]
        lines.append(f"{name} {family.type} {','.join(names)}".rstrip())
    golden("metrics.txt", "\n".join(lines) + "\n")
