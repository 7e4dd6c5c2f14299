"""Apply a policy to scored rows: accept, review or abstain."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dalorra_core.artifact.calibration_record import CombinedScore, Limit, Policy, ScoreName
from dalorra_core.calibration.combined import FEATURES
from dalorra_core.calibration.scores import ScoreTable, passes, surer

__all__ = ["Decisions", "decide", "scores_behind", "scores_needed"]


@dataclass(frozen=True, eq=False)
class Decisions:
    """What a policy decides on n rows; exactly one of the three holds for each.

    Attributes:
        accept: (n,) bool.
        abstain: (n,) bool.
    """

    accept: Tensor
    abstain: Tensor

    @property
    def review(self) -> Tensor:
        """Whether a row is neither accepted nor abstained from, (n,) bool."""
        return ~(self.accept | self.abstain)

    def shares(self) -> dict[str, float]:
        """Return the share of each decision; the three sum to 1."""
        parts = {"accept": self.accept, "review": self.review, "abstain": self.abstain}
        return {name: float(flags.double().mean()) for name, flags in parts.items()}


def scores_behind(combined: CombinedScore) -> set[ScoreName]:
    """Return the scores that a combined score is made of."""
    return {FEATURES[name][0] for name in combined.weights}


def scores_needed(policy: Policy) -> set[ScoreName]:
    """Return the scores that a policy has limits on."""
    return {limit.score for limit in (policy.accept, policy.abstain) if limit is not None}


def decide(policy: Policy, table: ScoreTable, labels: Sequence[str]) -> Decisions:
    """Return what a policy decides on rows that were not truncated.

    Args:
        policy: Its limits; the thresholds of ``accept_by_label`` stand in for the accept limit's.
        table: n rows.
        labels: Label names in the order of ``table.predicted``.

    Raises:
        ConfigError: If a score that the policy needs was not measured.
    """
    n = len(table)
    abstain = torch.zeros(n, dtype=torch.bool)
    if policy.abstain is not None:
        abstain = ~passes(policy.abstain, table)
    if policy.accept is None:
        return Decisions(torch.zeros(n, dtype=torch.bool), abstain)
    sure = _passes_by_label(policy.accept, policy.accept_by_label or {}, table, labels)
    return Decisions(sure & ~abstain, abstain)


def _passes_by_label(
    limit: Limit, by_label: dict[str, float | None], table: ScoreTable, labels: Sequence[str]
) -> Tensor:
    thresholds = torch.full((len(labels),), limit.threshold, dtype=torch.float64)
    never = torch.zeros(len(labels), dtype=torch.bool)
    for label, threshold in by_label.items():
        k = labels.index(label)
        if threshold is None:
            never[k] = True
        else:
            thresholds[k] = threshold
    least = surer(limit.score, thresholds[table.predicted])
    return (surer(limit.score, table.score(limit.score)) >= least) & ~never[table.predicted]
