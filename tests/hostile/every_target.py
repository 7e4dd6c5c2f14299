"""All doors together, and the cases that once got through one of them."""

from pathlib import Path

from tests.hostile.door_targets import door_targets
from tests.hostile.file_targets import file_targets
from tests.hostile.targets import Target, request_targets

__all__ = ["CORPUS", "WEIGHTS", "every_target", "kept_cases"]

CORPUS = Path(__file__).parent / "corpus"
"""One folder for each target, one file for each case that once failed."""

WEIGHTS = {"prompt": 0.2, "prediction_id": 0.5, "pin": 0.2, "traceparent": 0.5}
"""How many cases a target gets in comparison; 1 for those not named (a prompt is slow)."""


def every_target(folder: Path) -> dict[str, Target]:
    """Return every target by name; ``folder`` is theirs to write in."""
    targets = (*request_targets(), *door_targets(folder), *file_targets(folder))
    return {target.name: target for target in targets}


def kept_cases() -> list[Path]:
    """Return the files of all kept cases, by target and name."""
    return sorted(path for path in CORPUS.glob("*/*") if path.is_file())
