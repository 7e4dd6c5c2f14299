"""Draw and run the samples that a sampling plan is chosen by."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from dalorra_core import __version__
from dalorra_core.artifact.calibration_record import PlanEvidence
from dalorra_core.calibration.estimator_errors import reference_answers
from dalorra_core.calibration.labelled_rows import content_digest
from dalorra_core.calibration.sampling_plan import (
    LEVEL,
    PEER,
    SIZES,
    LinearisedAnswers,
    Option,
    PlanRequest,
    choose_plan,
    mean_mask_row,
)
from dalorra_core.calibration.split import PARTS, part_of
from dalorra_core.config import Design
from dalorra_core.data.collate import EncodedExample
from dalorra_core.data.examples import Example
from dalorra_core.errors import ConfigError, DataError
from dalorra_core.metrics.uncertainty import mean_probs
from dalorra_core.predictive.predictor import Predictor, SamplingPlan

__all__ = [
    "MeasuredAnswers",
    "check_plannable",
    "find_plan",
    "measure_answers",
    "passes_needed",
    "plan_rows",
]

_IN_ONE_PACK = 64
"""Samples of the reference that are drawn together: all of them would take much memory at once."""

_SHARE_OF_ROWS = 0.25

Progress = Callable[[int], None]


@dataclass(frozen=True, eq=False)
class MeasuredAnswers:
    """Answers without temperature, natural logarithms.

    Attributes:
        reference: K independent samples, (K, B, C).
        packs: R packs of every option that is not ``iid``, (R, M, B, C).
        mean_mask: Of the deterministic pass, (1, B, C).
        linearised: R sets of draws of the linearised network; None where there is none.
    """

    reference: Float[Tensor, "K B C"]
    packs: dict[Option, Tensor]
    mean_mask: Float[Tensor, "one B C"]
    linearised: LinearisedAnswers | None = None


def check_plannable(predictor: Predictor) -> None:
    """Refuse an adapter whose samples leave nothing to choose.

    Raises:
        ConfigError: Naming the method and why.
    """
    method = predictor.method.name
    if predictor.point_method:
        why = "it does not sample"
    elif predictor.fixed_functions is not None:
        why = f"it has {predictor.fixed_functions} functions, and all of them answer"
    elif predictor.method.logit_covariance is not None:
        why = "its samples cost no pass, so fewer of them save nothing"
    elif predictor.designs == ("iid",):
        why = "it draws iid samples only, and of those no fewer are as good"
    else:
        return
    raise ConfigError(f"there is no sampling plan to choose for method {method}: {why}")


def plan_rows(ids: Sequence[str], count: int) -> list[int]:
    """Return the places of the rows that a plan is measured on.

    They are of the part that fits, so that neither what selects nor what certifies was looked at,
    and those whose ids have the smallest hashes, so that the order of the rows does not matter.

    Args:
        ids: Of all rows.
        count: How many are wanted.

    Raises:
        DataError: The part has fewer.
    """
    fit = [i for i, row_id in enumerate(ids) if part_of(row_id) == PARTS.index("fit")]
    if len(fit) < count:
        enough = round(count / _SHARE_OF_ROWS * 1.5)  # parts are drawn by hash: some slack
        raise DataError(
            f"a plan on {count} rows needs as many in the fit part, got {len(fit)} of {len(ids)} "
            f"rows; about {enough} rows are enough for this, or lower plan_rows"
        )
    return sorted(fit, key=lambda i: hashlib.sha256(ids[i].encode()).digest())[:count]


def passes_needed(predictor: Predictor, request: PlanRequest) -> int:
    """Return how many passes each row takes; a backward one counts as much as one forward."""
    per_pack = sum(sum(_drawn_sizes(design)) for design in predictor.designs)
    if "linearised" in predictor.estimators:
        per_pack += predictor.passes(SamplingPlan(estimator="linearised"))
    return request.reference + request.packs * per_pack + 1


def measure_answers(
    predictor: Predictor,
    rows: Sequence[EncodedExample],
    request: PlanRequest,
    on_progress: Progress = lambda _: None,
) -> MeasuredAnswers:
    """Return the answers of reference, packs and deterministic pass.

    Their seeds come from the names "reference" and "pack" with a number, so that they are
    independent of each other and of the served set, and the same whenever they are measured again.

    Args:
        predictor: The adapter.
        rows: B encoded rows.
        request: How much.
        on_progress: Called with the number of row passes finished since the last call.

    Raises:
        DataError: An answer is not a number.
    """

    def answers(plan: SamplingPlan) -> Tensor:
        passes = predictor.passes(plan)
        found = predictor.predict(
            rows,
            plan,
            label_mass=False,
            calibrated=False,
            on_progress=lambda count: on_progress(count * passes),
        ).log_probs
        _check_numbers(found, rows)
        return found

    reference = torch.cat(
        [answers(plan) for plan in _reference_plans(request.reference, predictor.max_num_samples)]
    )
    packs: dict[Option, Tensor] = {}
    for design in predictor.designs:
        for size in _drawn_sizes(design):
            drawn = torch.stack(
                [
                    answers(SamplingPlan(size, _seed("pack", r), "monte_carlo", design))
                    for r in range(request.packs)
                ]
            )
            # what has no set of its own for each M is the beginning of the largest
            sizes = (size,) if design == "stratified" else SIZES
            packs |= {(design, m): drawn[:, :m] for m in sizes}
    linearised = None
    if "linearised" in predictor.estimators:
        plans = [
            SamplingPlan(seed=_seed("linearised", r), estimator="linearised")
            for r in range(request.packs)
        ]
        drawn = torch.stack([answers(plan) for plan in plans])
        linearised = LinearisedAnswers(drawn, predictor.passes(plans[0]))
    mean_mask = answers(SamplingPlan(estimator="mean_mask"))
    return MeasuredAnswers(reference, packs, mean_mask, linearised)


def find_plan(
    predictor: Predictor,
    examples: Sequence[Example],
    rows: Sequence[EncodedExample],
    request: PlanRequest,
    date: str,
    on_progress: Progress = lambda _: None,
) -> PlanEvidence:
    """Measure every option on some held-out rows and return the choice with its evidence.

    Args:
        predictor: The adapter.
        examples: The rows to measure on.
        rows: The same, encoded.
        request: How much.
        date: ISO 8601, for the receipt.
        on_progress: See ``measure_answers``.

    Raises:
        DataError: An answer is not a number.
    """
    found = measure_answers(predictor, rows, request, on_progress)
    reference = reference_answers(found.reference)
    outside = torch.tensor([row.label < 0 for row in rows])
    choice = choose_plan(found.reference, found.packs, outside, found.linearised)
    deterministic = mean_mask_row(reference, mean_probs(found.mean_mask))
    return PlanEvidence(
        date=date,
        dalorra=__version__,
        estimator=choice.estimator,
        design=choice.option[0],
        num_samples=choice.option[1],
        digest=content_digest(examples),
        n=len(rows),
        n_out_of_scope=int(outside.sum()),
        reference=request.reference,
        packs=request.packs,
        level=LEVEL,
        peer_num_samples=PEER[1],
        reference_auroc=choice.reference_auroc,
        dtype=str(predictor.dtype).removeprefix("torch."),
        candidates=(deterministic, *choice.candidates),
    )


def _drawn_sizes(design: Design) -> tuple[int, ...]:
    """Return the sizes that need packs of their own; iid sets are taken from the reference."""
    return {"iid": (), "stratified": SIZES, "antithetic": (max(SIZES),)}[design]


def _reference_plans(samples: int, most: int | None) -> Iterator[SamplingPlan]:
    """Yield plans of independent samples that are ``samples`` together."""
    size = min(_IN_ONE_PACK, most or _IN_ONE_PACK)
    for number, start in enumerate(range(0, samples, size)):
        yield SamplingPlan(min(size, samples - start), _seed("reference", number))


def _seed(*name: str | int) -> int:
    """Return a seed of 63 bits; a served set has it by a chance that never comes."""
    text = "|".join(map(str, ("plan", *name)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def _check_numbers(log_probs: Tensor, rows: Sequence[EncodedExample]) -> None:
    broken = log_probs.isnan().any(0).any(-1)
    if bool(broken.any()):
        first = rows[int(broken.nonzero()[0])].id
        raise DataError(f"the model's answer to row {first!r} is not a number")
