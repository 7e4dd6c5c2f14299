"""Thresholds with a certificate: Learn then Test on rows that nothing else has looked at.

The select part plans (which thresholds to test, in which order, how delta is split); the certify
part tests. Fixed-sequence testing needs no correction: each threshold is tested at the whole delta,
in an order that the certify part had no say in, and the first failure ends it.

Source: Angelopoulos et al. 2021, Learn then test; docs/method.md, eq. (9) to (13).
"""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from torch import Tensor

from dalorra_core.artifact.calibration_record import HIGHER_IS_SURER, Limit, ScoreName
from dalorra_core.calibration.bounds import (
    Counts,
    Floats,
    risk_upper_bound,
)
from dalorra_core.calibration.scores import ScoreTable, surer
from dalorra_core.errors import ConfigError, DataError

__all__ = [
    "Certificate",
    "CertifyRequest",
    "NoCertificate",
    "Procedure",
    "certify",
    "choose_score",
    "counts_at",
    "fewest_accepted",
    "in_own_unit",
]

Procedure = Literal["fixed_sequence", "bonferroni"]

_GRID = 100
"""Candidate thresholds, at equal steps of the select part's accepted share."""

_BONFERRONI_GRID = 10
"""Fewer candidates, since each one costs its share of delta."""

_SPLITS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
"""Parts of delta tried for the out-of-scope bound, on the select part."""

_LARGEST_SCALE = 64.0
"""Beyond so many times the rows, more labels are no advice."""

_CERTIFY_AND_SELECT = 0.75
"""Part of all calibration rows that the select and certify parts are together."""


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
class Certificate:
    """A limit whose selective risk is at most the target, with confidence 1 - delta.

    Attributes:
        limit: Accept answers that pass it.
        risk_upper_bound: The bound at this threshold, at most the target.
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


@dataclass(frozen=True)
class _Plan:
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
    _check_rows(select, request, "select")
    _check_rows(held, request, "certify")
    plan = _plan(select, held, score, request)
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


def choose_score(select: ScoreTable, held: ScoreTable, request: CertifyRequest) -> ScoreName:
    """Return the score that promises the largest accepted share, judged on the select part alone.

    Of ``held`` only the numbers of rows are used. Where no score promises anything, the one whose
    bound comes nearest to the target.
    """
    _check_rows(select, request, "select")

    def promise(score: ScoreName) -> tuple[float, float]:
        counts, bounds, _ = _expected(select, held, score, request, _grid(select, score, request))
        share = np.where(bounds <= request.target_risk, counts.accepted, 0.0).max(initial=0.0)
        return float(share), -float(bounds.min(initial=1.0))

    return max(select.scores, key=promise)


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


def _grid(select: ScoreTable, score: ScoreName, request: CertifyRequest) -> Floats:
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


def _plan(select: ScoreTable, held: ScoreTable, score: ScoreName, request: CertifyRequest) -> _Plan:
    """Return the thresholds worth testing, from the one with the lowest expected bound on."""
    thresholds = _grid(select, score, request)
    counts, bounds, split = _expected(select, held, score, request, thresholds)
    enough = counts.accepted >= fewest_accepted(request.target_risk, request.delta)
    if not enough.any():
        return _Plan(np.empty(0), split)
    start = int(np.where(enough, bounds, np.inf).argmin())
    chosen = thresholds[start:]
    if request.procedure == "bonferroni":
        hopeful = chosen[bounds[start:] <= request.target_risk]
        chosen = hopeful if len(hopeful) else chosen[:1]
        places = np.linspace(0, len(chosen) - 1, min(_BONFERRONI_GRID, len(chosen)))
        chosen = chosen[places.round().astype(int)]
    return _Plan(chosen, split)


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
    counts = counts_at(held, score, _grid(held, score, request), request.label)
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


def _check_rows(table: ScoreTable, request: CertifyRequest, part: str) -> None:
    outside = int(table.outside.sum())
    if len(table) == outside:
        raise DataError(f"the {part} part has no in-scope row; give more rows")
    if request.out_of_scope_share > 0 and not outside:
        raise DataError(
            f"out_of_scope_share {request.out_of_scope_share:g} needs out-of-scope rows in the "
            f"{part} part, which has none; give more of them, or declare a share of 0"
        )


def in_own_unit(score: ScoreName, threshold: float) -> float:
    """Return a threshold in ``surer`` units in the score's own unit."""
    return float(threshold if HIGHER_IS_SURER[score] else -threshold)
