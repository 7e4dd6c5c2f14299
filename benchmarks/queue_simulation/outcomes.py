"""What became of requests, simulated or measured, and what that says about a server."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from benchmarks.serving.load import percentile

__all__ = ["Fate", "Outcome", "summarise"]

Fate = Literal["answered", "shed", "late"]
"""200, 429 or 504."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one request.

    Attributes:
        at_s: When it came, in seconds from the start.
        took_s: From then to its answer, whatever that was.
        fate: How it ended.
    """

    at_s: float
    took_s: float
    fate: Fate


def summarise(outcomes: Sequence[Outcome], seconds: float, skip_s: float = 0.0) -> dict[str, float]:
    """Return rates, latencies of those that were answered, and the shares of the others.

    Args:
        outcomes: Of all requests.
        seconds: How long requests came.
        skip_s: Length of the start that does not count: the queue is still filling then.
    """
    counted = [one for one in outcomes if one.at_s >= skip_s]
    took_s = [one.took_s for one in counted if one.fate == "answered"]
    ends_s = [one.at_s + one.took_s for one in outcomes if one.fate == "answered"]
    share = 1 / len(counted) if counted else float("nan")
    return {
        "requests": float(len(counted)),
        "arrivals_per_s": len(counted) / (seconds - skip_s),
        "answered_per_s": sum(skip_s <= end_s < seconds for end_s in ends_s) / (seconds - skip_s),
        **{f"p{q}_s": percentile(took_s, q / 100) for q in (50, 95, 99)},
        "shed": share * sum(one.fate == "shed" for one in counted),
        "late": share * sum(one.fate == "late" for one in counted),
    }
