"""``dalorra evaluate``."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from safetensors.torch import save_file

from dalorra_core.artifact.calibration_record import MeasuredWith, Policy
from dalorra_core.calibration.decisions import scores_behind, scores_needed
from dalorra_core.calibration.scores import score_table
from dalorra_core.calibration.split import overlap
from dalorra_core.calibration.stored_rows import StoredRows
from dalorra_core.calibration.validity import measured_with, void_reason
from dalorra_core.cli.console import errors_as_exit, note, row_progress
from dalorra_core.cli.options import (
    AdapterArgument,
    BaseOption,
    DesignOption,
    DeviceOption,
    DtypeOption,
    EstimatorOption,
    SamplesOption,
    SeedOption,
    plan_from,
)
from dalorra_core.data.collate import EncodedExample
from dalorra_core.data.examples import Example, gold_label
from dalorra_core.data.readers import read_source
from dalorra_core.errors import ConfigError, DataError
from dalorra_core.metrics.uncertainty import summarise
from dalorra_core.predictive.predictor import Predictor, SamplingPlan
from dalorra_core.predictive.scoring import Prediction
from dalorra_core.training.decisions import decision_table
from dalorra_core.training.evaluation import evaluate

__all__ = ["evaluate_command"]

_SCORES = (
    "confidence",
    "confidence_std",
    "predictive_entropy",
    "expected_entropy",
    "mutual_information",
    "variation_ratio",
)


def evaluate_command(  # noqa: PLR0913, PLR0917  one parameter per option
    adapter: AdapterArgument,
    data: Annotated[
        str,
        typer.Option("--data", "-d", help="Directory with <split>.jsonl, .jsonl file or hub:NAME."),
    ],
    split: Annotated[str, typer.Option(help="Split to score.")] = "test",
    num_samples: SamplesOption = None,
    seed: SeedOption = None,
    estimator: EstimatorOption = None,
    design: DesignOption = None,
    resamples: Annotated[
        int, typer.Option(min=0, help="Bootstrap resamples for 95 % intervals; 0 leaves them out.")
    ] = 1000,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write the report as JSON here.")
    ] = None,
    scores: Annotated[
        Path | None,
        typer.Option(help="Write each row's label, mean probabilities and scores as safetensors."),
    ] = None,
    allow_calibration_rows: Annotated[  # noqa: FBT002  a command-line flag
        bool,
        typer.Option(
            "--allow-calibration-rows",
            help="Score rows that calibrated the adapter too; the result flatters it.",
        ),
    ] = False,
    base: BaseOption = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
) -> None:
    """Score labelled rows with the predictive that the server would use.

    Prints accuracy, NLL, ECE (15 bins, with the ECE that a perfectly calibrated model would show
    on as many rows), Brier score, AURC and AUGRC over the in-scope rows; the AUROC with which
    confidence, predictive entropy and mutual information find errors and out-of-scope rows; and
    what each of the adapter's policies decides, beside the risk it was certified for (with other
    sampling or precision than it was certified with, there is no certificate). Shares and
    risks are at the data's own share of out-of-scope rows; a certificate speaks of traffic with at
    most its own. Intervals are 95 % bootstrap over rows: they know nothing of training noise. A
    method with gates also has their mean entropy, in and out of scope: equal unless the gates look
    at the question.

    Rows with the adapter's out-of-scope label test rejection. Any other unknown label is an error,
    and so are rows that calibrated the adapter.

    **Examples**

    `dalorra evaluate adapters/clinc150 --data data/clinc150 --output report.json`

    `dalorra evaluate adapters/clinc150 --data data/clinc150 --estimator mean_mask`

    `dalorra evaluate adapters/clinc150 --data data/clinc150 -M 4 --design stratified`

    Exit status: 0 done, 1 the adapter or the data cannot be used, 2 wrong usage.
    """
    with errors_as_exit():
        predictor = Predictor.load(adapter, base=base, device=device, dtype=dtype)
        plan = plan_from(predictor, num_samples, seed, estimator, design)
        rows = _rows(predictor, data, split, allow_calibration_rows=allow_calibration_rows)
        with row_progress("scoring", len(rows)) as advance:
            prediction = predictor.predict(rows, plan, on_progress=advance)
        labels = torch.tensor([row.label for row in rows])
        report = evaluate(
            prediction.log_probs,
            labels,
            bootstrap_seed=0 if resamples else None,
            num_resamples=resamples,
        )
        result: dict[str, Any] = {
            "adapter": predictor.manifest.name,
            "revision": predictor.revision,
            "method": predictor.manifest.method.name,
            "split": split,
            "num_samples": predictor.num_functions(plan),
            "seed": plan.seed,
            "estimator": plan.estimator,
            "design": plan.design,
            "mask_set": predictor.mask_set(plan),
            "dtype": str(predictor.dtype).removeprefix("torch."),
            "temperature": predictor.temperature,
            "out_of_scope_share": float((labels < 0).double().mean()),
            "truncated_rows": sum(row.truncated for row in rows),
            **report.to_json(),
            "gate_entropy": _gate_entropy(predictor, rows, labels),
            "policies": _policies(predictor, plan, prediction, rows),
        }
        _show(result)
        if output is not None:
            output.parent.mkdir(parents=True, exist_ok=True)
            output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        if scores is not None:
            _save_scores(scores, prediction, labels, measured_with(predictor, plan))


def _gate_entropy(
    predictor: Predictor, rows: Sequence[EncodedExample], labels: torch.Tensor
) -> dict[str, float] | None:
    """Return the mean entropy of the gates in and out of scope, in nats; None without gates."""
    found = predictor.gate_entropy(rows)
    if found is None:
        return None
    parts = {"in_scope": found[labels >= 0], "out_of_scope": found[labels < 0]}
    return {name: float(part.mean()) for name, part in parts.items() if len(part)}


def _policies(
    predictor: Predictor,
    plan: SamplingPlan,
    prediction: Prediction,
    rows: Sequence[EncodedExample],
) -> list[dict[str, str | float | None]]:
    """Return what each policy decides; one that needs a score not measured here is named.

    A certificate is left out where it is about another predictive than these answers; ``void``
    says what differs.
    """
    labels = torch.tensor([row.label for row in rows])
    truncated = torch.tensor([row.truncated for row in rows])
    here = measured_with(predictor, plan)
    table = score_table(prediction, labels)
    if predictor.combined is not None and scores_behind(predictor.combined) <= set(table.scores):
        table = score_table(prediction, labels, predictor.combined)
    tables = []
    for policy in predictor.manifest.policies:
        missing = scores_needed(policy) - set(table.scores)
        if missing:
            note(f"policy {policy.name} is left out: {', '.join(sorted(missing))} not measured")
        else:
            void = _void(policy, here, point_method=predictor.point_method)
            if void is not None:
                policy = policy.model_copy(update={"guarantee": None})  # noqa: PLW2901
            found = decision_table(table, policy, predictor.labels, truncated=truncated)
            tables.append({**found, "void": void})
    return tables


def _void(policy: Policy, here: MeasuredWith, *, point_method: bool) -> str | None:
    if policy.guarantee is None:
        return None
    return void_reason(policy.guarantee.measured_with, here, point_method=point_method)


def _refuse_calibration_rows(predictor: Predictor, examples: Sequence[Example]) -> None:
    """Rows that chose the thresholds say nothing about how good the thresholds are."""
    stored = predictor.artifact.calibration_scores
    if stored is None:
        return
    seen = overlap(examples, StoredRows.from_tensors(stored).digest)
    if seen:
        raise DataError(
            f"{len(seen)} of {len(examples)} rows calibrated this adapter, the first is "
            f"{seen[0]!r}; an evaluation on them flatters it. Use other rows, or pass "
            "--allow-calibration-rows"
        )


def _rows(
    predictor: Predictor, data: str, split: str, *, allow_calibration_rows: bool
) -> list[EncodedExample]:
    outside = predictor.manifest.labels.out_of_scope_label
    known = {*predictor.labels, outside}
    examples = read_source(data, split)
    for example in examples:
        if gold_label(example) not in known:
            raise DataError(
                f"{data} split {split}, row {example.id!r}: field label: {gold_label(example)!r} "
                f"is none of the adapter's {len(predictor.labels)} labels"
                + (f" nor its out-of-scope label {outside!r}" if outside else "")
            )
    if not examples:
        raise ConfigError(f"{data} split {split} has no rows")
    if not allow_calibration_rows:
        _refuse_calibration_rows(predictor, examples)
    return [predictor.encode(example, truncate="end") for example in examples]


def _save_scores(
    path: Path, prediction: Prediction, labels: torch.Tensor, here: MeasuredWith
) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    summary = summarise(prediction.log_probs)
    tensors = {
        "labels": labels.to(torch.int16),
        "predicted": summary.predicted.to(torch.int16),
        "mean_probs": summary.mean_probs.half(),  # the statistics below are from full precision
        **{name: getattr(summary, name).float() for name in _SCORES},
    }
    if prediction.label_mass is not None:
        tensors["label_mass"] = prediction.label_mass
    found = {name: value.contiguous() for name, value in tensors.items()}
    save_file(found, path, {"measured_with": here.model_dump_json()})
    note(f"wrote {path}")


def _show(result: dict[str, Any]) -> None:
    typer.echo(
        f"{result['adapter']} ({result['method']}, revision {result['revision']}), split "
        f"{result['split']}: {result['num_in_scope']} in scope, {result['num_out_of_scope']} out; "
        f"{result['estimator']}, M = {result['num_samples']}, seed {result['seed']}, "
        f"temperature {result['temperature']:.4f}"
    )
    if result["truncated_rows"]:
        typer.echo(f"  {result['truncated_rows']} rows were too long and cut at their end")
    floor, spread = result["ece_noise_floor"]
    for name, estimate in result["metrics"].items():
        value = estimate["value"]
        line = f"  {name:<32} {'undefined' if value is None else f'{value:.4f}'}"
        if estimate["low"] is not None:
            line += f"  [{estimate['low']:.4f}, {estimate['high']:.4f}]"
        if name == "ece":
            line += f"  (perfectly calibrated: {floor:.4f} +- {spread:.4f})"
        typer.echo(line)
    for name, value in (result["gate_entropy"] or {}).items():
        typer.echo(f"  {'gate_entropy_' + name:<32} {value:.4f}")
    _show_policies(result)


def _show_policies(result: dict[str, Any]) -> None:
    for policy in result["policies"]:
        target, share = policy["target_risk"], policy["certified_out_of_scope_share"]
        promise = "no certificate"
        if policy["void"] is not None:
            promise += f" here: {policy['void']}"
        elif target is not None:
            promise = (
                f"certified: risk <= {target:g} at <= {share:g} out of scope; here "
                f"{result['out_of_scope_share']:.4f} is"
            )
        typer.echo(f"  policy {policy['policy']} ({promise}):")
        for name, value in policy.items():
            if name not in ("policy", "target_risk", "certified_out_of_scope_share", "void"):
                shown = "undefined" if value is None else f"{value:.4f}"
                typer.echo(f"    {name:<30} {shown}")
