"""``dalorra calibrate``."""

import hashlib
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, cast, get_args

import torch
import typer

from dalorra_core.artifact.calibration_record import HIGHER_IS_SURER, PlanEvidence
from dalorra_core.artifact.manifest import Manifest, with_plan
from dalorra_core.artifact.store import update_artifact
from dalorra_core.calibration.answered_rows import AnsweredRows
from dalorra_core.calibration.calibrate import (
    CalibrationOutcome,
    CalibrationRequest,
    calibrate,
)
from dalorra_core.calibration.combined import check_fitting
from dalorra_core.calibration.labelled_rows import (
    RowSource,
    content_digest,
    read_labelled_rows,
)
from dalorra_core.calibration.plan_measurement import check_plannable
from dalorra_core.calibration.score_cache import read_scores, write_scores
from dalorra_core.calibration.split import digests
from dalorra_core.calibration.threshold_plan import Procedure
from dalorra_core.calibration.validity import measured_with
from dalorra_core.cli.calibration_plan import chosen_plan, plan_request, show_plan
from dalorra_core.cli.calibration_summary import show_calibration
from dalorra_core.cli.console import errors_as_exit, note, row_progress
from dalorra_core.cli.options import AdapterArgument, BaseOption, DeviceOption, DtypeOption
from dalorra_core.data.collate import EncodedExample
from dalorra_core.data.examples import Example
from dalorra_core.errors import ConfigError, DataError
from dalorra_core.predictive.plan import SamplingPlan, plan_of
from dalorra_core.predictive.predictor import Predictor
from dalorra_core.predictive.scoring import Prediction
from dalorra_core.report.calibration_report import check_plotting, write_report

__all__ = ["calibrate_command"]


