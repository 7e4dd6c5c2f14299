"""One run: train it, load what was stored with the code that serves, score it, write it down."""

import platform
import shutil
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from dalorra_core import __version__
from dalorra_core.adapters.inject import TargetSpec
from dalorra_core.adapters.state import factor_shapes
from dalorra_core.artifact.manifest import Manifest
from dalorra_core.artifact.placing import put_back
from dalorra_core.artifact.store import Artifact, load_artifact
from dalorra_core.bench.bases import Bases
from dalorra_core.bench.keys import IN, Job, Wanted, spaced
from dalorra_core.bench.store import (
    SCORES,
    Evaluation,
    Interval,
    Record,
    Scores,
    TemperatureOfRun,
    hold,
    read_record,
    run_directory,
    with_sound_scores,
    write_record,
    write_scores,
)
from dalorra_core.calibration.temperature import fit_temperature
from dalorra_core.data.collate import EncodedExample
from dalorra_core.errors import ArtifactError, DalorraError, DataError
from dalorra_core.methods import METHODS
from dalorra_core.metrics.bootstrap import bootstrap_interval
from dalorra_core.metrics.calibration import nll
from dalorra_core.metrics.selective import auroc
from dalorra_core.metrics.uncertainty import log_mean_probs, summarise
from dalorra_core.predictive.predictor import Predictor, SamplingPlan
from dalorra_core.predictive.stem import kept_stem_states
from dalorra_core.predictive.tempering import temper
from dalorra_core.training.evaluation import evaluate, json_number, out_of_scope_scores
from dalorra_core.training.prepare import TrainingData, evaluation_rows, prepare_training_data
from dalorra_core.training.run import run_training
from dalorra_core.training.settings import TrainConfig

__all__ = ["LOG_FILE", "TRAINING", "attempt", "is_finished", "write_failure"]

TRAINING = "training"
"""Folder of a run's checkpoints and training log."""

LOG_FILE = "log.txt"

_ERROR_CHARACTERS = 2000


def is_finished(job: Job, record: Record | None) -> bool:
    """Return whether a record has all that the grid wants of a run."""
    return (
        record is not None
        and record.train_nll_rows == _train_nll_rows(job)
        and {one.id for one in job.wanted} <= {one.id for one in record.evaluations}
    )


def attempt(job: Job, out: Path, bases: Bases, say: Callable[[str], None]) -> Record:
    """Do what is left of a run and return its record, which says so when the run fails.

    Args:
        job: The run.
        out: Directory of the bench.
        bases: The base models of this process.
        say: Takes lines on what happens.
    """
    directory = run_directory(out, job.key)
    with hold(directory, wait=True):  # a killed bench's last worker may take a moment to leave
        before = _record_so_far(job, out, say)
        try:
            record = _run(job, directory, before, bases, say)
        except Exception as error:  # noqa: BLE001  the other runs go on, whatever this one died of
            record = _failed(before, _logged(error, directory))
        write_record(out, record)
    return record


def _logged(error: Exception, directory: Path) -> str:
    """Write the traceback of what is being handled to the run's log and return its last line."""
    with (directory / LOG_FILE).open("a", encoding="utf-8") as log:
        log.write(traceback.format_exc())
    return f"{type(error).__name__}: {error}"


def write_failure(job: Job, out: Path, error: str) -> Record:
    """Write down that a run failed whose process cannot say so any more."""
    with hold(run_directory(out, job.key), wait=True):
        record = _failed(_record_so_far(job, out, lambda _: None), error)
        write_record(out, record)
    return record


def _failed(before: Record, error: str) -> Record:
    return before.model_copy(update={"status": "failed", "error": error[:_ERROR_CHARACTERS]})


def _record_so_far(job: Job, out: Path, say: Callable[[str], None]) -> Record:
    """Return what can be used of the stored record, an empty one when there is none."""
    try:
        found = read_record(out, job.key)
    except DataError as error:
        say(f"{error}; made anew from the adapter")
        found = None
    if found is not None:
        sound, faults = with_sound_scores(out, found)
        for fault in faults:
            say(f"{fault}; scored again")
        return sound
    cell = job.cell
    return Record(
        key=job.key,
        label=cell.label,
        task=cell.task,
        seed=cell.seed,
        status="failed",
        settings=_settings(cell.config),
        sizes=job.sizes,
    )


