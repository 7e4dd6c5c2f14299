"""Thresholds with a certificate: Learn then Test on rows that nothing else has looked at.

The select part plans (which thresholds to test, in which order, how delta is split); the certify
part tests. Fixed-sequence testing needs no correction: each threshold is tested at the whole delta,
in an order that the certify part had no say in, and the first failure ends it.

Source: Angelopoulos et al. 2021, Learn then test; docs/method.md, eq. (9) to (13).
"""

import math
from dataclasses import dataclass

import numpy as np

from dalorra_core.artifact.calibration_record import HIGHER_IS_SURER, Limit, ScoreName
from dalorra_core.calibration.bounds import risk_upper_bound
from dalorra_core.calibration.scores import ScoreTable
from dalorra_core.calibration.threshold_plan import (
    CertifyRequest,
    Procedure,
    candidates,
    check_rows,
    counts_at,
    plan_thresholds,
)

__all__ = ["Certificate", "NoCertificate", "certify", "in_own_unit"]

_LARGEST_SCALE = 64.0
"""Beyond so many times the rows, more labels are no advice."""

_CERTIFY_AND_SELECT = 0.75
"""Part of all calibration rows that the select and certify parts are together."""


@dataclass(frozen=True)
class Certificate:
    """A limit whose selective risk is at most the target, with confidence 1 - delta.

    Attributes:
        limit: Accept answers that pass it.
        risk_upper_bound: The bound at this threshold, at most the target. Only the target is
            certified: the threshold was picked by its bound, which is too low to be a promise.
        in_scope_coverage: Accepted share of the in-scope certify rows.
        n: Rows of the certify part.
        n_out_of_scope: Those of them out of scope.
        n_accepted: In-scope rows accepted.
        n_out_of_scope_accepted: Out-of-scope rows accepted.
        procedure: How the thresholds were tested.
    """

    limit: Limit
    risk_upper_bound: float
    in_scope_coverage: float
    n: int
    n_out_of_scope: int
    n_accepted: int
    n_out_of_scope_accepted: int
    procedure: Procedure


@dataclass(frozen=True)
class NoCertificate:
    """No threshold meets the target with these rows.

    Attributes:
        reason: One sentence for a person.
        more_labels: Rows to add, in scope and out as now, if the error rates stay as they are;
            None when no number would do.
    """

    reason: str
    more_labels: int | None


def certify(
    select: ScoreTable, held: ScoreTable, score: ScoreName, request: CertifyRequest
) -> Certificate | NoCertificate:
    """Return the loosest threshold that can be certified, or why there is none.

    Args:
        select: Rows that plan the test.
        held: Rows that decide; they played no part in the temperature, the score or the plan.
        score: Score to put the threshold on.
        request: Target, delta, out-of-scope share, procedure, label.

    Raises:
        ConfigError: If the score was not measured.
        DataError: If either part has no in-scope row, or pi > 0 and one has none out of scope.
    """
    check_rows(select, request, "select")
    check_rows(held, request, "certify")
    plan = plan_thresholds(select, held, score, request)
    if not len(plan.thresholds):
        return _no_certificate(select, held, score, request)
    counts = counts_at(held, score, plan.thresholds, request.label)
    delta = request.delta
    if request.procedure == "bonferroni":
        delta /= len(plan.thresholds)
    bounds = risk_upper_bound(counts, request.out_of_scope_share, delta, plan.split)
    passed = bounds <= request.target_risk
    if request.procedure == "fixed_sequence":
        passed = np.logical_and.accumulate(passed)
    if not passed.any():
        return _no_certificate(select, held, score, request)
    k = int(np.flatnonzero(passed)[-1])
    return Certificate(
        limit=Limit(score=score, threshold=in_own_unit(score, plan.thresholds[k])),
        risk_upper_bound=float(bounds[k]),
        in_scope_coverage=float(counts.accepted[k] / counts.n),
        n=len(held),
        n_out_of_scope=int(counts.n_outside),
        n_accepted=int(counts.accepted[k]),
        n_out_of_scope_accepted=int(counts.accepted_outside[k]),
        procedure=request.procedure,
    )


def _no_certificate(
    select: ScoreTable, held: ScoreTable, score: ScoreName, request: CertifyRequest
) -> NoCertificate:
    n = len(held)
    reason = (
        f"no threshold on {score} meets selective risk {request.target_risk:g} with confidence "
        f"{1 - request.delta:g} at an out-of-scope share of {request.out_of_scope_share:g} on "
        f"{n} certify rows ({int(held.outside.sum())} out of scope)"
    )
    scale = _rows_needed(held, score, request)
    if scale is None:
        return NoCertificate(f"{reason}; more labels alone would not help", None)
    total = (len(select) + n) / _CERTIFY_AND_SELECT
    more = math.ceil((scale - 1) * total)
    return NoCertificate(f"{reason}; about {more} more labels would, if errors stay as rare", more)


def _rows_needed(held: ScoreTable, score: ScoreName, request: CertifyRequest) -> float | None:
    """Return by which factor the rows must grow for a threshold to pass; None: by no factor.

    The estimate repeats the rates seen at each threshold; a smaller growth than one tenth is not
    told from none.
    """
    counts = counts_at(held, score, candidates(held, score, request), request.label)
    scale = 1.1
    while scale <= _LARGEST_SCALE:
        grown = counts.scaled(counts.n * scale, counts.n_outside * scale)
        if (
            risk_upper_bound(grown, request.out_of_scope_share, request.delta)
            <= request.target_risk
        ).any():
            return scale
        scale *= 1.05
    return None


def in_own_unit(score: ScoreName, threshold: float) -> float:
    """Return a threshold in ``surer`` units in the score's own unit."""
    return float(threshold if HIGHER_IS_SURER[score] else -threshold)