def calibrate_command(  # noqa: PLR0913, PLR0917  one parameter per option
    adapter: AdapterArgument,
    data: Annotated[
        list[str],
        typer.Option(
            "--data",
            "-d",
            help="Labelled rows that the adapter was not trained on: directory with <split>.jsonl, "
            ".jsonl file or hub:NAME. Repeatable.",
        ),
    ],
    split: Annotated[str, typer.Option(help="Split of each --data that is no file.")] = (
        "validation"
    ),
    out_of_scope: Annotated[
        list[str] | None,
        typer.Option(
            "--out-of-scope",
            help="Take only the rows with the adapter's out-of-scope label from this .jsonl file. "
            "Repeatable.",
        ),
    ] = None,
    target_risk: Annotated[
        list[float] | None,
        typer.Option(
            help="Share of errors among accepted answers to certify; repeatable "
            "[default: 0.01 0.02 0.05 0.1]."
        ),
    ] = None,
    delta: Annotated[
        float, typer.Option(help="Chance that a certificate is wrong, each by itself.")
    ] = 0.1,
    out_of_scope_share: Annotated[
        float | None,
        typer.Option(
            help="Certificates hold while at most this share of the traffic is out of scope "
            "[default: 0.2 when the data has out-of-scope rows, else 0]."
        ),
    ] = None,
    score: Annotated[
        str,
        typer.Option(
            help="Score of the thresholds: confidence, predictive_entropy, mutual_information, "
            "label_mass, combined, or auto for the most promising one at each target."
        ),
    ] = "auto",
    procedure: Annotated[
        str, typer.Option(help="Test of the thresholds: fixed_sequence or bonferroni.")
    ] = "fixed_sequence",
    per_label: Annotated[
        list[float] | None,
        typer.Option(
            help="Also certify this target for each predicted label by itself; repeatable."
        ),
    ] = None,
    max_abstained: Annotated[
        float,
        typer.Option(help="Largest share of in-scope questions that a policy may abstain from."),
    ] = 0.05,
    alpha: Annotated[
        list[float] | None,
        typer.Option(
            help="Prediction sets hold the right label with 1 - alpha; repeatable [default: 0.1]."
        ),
    ] = None,
    allow_missing_labels: Annotated[  # noqa: FBT002  a command-line flag
        bool,
        typer.Option(
            "--allow-missing-labels", help="Accept data without a row of some of the labels."
        ),
    ] = False,
    plan: Annotated[  # noqa: FBT002
        bool,
        typer.Option(
            "--plan",
            help="First choose M and design: the fewest samples that are as good as ten "
            "independent ones. Without it those that are stored stay.",
        ),
    ] = False,
    plan_rows: Annotated[
        int | None, typer.Option(help="Rows that the plan is measured on [default: 64].")
    ] = None,
    plan_reference: Annotated[
        int | None,
        typer.Option(help="Samples that stand for infinitely many [default: 512]."),
    ] = None,
    plan_packs: Annotated[
        int | None,
        typer.Option(help="Independent sets of every M and design [default: 8]."),
    ] = None,
    scores: Annotated[
        Path | None,
        typer.Option(help="Keep the answers here; read from here when the file exists."),
    ] = None,
    report: Annotated[
        Path | None, typer.Option(help="Write the figures into this directory.")
    ] = None,
    dry_run: Annotated[  # noqa: FBT002
        bool, typer.Option("--dry-run", help="Show everything, write nothing into the adapter.")
    ] = False,
    base: BaseOption = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
) -> None:
    """Certify decisions on labelled rows and write them into the adapter.

    Finds a softmax temperature (kept only if it helps on other rows), a combined score, policies
    whose share of errors among accepted answers is bounded with confidence 1 - delta, prediction
    sets, and the reference profile that drift is measured against. The tensors and so the masks
    and the revision do not change. What a certificate promises and what voids it:
    `docs/calibration.md`.

    **Data.** Rows are divided by a hash of their ids: a quarter fits, a quarter selects, half
    certifies. They must not have trained the adapter, and `dalorra evaluate` refuses them
    afterwards. A target that cannot be certified is a normal result and comes with an estimate of
    the labels it would take.

    **Sampling plan.** `--plan` first measures how far the answers of 2 to 10 samples under every
    design of the method are from those of infinitely many, on rows of the part that fits, and
    takes the fewest that are as good as ten independent ones in the mean probability and in the
    mutual information. Everything else is then certified under that plan, and it is what is served
    when a request does not say otherwise.

    **Example**

    `dalorra calibrate adapters/clinc150 --data data/clinc150
    --out-of-scope data/clinc150/train.jsonl --report report`

    Exit status: 0 done, 1 a setting, the data or the adapter cannot be used, 2 wrong usage.
    """
    with errors_as_exit():
        defaults = CalibrationRequest()
        request = CalibrationRequest(
            target_risks=tuple(target_risk or defaults.target_risks),
            delta=delta,
            out_of_scope_share=out_of_scope_share,
            score=_one_of("score", score, ("auto", *HIGHER_IS_SURER)),
            procedure=_one_of("procedure", procedure, get_args(Procedure)),
            per_label=tuple(per_label or ()),
            max_abstained=max_abstained,
            alphas=tuple(alpha or defaults.alphas),
        )
        asked = plan_request(plan_rows, plan_reference, plan_packs, asked=plan)
        if request.score in ("auto", "combined"):
            check_fitting()
        if report is not None:
            check_plotting()
        predictor = Predictor.load(adapter, base=base, device=device, dtype=dtype)
        if asked is not None:
            check_plannable(predictor)
        sources = [RowSource(spec, split) for spec in data]
        sources += [RowSource(spec, "train", only_out_of_scope=True) for spec in out_of_scope or ()]
        rows = _labelled(predictor, sources, allow_missing=allow_missing_labels)
        now = datetime.now(UTC).isoformat(timespec="seconds")
        evidence = None if asked is None else chosen_plan(predictor, *rows, asked, now)
        new = predictor.manifest if evidence is None else with_plan(predictor.manifest, evidence)
        sampling = plan_of(new.predictive)
        answered = _answered(predictor, sources, rows, sampling, scores)
        here = measured_with(predictor, sampling)
        outcome = calibrate(answered, predictor.labels, here, request, now)
        if evidence is not None:
            show_plan(evidence)
        show_calibration(outcome, predictor.manifest.name, predictor.revision)
        if report is not None:
            for path in write_report(report, outcome, answered, request.delta):
                note(f"wrote {path}")
        if not dry_run:
            _write(adapter, new, outcome, evidence)