def _run(
    job: Job, directory: Path, before: Record, bases: Bases, say: Callable[[str], None]
) -> Record:
    config = job.cell.config
    artifact = _trained(job, directory, bases, say)
    before = _of_this_adapter(before, artifact.sha256, say)
    say("loading the stored adapter")
    base = bases.to_serve(config)
    predictor = Predictor.on(base, artifact)
    data = prepare_training_data(config.data, base.tokenizer)
    scoring = _Scoring(job, directory, predictor, base.tokenizer, data, say)
    faults: list[str] = []
    train_nll, train_nll_rows = before.train_nll, before.train_nll_rows
    if train_nll is None or train_nll_rows != _train_nll_rows(job):
        train_nll, train_nll_rows = None, 0
        try:
            train_nll, train_nll_rows = scoring.train_nll(), _train_nll_rows(job)
        except Exception as error:  # noqa: BLE001  evaluations do not depend on it
            faults.append(_logged(error, directory))
    known = {one.id for one in before.evaluations}
    new: list[Evaluation] = []
    for one in job.wanted:
        if one.id in known:
            continue
        try:
            new.append(scoring.evaluation(one))
        except Exception as error:  # noqa: BLE001  the other evaluations are of use without it
            faults.append(f"{one.set}, {one.predictive.name}: {_logged(error, directory)}")
    _drop_checkpoints(directory / TRAINING)
    trained, stored = _parameters(artifact.manifest, artifact)
    return before.model_copy(
        update={
            "status": "failed" if faults else "done",
            "error": "; ".join(dict.fromkeys(faults))[:_ERROR_CHARACTERS] or None,
            "sizes": {**before.sizes, **job.sizes},
            "provenance": _provenance(job, predictor),
            "trained_parameters": trained,
            "extra_parameters": stored,
            "train_seconds": _train_seconds(artifact.manifest),
            "train_nll": train_nll,
            "train_nll_rows": train_nll_rows,
            "evaluations": (*before.evaluations, *new),
        }
    )


def _of_this_adapter(before: Record, sha256: str, say: Callable[[str], None]) -> Record:
    """Return a record without what it says of an adapter that is no longer there."""
    digests = before.provenance.get("digests")
    known = digests.get("adapter") if isinstance(digests, dict) else None
    if known is None or known == sha256:
        return before
    say("the adapter is not the one that was scored; all is scored again")
    return before.model_copy(update={"evaluations": (), "train_nll": None, "train_nll_rows": 0})


def _drop_checkpoints(training: Path) -> None:
    """Delete the checkpoints of a run and of the members of an ensemble."""
    for folder in (training, *training.glob("member-*")):
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)


def _trained(job: Job, directory: Path, bases: Bases, say: Callable[[str], None]) -> Artifact:
    """Return the run's adapter, training it or going on with it where that is needed."""
    path = directory / "artifact"
    if put_back(path):
        try:
            return load_artifact(path)
        except ArtifactError as error:
            say(f"{error}; made anew")
            shutil.rmtree(path)
    config = job.cell.config
    run_training(
        config,
        path,
        directory / TRAINING,
        resume=True,
        overwrite=True,
        base=bases.to_train(config),
        report=say,
    )
    return load_artifact(path)


@dataclass(frozen=True)
class _Answers:
    """What one predictive says of one set of rows, without temperature."""

    rows: Sequence[EncodedExample]
    log_probs: Tensor  # (M, n, C)
    seconds: float

    @property
    def labels(self) -> Tensor:
        return torch.tensor([row.label for row in self.rows])


