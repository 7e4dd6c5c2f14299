"""Before the test: what shall be certified, on which score, by which thresholds in which order.

All of it is decided on the select part. Of the certify part only the numbers of rows are used.
"""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from torch import Tensor

from dalorra_core.artifact.calibration_record import ScoreName
from dalorra_core.calibration.bounds import Counts, Floats, risk_upper_bound
from dalorra_core.calibration.scores import ScoreTable, surer
from dalorra_core.errors import ConfigError, DataError

__all__ = [
    "CertifyRequest",
    "Procedure",
    "ThresholdPlan",
    "candidates",
    "check_rows",
    "choose_score",
    "counts_at",
    "fewest_accepted",
    "plan_thresholds",
]

Procedure = Literal["fixed_sequence", "bonferroni"]

_GRID = 100
"""Candidate thresholds, at equal steps of the select part's accepted share."""

_BONFERRONI_GRID = 10
"""Fewer candidates, since each one costs its share of delta."""

_SPLITS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
"""Parts of delta tried for the out-of-scope bound, on the select part."""


@dataclass(frozen=True)
class CertifyRequest:
    """What to certify.

    Attributes:
        target_risk: Largest share of errors among accepted answers, strictly between 0 and 1.
        delta: Chance that the certificate is wrong.
        out_of_scope_share: pi: the certificate holds while at most this share is out of scope.
        procedure: ``fixed_sequence``, or ``bonferroni`` over a few thresholds.
        label: Only answers with this predicted label (Mondrian); None: all answers.
    """

    target_risk: float
    delta: float = 0.1
    out_of_scope_share: float = 0.0
    procedure: Procedure = "fixed_sequence"
    label: int | None = None

    def __post_init__(self) -> None:
        """Refuse numbers outside their domains."""
        for name in ("target_risk", "delta"):
            value = getattr(self, name)
            if not 0.0 < value < 1.0:
                raise ConfigError(f"{name} must lie strictly between 0 and 1, got {value}")
        if not 0.0 <= self.out_of_scope_share < 1.0:
            raise ConfigError(
                f"out_of_scope_share must be in [0, 1), got {self.out_of_scope_share}"
            )


@dataclass(frozen=True)
class ThresholdPlan:
    """Thresholds to test (in ``surer`` units), surest first, and how delta is split."""

    thresholds: Floats
    split: float


def fewest_accepted(target_risk: float, delta: float) -> int:
    """Return how many accepted rows without one error certify a target: ln(delta) / ln(1 - risk).

    Example:
        >>> fewest_accepted(0.05, 0.1)
        45
    """
    return math.ceil(math.log(delta) / math.log1p(-target_risk))


def choose_score(select: ScoreTable, held: ScoreTable, request: CertifyRequest) -> ScoreName:
    """Return the score that promises the largest accepted share, judged on the select part alone.

    Of ``held`` only the numbers of rows are used. Where no score promises anything, the one whose
    bound comes nearest to the target.
    """
    check_rows(select, request, "select")

    def promise(score: ScoreName) -> tuple[float, float]:
        counts, bounds, _ = _expected(
            select, held, score, request, candidates(select, score, request)
        )
        share = np.where(bounds <= request.target_risk, counts.accepted, 0.0).max(initial=0.0)
        return float(share), -float(bounds.min(initial=1.0))

    return max(select.scores, key=promise)


def plan_thresholds(
    select: ScoreTable, held: ScoreTable, score: ScoreName, request: CertifyRequest
) -> ThresholdPlan:
    """Return the thresholds worth testing, from the one with the lowest expected bound on."""
    thresholds = candidates(select, score, request)
    counts, bounds, split = _expected(select, held, score, request, thresholds)
    enough = counts.accepted >= fewest_accepted(request.target_risk, request.delta)
    if not enough.any():
        return ThresholdPlan(np.empty(0), split)
    start = int(np.where(enough, bounds, np.inf).argmin())
    chosen = thresholds[start:]
    if request.procedure == "bonferroni":
        hopeful = chosen[bounds[start:] <= request.target_risk]
        chosen = hopeful if len(hopeful) else chosen[:1]
        places = np.linspace(0, len(chosen) - 1, min(_BONFERRONI_GRID, len(chosen)))
        chosen = chosen[places.round().astype(int)]
    return ThresholdPlan(chosen, split)


def counts_at(
    table: ScoreTable, score: ScoreName, thresholds: Floats, label: int | None = None
) -> Counts:
    """Return what each threshold accepts.

    Args:
        table: Rows.
        score: Score the thresholds are on.
        thresholds: In ``surer`` units: higher is surer.
        label: Count only answers with this predicted label as accepted.
    """
    values = surer(score, table.score(score))
    eligible = table.predicted == label if label is not None else table.predicted >= 0
    inside = eligible & ~table.outside

    def at_least(chosen: Tensor) -> Floats:
        ordered = np.sort(values[chosen].numpy())
        return len(ordered) - np.searchsorted(ordered, thresholds, side="left").astype(float)

    return Counts(
        accepted=at_least(inside),
        wrong=at_least(inside & ~table.correct),
        n=float((~table.outside).sum()),
        accepted_outside=at_least(eligible & table.outside),
        n_outside=float(table.outside.sum()),
    )


def candidates(select: ScoreTable, score: ScoreName, request: CertifyRequest) -> Floats:
    """Return candidate thresholds, surest first, in ``surer`` units."""
    eligible = ~select.outside
    if request.label is not None:
        eligible &= select.predicted == request.label
    values = surer(score, select.score(score))[eligible].numpy()
    if not len(values):
        return np.empty(0)
    return np.unique(np.quantile(values, np.linspace(0.0, 1.0, _GRID)))[::-1]


def _expected(
    select: ScoreTable,
    held: ScoreTable,
    score: ScoreName,
    request: CertifyRequest,
    thresholds: Floats,
) -> tuple[Counts, Floats, float]:
    """Return counts and bounds as the certify part would show them at the select part's rates.

    Of the splits of delta, the one that promises the most acceptance at the target.
    """
    outside = held.outside.sum()
    counts = counts_at(select, score, thresholds, request.label)
    counts = counts.scaled(float(len(held) - outside), float(outside))
    best: tuple[tuple[float, float], Floats, float] | None = None
    for split in _SPLITS if request.out_of_scope_share else (0.5,):
        bounds = risk_upper_bound(counts, request.out_of_scope_share, request.delta, split)
        share = np.where(bounds <= request.target_risk, counts.accepted, 0.0).max(initial=0.0)
        promise = (float(share), -float(bounds.min(initial=1.0)))
        if best is None or promise > best[0]:
            best = (promise, bounds, split)
    assert best is not None  # noqa: S101 - there is always a split
    return counts, best[1], best[2]


def check_rows(table: ScoreTable, request: CertifyRequest, part: str) -> None:
    """Refuse a part without the rows that the request needs.

    Raises:
        DataError: No in-scope row, or pi > 0 and none out of scope.
    """
    outside = int(table.outside.sum())
    if len(table) == outside:
        raise DataError(f"the {part} part has no in-scope row; give more rows")
    if request.out_of_scope_share > 0 and not outside:
        raise DataError(
            f"out_of_scope_share {request.out_of_scope_share:g} needs out-of-scope rows in the "
            f"{part} part, which has none; give more of them, or declare a share of 0"
        )