def _one_of(setting: str, value: str, allowed: Sequence[str]) -> Any:
    if value not in allowed:
        raise ConfigError(f"{setting} must be one of {', '.join(allowed)}, got {value!r}")
    return cast("Any", value)


_Labelled = tuple[list[Example], list[EncodedExample]]


def _labelled(
    predictor: Predictor, sources: Sequence[RowSource], *, allow_missing: bool
) -> _Labelled:
    """Return the rows of all sources that fit into the adapter's prompt, and the same encoded."""
    examples = read_labelled_rows(
        sources, predictor.manifest.labels, allow_missing_labels=allow_missing
    )
    rows = [predictor.encode(example, truncate="end") for example in examples]
    kept = [i for i, row in enumerate(rows) if not row.truncated]
    if len(kept) < len(rows):
        note(
            f"left out {len(rows) - len(kept)} rows with more than {predictor.max_tokens} tokens: "
            "the server never accepts a truncated question"
        )
    if not kept:
        raise DataError(f"all {len(rows)} rows have more than {predictor.max_tokens} tokens")
    return [examples[i] for i in kept], [rows[i] for i in kept]


def _answered(
    predictor: Predictor,
    sources: Sequence[RowSource],
    labelled: _Labelled,
    sampling: SamplingPlan,
    scores: Path | None,
) -> AnsweredRows:
    examples, rows = labelled
    digest = content_digest(examples)
    choices = [len(predictor.labels) if r.allowed is None else len(r.allowed) for r in rows]
    key = {
        "rows": digest,
        "order of rows": hashlib.sha256("\0".join(e.id for e in examples).encode()).hexdigest(),
        "mask set": predictor.mask_set(sampling),
        "dtype": str(predictor.dtype),
    }
    return AnsweredRows(
        source=" + ".join(_source_name(source) for source in sources),
        digest=digest,
        ids=[example.id for example in examples],
        digests=digests(examples),
        labels=torch.tensor([row.label for row in rows]),
        num_choices=torch.tensor(choices),
        prediction=_prediction(predictor, rows, sampling, key, scores),
    )


def _source_name(source: RowSource) -> str:
    """Return a name without a place on a disk."""
    path = Path(source.spec)
    name = f"{path.name} {source.split}" if path.is_dir() else path.name
    return f"{name} (out of scope)" if source.only_out_of_scope else name


def _prediction(
    predictor: Predictor,
    rows: Sequence[EncodedExample],
    sampling: SamplingPlan,
    key: Mapping[str, str],
    scores: Path | None,
) -> Prediction:
    if scores is not None and scores.exists():
        note(f"reading answers from {scores}")
        return read_scores(scores, key)
    with row_progress("scoring", len(rows)) as advance:
        prediction = predictor.predict(rows, sampling, calibrated=False, on_progress=advance)
    if scores is not None:
        write_scores(scores, prediction, key)
        note(f"wrote {scores}")
    return prediction


def _write(
    adapter: Path, manifest: Manifest, outcome: CalibrationOutcome, evidence: PlanEvidence | None
) -> None:
    if evidence is None and manifest.calibration is not None:
        evidence = manifest.calibration.plan  # of the predictive that stays
    updates = {
        "calibration": outcome.calibration.model_copy(update={"plan": evidence}),
        "policies": outcome.policies,
    }
    void = update_artifact(adapter, manifest.model_copy(update=updates), outcome.content)
    if void:
        note("its signature was of the old calibration and is gone; sign it again: dalorra sign")
    note(f"wrote {adapter}; try: dalorra inspect {adapter}")