class _Scoring:
    """Scores the stored adapter; equal questions under equal functions are answered once."""

    def __init__(
        self,
        job: Job,
        directory: Path,
        predictor: Predictor,
        tokenizer: Any,
        data: TrainingData,
        say: Callable[[str], None],
    ) -> None:
        self.job, self.directory, self.predictor = job, directory, predictor
        self.tokenizer, self.data, self.say = tokenizer, data, say
        self._rows: dict[str, list[EncodedExample]] = {}
        self._answers: dict[tuple[str, str], _Answers] = {}

    def train_nll(self) -> float:
        """Return the mean NLL of the training rows under the default predictive, in nats."""
        rows = spaced(self.data.train, self.job.evaluation.train_rows)
        found = self._answered("training rows", rows, self.predictor.default_plan)
        return nll(log_mean_probs(found.log_probs), found.labels)

    def evaluation(self, wanted: Wanted) -> Evaluation:
        """Score one set under one predictive and write the scores."""
        plan = self._plan(wanted)
        found = self._answered(wanted.set, self._set(wanted.set), plan)
        temperature, fit = self._temperature(plan) if wanted.tempered else (1.0, None)
        log_probs = temper(found.log_probs, temperature)
        metrics: dict[str, Interval] = {}
        floor = None
        if bool((found.labels >= 0).any()):
            resamples = self.job.evaluation.resamples
            report = evaluate(
                log_probs,
                found.labels,
                bootstrap_seed=0 if resamples else None,
                num_resamples=resamples,
            )
            metrics = {name: _interval(**vars(one)) for name, one in report.metrics.items()}
            floor = report.ece_noise_floor
        if wanted.set != IN:
            inside = self._answered(IN, self._set(IN), plan)
            metrics |= self._detection(temper(inside.log_probs, temperature), inside, log_probs)
        name = f"scores-{wanted.id}.safetensors"
        digest = self._write(name, found, log_probs)
        return Evaluation(
            id=wanted.id,
            set=wanted.set,
            predictive=wanted.predictive.name,
            num_samples=len(log_probs),
            tempered=wanted.tempered,
            temperature=temperature,
            fit=fit,
            rows=len(found.rows),
            truncated=sum(row.truncated for row in found.rows),
            seconds=found.seconds,
            metrics=metrics,
            ece_noise_floor=floor,
            scores=name,
            scores_sha256=digest,
        )

    def _plan(self, wanted: Wanted) -> SamplingPlan:
        stored, asked = self.predictor.sampled_plan, wanted.predictive
        drawn = self.predictor.method.draws_samples(self.predictor.manifest.method)
        design = asked.design if drawn and asked.design else stored.design
        return SamplingPlan(
            asked.num_samples or stored.num_samples, stored.seed, asked.estimator, design
        )

    def _set(self, name: str) -> list[EncodedExample]:
        if name not in self._rows:
            rows = evaluation_rows(
                self.job.cell.config.data,
                self.tokenizer,
                self.data.label_set,
                of=None if name == IN else name,
            )
            self._rows[name] = spaced(rows, self.job.evaluation.rows)
        return self._rows[name]

    def _answered(self, name: str, rows: Sequence[EncodedExample], plan: SamplingPlan) -> _Answers:
        key = (name, self.predictor.mask_set(plan))
        if key not in self._answers:
            self.say(f"scoring {name}: {len(rows)} rows, {plan.estimator}")
            kept_stem_states(self.predictor.model, rows)  # whoever comes first makes them for all
            started = perf_counter()
            found = self.predictor.predict(rows, plan, label_mass=False, calibrated=False)
            seconds = round(perf_counter() - started, 3)
            if not bool(found.log_probs.exp().isfinite().all()):
                raise DalorraError(f"the adapter gives probabilities ({name}) that are not finite")
            self._answers[key] = _Answers(rows, found.log_probs, seconds)
        return self._answers[key]

    def _temperature(self, plan: SamplingPlan) -> tuple[float, TemperatureOfRun]:
        """Fit a temperature on the held-out rows, all of which are for nothing else here."""
        rows = spaced(self.data.validation, self.job.evaluation.temperature_rows)
        found = self._answered("held-out rows", rows, plan)
        everything = torch.ones(len(rows), dtype=torch.bool)
        fit = fit_temperature(found.log_probs, found.labels, everything, everything)
        return fit.value, TemperatureOfRun(
            n=fit.n_fit, nll_before=fit.nll_before, nll_after=fit.nll_after
        )

    def _detection(self, inside: Tensor, answers: _Answers, outside: Tensor) -> dict[str, Interval]:
        """Return how well each score tells rows from elsewhere from those of the task."""
        known = answers.labels >= 0
        point = len(inside) == 1
        here = out_of_scope_scores(summarise(inside[:, known]), point=point)
        there = out_of_scope_scores(summarise(outside), point=point)
        return {f"auroc_oos_{name}": self._auroc(there[name], here[name]) for name in there}

    def _auroc(self, positive: Tensor, negative: Tensor) -> Interval:
        score = torch.cat([positive, negative])
        is_positive = torch.arange(len(score)) < len(positive)
        resamples, value = self.job.evaluation.resamples, auroc(positive, negative)
        if not resamples:
            return _interval(value)
        found = bootstrap_interval(
            lambda s, flag: auroc(s[flag], s[~flag]),
            score,
            is_positive,
            num_resamples=resamples,
            generator=torch.Generator().manual_seed(0),
        )
        return _interval(value, found.low, found.high)

    def _write(self, name: str, found: _Answers, log_probs: Tensor) -> str:
        summary = summarise(log_probs)
        scores = Scores(
            tuple(row.id for row in found.rows),
            found.labels,
            log_mean_probs(log_probs),
            {score: getattr(summary, score) for score in SCORES},
            _repeats(found.rows),
        )
        return write_scores(self.directory / name, scores)


