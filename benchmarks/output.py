"""Where the result of a benchmark goes."""

import json
import sys
from pathlib import Path
from typing import Any

__all__ = ["publish"]


def publish(found: Any, output: Path | None) -> None:
    """Print a result as JSON, and write the same to a file where one is given."""
    text = json.dumps(found, indent=1) + "\n"
    sys.stdout.write(text)
    if output is not None:
        output.write_text(text, encoding="utf-8")
