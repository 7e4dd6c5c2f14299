"""The numbers of a reliability diagram, with what chance alone would show."""

from dataclasses import dataclass

import torch
from torch import Tensor

from dalorra_core.metrics.calibration import reliability_bins

__all__ = ["Reliability", "reliability"]

_BINS = 15
_DRAWS = 1000
_BAND = (0.025, 0.975)


@dataclass(frozen=True, eq=False)
class Reliability:
    """Bins that hold rows, in order of confidence; k of them.

    Attributes:
        confidence: (k,) mean confidence.
        accuracy: (k,) share of right answers.
        low: (k,) lower end of the middle 95 % of accuracies that a perfectly calibrated model
            with these confidences shows on as many rows.
        high: (k,) upper end of it.
        count: (k,) rows.
        ece: Of these bins, fraction.
        ece_by_chance: Mean ECE of the perfectly calibrated model, fraction.
    """

    confidence: Tensor
    accuracy: Tensor
    low: Tensor
    high: Tensor
    count: Tensor
    ece: float
    ece_by_chance: float


def reliability(confidence: Tensor, correct: Tensor, generator: torch.Generator) -> Reliability:
    """Return the diagram of n answers.

    Args:
        confidence: (n,), n >= 1.
        correct: (n,) bool.
        generator: Source of the simulated answers.
    """
    bins = reliability_bins(confidence, correct, _BINS)
    there = bins.count > 0
    uniform = torch.rand(_DRAWS, len(confidence), generator=generator, dtype=torch.float64)
    hits = (uniform < confidence.double()).double()  # (draws, n)
    index = torch.bucketize(confidence.float(), bins.lower, right=True) - 1
    sums = torch.zeros(_DRAWS, len(bins.count), dtype=torch.float64)
    sums.index_add_(1, index, hits)
    shown = sums[:, there] / bins.count[there]
    low, high = (shown.quantile(q, dim=0) for q in _BAND)
    weight = bins.count[there].double() / len(confidence)
    own = bins.confidence[there]
    return Reliability(
        confidence=own,
        accuracy=bins.accuracy[there],
        low=low,
        high=high,
        count=bins.count[there],
        ece=float((weight * (bins.accuracy[there] - own).abs()).sum()),
        ece_by_chance=float((weight * (shown - own).abs()).sum(1).mean()),
    )
