"""What the fake engine keeps of its calibration rows, and what it answers from them.

The same questions as the core answers with exact bounds, by brute force and Hoeffding's inequality.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

from server.decision import decide
from server.ports import (
    HIGHER_IS_SURER,
    NotCalibratedError,
    Policy,
    PolicyEvaluation,
    RiskCoveragePoint,
    RowScores,
    ScoreName,
)

__all__ = ["StoredRow", "curve_of", "evaluate"]


@dataclass(frozen=True)
class StoredRow:
    """One answered row: whether it was right, whether it was out of scope, and its scores."""

    right: bool
    outside: bool
    scores: RowScores


@dataclass(frozen=True)
class Measured:
    """What accepting some of the rows does, at an assumed out-of-scope share."""

    coverage: float
    in_scope_coverage: float
    out_of_scope_accepted: float | None
    selective_risk: float | None
    risk_upper_bound: float
    n_accepted: int


def curve_of(
    rows: list[StoredRow], score: ScoreName, share: float, delta: float
) -> tuple[RiskCoveragePoint, ...]:
    """Return one point per value of a score, surest first."""
    values = sorted(
        {_value(row, score) for row in _checked(rows, share)}, reverse=HIGHER_IS_SURER[score]
    )
    points: list[RiskCoveragePoint] = []
    for threshold in values:
        passing = functools.partial(_passes, score=score, threshold=threshold)
        found = _measure(rows, passing, share, delta)
        points.append(
            RiskCoveragePoint(
                threshold=threshold,
                coverage=found.coverage,
                in_scope_coverage=found.in_scope_coverage,
                selective_risk=found.selective_risk,
                risk_upper_bound=found.risk_upper_bound,
                n_accepted=found.n_accepted,
            )
        )
    return tuple(points)


def evaluate(rows: list[StoredRow], policy: Policy, share: float, delta: float) -> PolicyEvaluation:
    """Return what the server's own decisions would be on the rows."""
    _checked(rows, share)
    for limit in (*(policy.accept or ()), *policy.abstain):
        _value(rows[0], limit.score)

    def decided(row: StoredRow) -> str:
        return decide(policy, row.scores, truncated=False).decision

    accepted = _measure(rows, lambda row: decided(row) == "accept", share, delta)
    abstained = _measure(rows, lambda row: decided(row) == "abstain", share, delta)
    return PolicyEvaluation(
        n=len(rows),
        n_out_of_scope=sum(row.outside for row in rows),
        accept=accepted.coverage,
        review=1 - accepted.coverage - abstained.coverage,
        abstain=abstained.coverage,
        in_scope_coverage=accepted.in_scope_coverage,
        out_of_scope_accepted=accepted.out_of_scope_accepted,
        selective_risk=accepted.selective_risk,
        risk_upper_bound=accepted.risk_upper_bound,
    )


def _checked(rows: list[StoredRow], share: float) -> list[StoredRow]:
    if not rows:
        raise NotCalibratedError("the adapter stores no calibration rows")
    if share > 0 and not any(row.outside for row in rows):
        raise ValueError(f"out_of_scope_share is {share}, but no out-of-scope rows are stored")
    return rows


def _value(row: StoredRow, score: ScoreName) -> float:
    value = getattr(row.scores, score)
    if value is None:
        raise NotCalibratedError(f"the adapter does not store the score {score}")
    return float(value)


def _passes(row: StoredRow, score: ScoreName, threshold: float) -> bool:
    value = _value(row, score)
    return value >= threshold if HIGHER_IS_SURER[score] else value <= threshold


def _measure(
    rows: list[StoredRow], chosen: Callable[[StoredRow], bool], share: float, delta: float
) -> Measured:
    inside = [row for row in rows if not row.outside]
    outside = [row for row in rows if row.outside]
    taken = [row for row in rows if chosen(row)]
    inside_taken = [row for row in taken if not row.outside]
    in_coverage = len(inside_taken) / len(inside)
    out_coverage = (len(taken) - len(inside_taken)) / len(outside) if outside else 0.0
    coverage = (1 - share) * in_coverage + share * out_coverage
    wrong = sum(not row.right for row in inside_taken) / len(inside)
    risk = ((1 - share) * wrong + share * out_coverage) / coverage if coverage else None
    slack = math.sqrt(math.log(1 / delta) / (2 * max(len(taken), 1)))
    return Measured(
        coverage=coverage,
        in_scope_coverage=in_coverage,
        out_of_scope_accepted=out_coverage if outside else None,
        selective_risk=risk,
        risk_upper_bound=min(1.0, (risk or 0.0) + slack) if taken else 1.0,
        n_accepted=len(taken),
    )
