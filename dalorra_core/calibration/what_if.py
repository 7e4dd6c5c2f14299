"""What a threshold or a policy would do on the stored certify rows: curves and dry runs."""

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from dalorra_core.artifact.calibration_record import HIGHER_IS_SURER, ScoreName
from dalorra_core.calibration.bounds import (
    Counts,
    Floats,
    clopper_pearson_lower,
    risk_upper_bound,
    selective_risk_at,
)
from dalorra_core.calibration.scores import ScoreTable, surer
from dalorra_core.calibration.threshold_plan import counts_at

__all__ = ["CurvePoint", "RuleEvaluation", "evaluate_rule", "risk_coverage_points"]


@dataclass(frozen=True)
class CurvePoint:
    """One accept threshold at an assumed out-of-scope share.

    Attributes:
        threshold: In the score's own unit; values at least as sure are accepted.
        coverage: Accepted share of all questions.
        in_scope_coverage: Accepted share of the in-scope questions.
        selective_risk: Errors among the accepted.
        risk_lower_bound: Valid at this one threshold with confidence 1 - delta.
        risk_upper_bound: Valid at this one threshold with confidence 1 - delta.
        n_accepted: Rows accepted, in scope and out.
    """

    threshold: float
    coverage: float
    in_scope_coverage: float
    selective_risk: float
    risk_lower_bound: float
    risk_upper_bound: float
    n_accepted: int


@dataclass(frozen=True)
class RuleEvaluation:
    """What a rule does at an assumed out-of-scope share; shares are of all questions.

    Attributes:
        accept: Accepted share; ``review`` and ``abstain`` are the others.
        review: See ``accept``.
        abstain: See ``accept``.
        in_scope_coverage: Accepted share of the in-scope questions.
        out_of_scope_accepted: Accepted share of the out-of-scope ones; None without such rows.
        selective_risk: Errors among the accepted; None when nothing is accepted.
        risk_upper_bound: Valid with confidence 1 - delta if the rule was not picked on these rows.
        n: Rows; ``n_out_of_scope`` of them are out of scope.
        n_out_of_scope: See ``n``.
    """

    accept: float
    review: float
    abstain: float
    in_scope_coverage: float
    out_of_scope_accepted: float | None
    selective_risk: float | None
    risk_upper_bound: float
    n: int
    n_out_of_scope: int


def risk_coverage_points(
    held: ScoreTable,
    score: ScoreName,
    out_of_scope_share: float,
    delta: float,
    max_points: int = 100,
) -> tuple[CurvePoint, ...]:
    """Return the risk-coverage curve of a score, surest threshold first.

    The bounds hold pointwise: each with confidence 1 - delta at its own threshold, not all at
    once, and not for a threshold picked off the curve. A certificate is for that.

    Args:
        held: Certify rows.
        score: Score to put the threshold on.
        out_of_scope_share: pi, in [0, 1).
        delta: Chance that one bound is wrong (each side).
        max_points: Points at equal steps of the accepted share of the rows.

    Raises:
        ConfigError: The score was not measured, or pi > 0 without out-of-scope rows.
    """
    values = np.sort(surer(score, held.score(score)).numpy())[::-1]
    points = min(max_points, len(values))
    # The k-th threshold accepts k/points of the rows, and those that tie with its last one.
    last = np.ceil(np.arange(1, points + 1) * len(values) / points).astype(int) - 1
    thresholds = np.unique(values[last])[::-1]
    counts = counts_at(held, score, thresholds)
    risk = selective_risk_at(counts, out_of_scope_share)
    upper = risk_upper_bound(counts, out_of_scope_share, delta)
    lower = _risk_lower_bound(counts, out_of_scope_share, delta)
    inside = counts.accepted / counts.n
    covered = _covered(counts, out_of_scope_share)
    own = thresholds if HIGHER_IS_SURER[score] else -thresholds
    return tuple(
        CurvePoint(
            threshold=float(own[k]),
            coverage=float(covered[k]),
            in_scope_coverage=float(inside[k]),
            selective_risk=float(risk[k]),
            risk_lower_bound=float(lower[k]),
            risk_upper_bound=float(upper[k]),
            n_accepted=int(counts.accepted[k] + counts.accepted_outside[k]),
        )
        for k in range(len(thresholds))
        if counts.accepted[k] + counts.accepted_outside[k] > 0 and not np.isnan(risk[k])
    )


def evaluate_rule(
    held: ScoreTable, accept: Tensor, abstain: Tensor, out_of_scope_share: float, delta: float
) -> RuleEvaluation:
    """Return what a rule does on the certify rows, reweighted to an out-of-scope share.

    Args:
        held: Certify rows.
        accept: (n,) whether each row is accepted.
        abstain: (n,) whether each row is abstained from; never where it is accepted.
        out_of_scope_share: pi, in [0, 1).
        delta: Chance that the bound is wrong.

    Raises:
        ConfigError: pi > 0 without out-of-scope rows.
    """
    outside = held.outside
    counts = _counts(held, accept)
    risk = float(selective_risk_at(counts, out_of_scope_share))
    accepted = float(_covered(counts, out_of_scope_share))
    refused = float(_covered(_counts(held, abstain), out_of_scope_share))
    n_outside = int(outside.sum())
    return RuleEvaluation(
        accept=accepted,
        review=max(0.0, 1.0 - accepted - refused),
        abstain=refused,
        in_scope_coverage=float(counts.accepted / counts.n),
        out_of_scope_accepted=(
            float(counts.accepted_outside / counts.n_outside) if n_outside else None
        ),
        selective_risk=None if np.isnan(risk) else risk,
        risk_upper_bound=float(risk_upper_bound(counts, out_of_scope_share, delta)),
        n=len(held),
        n_out_of_scope=n_outside,
    )


def _counts(held: ScoreTable, chosen: Tensor) -> Counts:
    inside = chosen & ~held.outside
    return Counts(
        accepted=np.asarray(float(inside.sum())),
        wrong=np.asarray(float((inside & ~held.correct).sum())),
        n=float((~held.outside).sum()),
        accepted_outside=np.asarray(float((chosen & held.outside).sum())),
        n_outside=float(held.outside.sum()),
    )


def _covered(counts: Counts, out_of_scope_share: float) -> Floats:
    outside = counts.accepted_outside / counts.n_outside if counts.n_outside else 0.0
    return (1 - out_of_scope_share) * counts.accepted / counts.n + out_of_scope_share * outside


def _risk_lower_bound(counts: Counts, out_of_scope_share: float, delta: float) -> Floats:
    """Return a lower bound: each part at its lower bound, the accepted share at its upper one."""
    if out_of_scope_share == 0:
        return clopper_pearson_lower(counts.wrong, counts.accepted, delta)
    third = delta / 3
    outside = out_of_scope_share * clopper_pearson_lower(
        counts.accepted_outside, counts.n_outside, third
    )
    wrong = clopper_pearson_lower(counts.wrong, counts.accepted, third)
    covered = 1.0 - clopper_pearson_lower(counts.n - counts.accepted, counts.n, third)
    inside = (1 - out_of_scope_share) * covered
    return (inside * wrong + outside) / (inside + outside)
