"""Verdicts: what was found, what it must be, and whether it is; as a table and as JSON."""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.hardware import describe_hardware

__all__ = ["Verdict", "above", "below", "conclude", "equals", "table"]


@dataclass(frozen=True)
class Verdict:
    """One target and what was found.

    Attributes:
        name: What is measured, with its unit.
        found: The value.
        target: What it must be, in words.
        passed: Whether it is.
    """

    name: str
    found: float
    target: str
    passed: bool


def below(name: str, found: float, limit: float) -> Verdict:
    """Return the verdict on a value that must not exceed a limit; NaN fails."""
    return Verdict(name, found, f"<= {limit:g}", found <= limit)


def above(name: str, found: float, limit: float) -> Verdict:
    """Return the verdict on a value that must reach a limit; NaN fails."""
    return Verdict(name, found, f">= {limit:g}", found >= limit)


def equals(name: str, found: float, expected: float) -> Verdict:
    """Return the verdict on a count that must be one number."""
    return Verdict(name, found, f"= {expected:g}", found == expected)


def table(verdicts: Sequence[Verdict]) -> str:
    """Return verdicts as lines of text."""
    width = max((len(verdict.name) for verdict in verdicts), default=0)
    return "".join(
        f"{'pass' if v.passed else 'FAIL'}  {v.name:<{width}}  {v.found:>12.6g}  {v.target}\n"
        for v in verdicts
    )


def conclude(
    program: str, found: dict[str, Any], verdicts: Sequence[Verdict], output: Path | None
) -> int:
    """Print the verdicts, write everything as JSON, and return the exit code: 0 if all passed.

    Args:
        program: Name of the benchmark.
        found: Everything that was measured and how.
        verdicts: What is to be judged.
        output: File for the JSON; None prints it to standard output.
    """
    document = {
        "program": program,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "hardware": describe_hardware(),
        "passed": all(verdict.passed for verdict in verdicts),
        "verdicts": [asdict(verdict) for verdict in verdicts],
        **found,
    }
    text = json.dumps(document, indent=1) + "\n"
    if output is None:
        sys.stdout.write(text)
    else:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(text, encoding="utf-8")
    sys.stderr.write(f"{program}\n{table(verdicts)}")
    return 0 if document["passed"] else 1
