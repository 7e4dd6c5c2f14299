"""The part of ``dalorra calibrate`` that chooses a sampling plan, and how it reads."""

from collections.abc import Sequence

from rich.console import Console

from dalorra_core.artifact.calibration_record import PlanCandidate, PlanEvidence
from dalorra_core.calibration.plan_measurement import (
    find_plan,
    passes_needed,
    plan_rows,
)
from dalorra_core.calibration.sampling_plan import PlanRequest
from dalorra_core.cli.calibration_summary import show_table
from dalorra_core.cli.console import note, row_progress
from dalorra_core.data.collate import EncodedExample
from dalorra_core.data.examples import Example
from dalorra_core.errors import ConfigError
from dalorra_core.predictive.predictor import Predictor

__all__ = ["chosen_plan", "plan_request", "plan_text", "show_plan"]


def plan_request(
    rows: int | None, reference: int | None, packs: int | None, *, asked: bool
) -> PlanRequest | None:
    """Return how much is to be measured; None where no plan is asked for.

    Raises:
        ConfigError: A number is outside its domain, or given without ``--plan``.
    """
    given = {"rows": rows, "reference": reference, "packs": packs}
    values = {name: value for name, value in given.items() if value is not None}
    if asked:
        return PlanRequest(**values)
    if values:
        raise ConfigError(f"plan_{next(iter(values))} has no effect without --plan")
    return None


def chosen_plan(
    predictor: Predictor,
    examples: Sequence[Example],
    rows: Sequence[EncodedExample],
    request: PlanRequest,
    date: str,
) -> PlanEvidence:
    """Measure and return the plan; says what it costs before it begins.

    Args:
        predictor: The adapter, which ``check_plannable`` let through.
        examples: All labelled rows.
        rows: The same, encoded.
        request: How much to measure.
        date: ISO 8601.

    Raises:
        DataError: There are too few rows.
    """
    places = plan_rows([example.id for example in examples], request.rows)
    passes, stored = passes_needed(predictor, request), predictor.sampled_plan
    note(
        f"measuring the plan: {passes} passes over {len(places)} rows, what "
        f"{round(passes * len(places) / stored.num_samples)} answers cost at "
        f"M = {stored.num_samples}"
    )
    with row_progress("measuring", passes * len(places), "row passes") as advance:
        return find_plan(
            predictor,
            [examples[i] for i in places],
            [rows[i] for i in places],
            request,
            date,
            advance,
        )


def plan_text(plan: PlanEvidence) -> str:
    """Return a plan and its evidence as one line."""
    chosen, peer = plan.chosen, plan.peer
    pairs = {
        "mean probability": (chosen.mean_error, peer.mean_error),
        "mutual information": (chosen.information_error, peer.information_error),
    }
    errors = ", ".join(
        f"of the {name} {_number(ours)} (iid M = {peer.num_samples}: {_number(theirs)})"
        for name, (ours, theirs) in pairs.items()
    )
    what = f"M = {plan.num_samples}, {plan.design}"
    if plan.estimator == "linearised":
        what = f"linearised, {plan.num_samples} draws"
    return (
        f"{what}: squared error {errors}; {plan.n} rows "
        f"({plan.n_out_of_scope} out of scope), {plan.packs} packs against {plan.reference} "
        f"samples, {plan.date[:10]}"
    )


def show_plan(plan: PlanEvidence) -> None:
    """Print every candidate with its errors, and the choice, on stdout."""
    out = Console(soft_wrap=True, highlight=False, markup=False)
    show_table("sampling plan: squared errors (standard error)", [_row(c) for c in plan.candidates])
    out.print(f"plan: {plan_text(plan)}")
    if plan.reference_auroc is not None:
        out.print(
            f"out-of-scope AUROC by mutual information of the reference: {plan.reference_auroc:.4f}"
        )
    cheapest = _cheapest_by_mean(plan)
    if plan.estimator == "monte_carlo" and cheapest.num_samples < plan.num_samples:
        out.print(
            f"note: for the mean probability alone M = {cheapest.num_samples}, {cheapest.design} "
            "would do; its mutual information is not good enough"
        )


def _cheapest_by_mean(plan: PlanEvidence) -> PlanCandidate:
    sampled = [c for c in plan.candidates if c.estimator == "monte_carlo"]
    enough = [c for c in sampled if c.mean_excess is not None and c.mean_excess <= 0]
    return min((*enough, plan.peer), key=lambda c: (c.num_samples, c.mean_error))


def _row(c: PlanCandidate) -> dict[str, str]:
    return {
        "samples": f"{c.design} {c.num_samples}" if c.estimator == "monte_carlo" else c.estimator,
        "mean probability": _with_error(c.mean_error, c.mean_error_se),
        "mutual information": _with_error(c.information_error, c.information_error_se),
        "AUROC": "-" if c.out_of_scope_auroc is None else f"{c.out_of_scope_auroc:.4f}",
        "good enough": "yes" if c.good_enough else "no",
    }


def _with_error(value: float | None, error: float | None) -> str:
    return "-" if value is None or error is None else f"{value:.2e} ({error:.1e})"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"
