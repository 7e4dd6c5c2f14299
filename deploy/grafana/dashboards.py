"""Write the two Grafana dashboards as JSON: ``python -m deploy.grafana.dashboards``.

The JSON is committed, so that Grafana needs no Python; a test keeps it equal to this code.
"""

import json
import sys
from pathlib import Path

from grafana_foundation_sdk.builders.dashboard import Dashboard
from grafana_foundation_sdk.cog.encoder import JSONEncoder

from deploy.grafana.drift import drift_dashboard
from deploy.grafana.service import service_dashboard

__all__ = ["FOLDER", "main", "rendered"]

FOLDER = Path(__file__).parent / "generated"


def rendered() -> dict[str, str]:
    """Return the JSON text of each dashboard by its file name."""
    return {
        "confidence-and-drift.json": _text(drift_dashboard()),
        "service.json": _text(service_dashboard()),
    }


def _text(board: Dashboard) -> str:
    model = board.build()
    for number, panel in enumerate(model.panels or [], start=1):
        panel.id_val = number  # type: ignore[union-attr]  # rows and panels both have one
    return json.dumps(model, cls=JSONEncoder, indent=1, sort_keys=True) + "\n"


def main() -> int:
    """Write the files and return the exit code."""
    FOLDER.mkdir(exist_ok=True)
    for name, text in rendered().items():
        (FOLDER / name).write_text(text, encoding="utf-8")
        sys.stdout.write(f"wrote {FOLDER / name}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
