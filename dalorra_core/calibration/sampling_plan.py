"""The cheapest M and design whose answers are as good as those of ten independent samples.

Values in, values out; ``plan_measurement`` draws and runs the samples.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from dalorra_core.artifact.calibration_record import PlanCandidate
from dalorra_core.calibration.estimator_errors import (
    ReferenceAnswers,
    SquaredErrors,
    errors_within,
    estimate,
    excess_bound,
    reference_answers,
    squared_errors,
    squared_mean_errors,
)
from dalorra_core.config import Design, Estimator
from dalorra_core.errors import ConfigError
from dalorra_core.metrics.selective import auroc
from dalorra_core.metrics.uncertainty import mutual_information

__all__ = [
    "AUROC_SLACK",
    "FEWEST_OF_A_KIND",
    "FEWEST_REFERENCE",
    "LEVEL",
    "PEER",
    "SIZES",
    "LinearisedAnswers",
    "Option",
    "PlanChoice",
    "PlanRequest",
    "choose_plan",
    "mean_mask_row",
]

Option = tuple[Design, int]
"""A design and M."""

PEER: Option = ("iid", 10)
"""What a plan must not be worse than: the default of an adapter without a plan."""

SIZES = tuple(range(2, PEER[1] + 1))
"""Every M that is tried under every design; 1 has no mutual information."""

LEVEL = 0.95
"""Confidence of each bound on what an option is worse by than the peer."""

AUROC_SLACK = 0.005
"""What the AUROC of the mutual information may be below the lesser of the reference's and the
peer's: where few samples cost the peer more than this, another need not be better than the peer."""

FEWEST_OF_A_KIND = 8
"""Rows in scope and out of scope without which that AUROC says nothing."""

FEWEST_ROWS = 8
FEWEST_PACKS = 8

FEWEST_REFERENCE = 64
"""Samples of a reference: six sets of the peer, each judged by more than fifty others."""


@dataclass(frozen=True)
class PlanRequest:
    """How much is measured for a plan.

    Attributes:
        rows: n held-out rows.
        reference: K independent samples that stand for infinitely many.
        packs: R packs of every option that is not ``iid``; those are among the K.
    """

    rows: int = 64
    reference: int = 512
    packs: int = 8

    def __post_init__(self) -> None:
        """Refuse what would tell nothing."""
        least = {"rows": FEWEST_ROWS, "reference": FEWEST_REFERENCE, "packs": FEWEST_PACKS}
        for name, needed in least.items():
            if getattr(self, name) < needed:
                raise ConfigError(
                    f"plan_{name} must be at least {needed}, got {getattr(self, name)}"
                )


@dataclass(frozen=True, eq=False)
class LinearisedAnswers:
    """What the network linearised in its gates answers, and what that costs.

    Attributes:
        log_probs: R sets of K draws, (R, K, B, C).
        passes: Of a row: a forward one, and a backward one for each label.
    """

    log_probs: Float[Tensor, "R K B C"]
    passes: int


@dataclass(frozen=True)
class PlanChoice:
    """What was chosen, and all that could have been.

    Attributes:
        estimator: Samples of the network, or draws of the linearised one.
        option: Design and M; of draws of the linearised network iid and K.
        candidates: Errors of every option, the ``iid`` ones and so the peer first.
        reference_auroc: AUROC of the reference's mutual information, out of scope against in
            scope; None with too few rows of either kind.
    """

    estimator: Literal["monte_carlo", "linearised"]
    option: Option
    candidates: tuple[PlanCandidate, ...]
    reference_auroc: float | None


