"""Choose the thresholds of accept, review and abstain on held-out rows.

Empirical choice, no certificate: the target risk was met on the rows at hand, nothing is promised
about the next ones (``Policy.guarantee`` is null).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from dalorra_core.errors import ConfigError, DataError
from dalorra_core.metrics.uncertainty import UncertaintySummary

__all__ = ["NOTHING_ANSWERED", "Thresholds", "choose_thresholds"]

NOTHING_ANSWERED = -1.0
"""``abstain_threshold`` when refusing every row is best: below every possible entropy."""

_ABSTAIN_WITHOUT_OOS = 0.99
"""Without out-of-scope rows, abstain past this quantile of the held-out entropies."""


@dataclass(frozen=True)
class Thresholds:
    """What ``choose_thresholds`` found.

    Attributes:
        min_confidence: Accept from here on; None when the target cannot be met.
        abstain_threshold: Abstain where the predictive entropy, in nats, is above it;
            ``NOTHING_ANSWERED`` when every row is best refused.
        selective_risk: Errors among the accepted held-out rows; None when none are accepted.
        coverage: Accepted share of the held-out rows.
    """

    min_confidence: float | None
    abstain_threshold: float
    selective_risk: float | None
    coverage: float


def choose_thresholds(
    summary: UncertaintySummary, labels: Tensor, target_selective_risk: float
) -> Thresholds:
    """Return thresholds that meet a target risk on these rows.

    The abstain threshold maximises the accuracy over labels and "out of scope" as one more answer
    (the rule of Larson et al. 2019). ``min_confidence`` is then the lowest at which the accepted
    rows, an accepted out-of-scope row counting as an error, are wrong at most at the target rate.

    Args:
        summary: Uncertainty of n held-out rows under the predictive that will be served.
        labels: (n,) right labels, -1 for out of scope.
        target_selective_risk: Strictly between 0 and 1.

    Raises:
        ConfigError: If the target is outside its domain.
        DataError: If there are no rows.
    """
    if not 0.0 < target_selective_risk < 1.0:
        raise ConfigError(
            f"target_selective_risk must lie strictly between 0 and 1, got {target_selective_risk}"
        )
    if labels.numel() == 0:
        raise DataError("choosing a policy needs at least one held-out row, got none")
    correct = summary.mean_probs.argmax(-1) == labels
    abstain_threshold = _abstain_threshold(summary.predictive_entropy, correct, labels < 0)
    kept = summary.predictive_entropy <= abstain_threshold
    confidence, order = summary.confidence[kept].double().sort(descending=True)
    errors = (~correct[kept][order]).double().cumsum(0)
    accepted = torch.arange(1, len(order) + 1, dtype=torch.float64)
    # A threshold takes all rows of equal confidence, so only the last of each run is a candidate.
    is_last = torch.ones(len(order), dtype=torch.bool)
    is_last[:-1] = confidence[:-1] > confidence[1:]
    allowed = (is_last & (errors / accepted <= target_selective_risk)).nonzero().flatten()
    if not len(allowed):
        return Thresholds(None, abstain_threshold, None, 0.0)
    k = int(allowed[-1])
    risk = float(errors[k] / accepted[k])
    return Thresholds(float(confidence[k]), abstain_threshold, risk, (k + 1) / len(labels))


def _abstain_threshold(entropy: Tensor, correct: Tensor, outside: Tensor) -> float:
    values, order = entropy.double().sort()
    if not bool(outside.any()):
        return float(values.quantile(_ABSTAIN_WITHOUT_OOS))
    # Entry k answers the k surest rows: right answers among them, out-of-scope rows refused after.
    start = torch.zeros(1, dtype=torch.float64)
    answered = torch.cat([start, correct[order].double().cumsum(0)])  # (n + 1,)
    refused = outside.double().sum() - torch.cat([start, outside[order].double().cumsum(0)])
    # A threshold cannot part rows of equal entropy.
    possible = torch.ones(len(values) + 1, dtype=torch.bool)
    possible[1:-1] = values[:-1] < values[1:]
    best = int((answered + refused).masked_fill(~possible, -1.0).argmax())
    if best == 0:
        return NOTHING_ANSWERED
    upper = values[best] if best < len(values) else values[best - 1]
    return float((values[best - 1] + upper) / 2)  # midway, so that rounding decides nothing