def _repeats(rows: Sequence[EncodedExample]) -> Tensor:
    """Return the place of the first row that asks the same, (n,): its own where nothing repeats."""
    first: dict[object, int] = {}
    places = [first.setdefault((row.token_ids, row.allowed), i) for i, row in enumerate(rows)]
    return torch.tensor(places, dtype=torch.int64)


def _interval(value: float, low: float | None = None, high: float | None = None) -> Interval:
    return Interval(
        value=json_number(value),
        low=None if low is None else json_number(low),
        high=None if high is None else json_number(high),
    )


def _settings(config: TrainConfig) -> dict[str, Any]:
    """Return all settings, with names in place of places on a disk."""
    values = config.model_dump(mode="json")
    values["data"]["root"] = Path(config.data.root).name
    values["base"] = Path(config.base).name if Path(config.base).is_dir() else config.base
    return values


def _train_nll_rows(job: Job) -> int:
    limit = job.evaluation.train_rows
    return job.sizes["train"] if limit is None else min(limit, job.sizes["train"])


def _train_seconds(manifest: Manifest) -> float | None:
    known = manifest.provenance
    seconds = known.get("seconds")
    resumed = known.get("resumed_at")
    return float(seconds) if isinstance(seconds, int | float) and not resumed else None


def _parameters(manifest: Manifest, artifact: Artifact) -> tuple[int, int]:
    """Return how many numbers training moved, and how many are stored besides one LoRA pair."""
    specs = tuple(TargetSpec(m.name, m.d_in, m.d_out, m.layer) for m in manifest.modules)
    whole = METHODS[manifest.method.name]
    config = whole.trained_as(manifest.method)
    moved = METHODS[config.name].init(specs, manifest.r, 0, config)
    groups = sum(value.numel() for value in moved.values())
    plain = sum(torch.Size(s).numel() for s in factor_shapes(specs, manifest.r).values())
    stored = sum(value.numel() for value in artifact.tensors.values())
    return groups * whole.members(manifest.method), stored - plain


def _provenance(job: Job, predictor: Predictor) -> dict[str, Any]:
    return {
        "dalorra": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "hardware": _hardware(predictor.device),
        "threads": torch.get_num_threads(),
        "device": predictor.device.type,
        "dtype": str(predictor.dtype).removeprefix("torch."),
        "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "digests": {**job.digests, "adapter": predictor.artifact.sha256},
    }


def _hardware(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line for line in lines if line.startswith("model name")).partition(": ")[2]
    return platform.machine()