def choose_plan(
    reference: Float[Tensor, "K B C"],
    packs: Mapping[Option, Float[Tensor, "R M B C"]],
    outside: Bool[Tensor, " B"],
    linearised: LinearisedAnswers | None = None,
) -> PlanChoice:
    """Return the option with the fewest passes that is as good as the peer.

    As good means three things: the upper bounds on what its squared errors are above the peer's
    are at most zero, for the mean probability and for the mutual information alike, and where
    there are rows out of scope its mutual information tells them apart as the reference's does, or
    as the peer's does, to within ``AUROC_SLACK``. What cannot be told apart from worse is therefore
    not chosen. The peer itself always may be. Of equally many passes the smaller error of the mean
    probability wins, of equal ones the first.

    Args:
        reference: K independent samples, log-probabilities; the ``iid`` options, the peer among
            them, are judged by parts of it.
        packs: R packs of every other option, independent of the reference.
        outside: Rows that are out of scope.
        linearised: One more candidate, where the adapter has it.

    Raises:
        ConfigError: There are fewer than ``FEWEST_REFERENCE`` samples, or 2 packs or rows.

    Source:
        docs/method.md, eq. (J6) to (J8); docs/decisions/0022-sampling-plan.md.
    """
    _check_shapes(reference, packs)
    answers = reference_answers(reference)
    enough = min(int(outside.sum()), int((~outside).sum())) >= FEWEST_OF_A_KIND
    goal = _auroc(answers.information[None], outside) if enough else None
    errors: dict[Option, SquaredErrors] = {
        ("iid", m): found for m, found in errors_within(reference, SIZES).items()
    }
    errors |= {option: squared_errors(answers, found) for option, found in packs.items()}
    drawn = {**_iid_sets(reference), **packs}
    aurocs = {o: _auroc(_information(drawn[o]), outside) if enough else None for o in errors}
    limit = None if goal is None else min(goal, aurocs[PEER] or 0.0) - AUROC_SLACK
    candidates = [
        _candidate(option, found, errors[PEER], aurocs[option], limit)
        for option, found in errors.items()
    ]
    priced = [(candidate.num_samples, candidate) for candidate in candidates]
    if linearised is not None:
        sets = linearised.log_probs
        found = _candidate(
            ("iid", sets.shape[1]),
            squared_errors(answers, sets),
            errors[PEER],
            _auroc(_information(sets), outside) if enough else None,
            limit,
            estimator="linearised",
        )
        priced.append((linearised.passes, found))
    _, best = min(
        (pair for pair in priced if pair[1].good_enough),
        key=lambda pair: (pair[0], pair[1].mean_error),
    )
    return PlanChoice(
        "linearised" if best.estimator == "linearised" else "monte_carlo",
        (best.design, best.num_samples),
        tuple(candidate for _, candidate in priced),
        None if goal is None else _short(goal),
    )


def _check_shapes(
    reference: Float[Tensor, "K B C"], packs: Mapping[Option, Float[Tensor, "R M B C"]]
) -> None:
    if len(reference) < FEWEST_REFERENCE:
        raise ConfigError(
            f"a reference needs at least {FEWEST_REFERENCE} samples, got {len(reference)}"
        )
    if min([reference.shape[1], *(len(found) for found in packs.values())]) < 2:  # noqa: PLR2004
        raise ConfigError("a plan needs at least 2 rows, and 2 packs of every option")


def _iid_sets(reference: Float[Tensor, "K B C"]) -> dict[Option, Float[Tensor, "R M B C"]]:
    """Return the sets that ``errors_within`` judges."""
    largest = max(SIZES)
    whole = len(reference) // largest * largest
    groups = reference[:whole].unflatten(0, (-1, largest))
    return {("iid", m): groups[:, :m] for m in SIZES}


def mean_mask_row(reference: ReferenceAnswers, probs: Float[Tensor, "B C"]) -> PlanCandidate:
    """Return the errors of the deterministic pass, which has no mutual information.

    Args:
        reference: Of independent samples.
        probs: The pass's probabilities, shape (B, C).
    """
    found = estimate(squared_mean_errors(reference, probs[None]))
    return PlanCandidate(
        estimator="mean_mask",
        design="iid",
        num_samples=1,
        mean_error=_short(found.value),
        mean_error_se=_short(found.standard_error),
    )


def _candidate(
    option: Option,
    errors: SquaredErrors,
    peer: SquaredErrors,
    found_auroc: float | None,
    least_auroc: float | None,
    estimator: Estimator = "monte_carlo",
) -> PlanCandidate:
    mean, information = estimate(errors.mean), estimate(errors.information)
    excesses = (
        excess_bound(errors.mean, peer.mean, LEVEL),
        excess_bound(errors.information, peer.information, LEVEL),
    )
    tells_apart = least_auroc is None or found_auroc is None or found_auroc >= least_auroc
    return PlanCandidate(
        estimator=estimator,
        design=option[0],
        num_samples=option[1],
        mean_error=_short(mean.value),
        mean_error_se=_short(mean.standard_error),
        information_error=_short(information.value),
        information_error_se=_short(information.standard_error),
        mean_excess=_short(excesses[0]),
        information_excess=_short(excesses[1]),
        out_of_scope_auroc=None if found_auroc is None else _short(found_auroc),
        good_enough=(estimator, option) == ("monte_carlo", PEER)
        or (max(excesses) <= 0.0 and tells_apart),
    )


def _information(packs: Float[Tensor, "R M B C"]) -> Float[Tensor, "R B"]:
    return torch.stack([mutual_information(pack) for pack in packs])


def _auroc(information: Float[Tensor, "R B"], outside: Bool[Tensor, " B"]) -> float:
    """Return the AUROC of each pack, averaged: packs are served one at a time."""
    found: Sequence[float] = [auroc(each[outside], each[~outside]) for each in information]
    return sum(found) / len(found)


def _short(value: float) -> float:
    """Return what is known of a value: equal sets of samples differ in the last digits only."""
    return float(f"{value:.4g}")
