"""What a bench leaves on the disk: records, results and scores, each whole or not at all.

``<out>/runs/<key>/record.json`` is written last in a run and in one step, so a run with a sound
record is finished. ``<out>/results.jsonl`` has a line for each cell of the grid and is made from
the records.
"""

import fcntl
import hashlib
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from dalorra_core.artifact.placing import place_file
from dalorra_core.bench.keys import FORMAT, Planned
from dalorra_core.errors import ConfigError, DataError

__all__ = [
    "GRID_FILE",
    "RESULTS_FILE",
    "SCORES",
    "Evaluation",
    "Interval",
    "Record",
    "Result",
    "Scores",
    "TemperatureOfRun",
    "cell_fault",
    "hold",
    "read_record",
    "read_results",
    "read_scores",
    "run_directory",
    "with_sound_scores",
    "write_record",
    "write_results",
    "write_scores",
]

GRID_FILE = "grid.json"
RESULTS_FILE = "results.jsonl"
SCORES = (
    "confidence",
    "confidence_std",
    "predictive_entropy",
    "expected_entropy",
    "mutual_information",
    "variation_ratio",
)
"""Names of the scores of a row, those of ``UncertaintySummary``."""

_RECORD_FILE = "record.json"
_AGAIN = "`dalorra bench run` with the same grid writes it again"


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Interval(_Part):
    """A statistic with its 95 % bootstrap interval over rows; null where it is undefined."""

    value: float | None
    low: float | None
    high: float | None


class TemperatureOfRun(_Part):
    """A temperature fitted on held-out rows; NLL in nats per row, of those rows."""

    n: int
    nll_before: float
    nll_after: float


class Evaluation(_Part):
    """One set of rows under one predictive.

    Attributes:
        id: See `Wanted`.
        set: ``in``, or the task whose rows are out of distribution.
        predictive: ``monte_carlo``, ``mean_mask``, ``monte_carlo_<M>``, with a design behind it
            where the grid names one.
        num_samples: Functions that answered; 1 for a point method.
        tempered: Whether a temperature was fitted.
        temperature: It, else 1.
        fit: How it was fitted.
        rows: Rows scored.
        truncated: Those of them that were cut.
        seconds: Time of their forward passes.
        metrics: Statistic to interval; those of accuracy and calibration are over rows whose label
            the adapter knows, ``auroc_oos_*`` over these rows and the set ``in``.
        ece_noise_floor: Mean and sd of the ECE of a perfectly calibrated model with these
            confidences; null where no label is known.
        scores: File of the scores: in a record beside it, in a result under the bench's directory.
        scores_sha256: Of that file.
    """

    id: str
    set: str
    predictive: str
    num_samples: int
    tempered: bool
    temperature: float
    fit: TemperatureOfRun | None
    rows: int
    truncated: int
    seconds: float
    metrics: dict[str, Interval]
    ece_noise_floor: tuple[float, float] | None
    scores: str
    scores_sha256: str


class Record(_Part):
    """One run.

    Attributes:
        format: Of this record.
        key: Of the run.
        label: Method, as the grid calls it.
        task: Task, as the grid calls it.
        seed: Run seed.
        status: ``done`` or ``failed``.
        error: What failed.
        settings: All settings of the training run.
        sizes: Rows of each set.
        provenance: Versions, hardware, device, precision, time and digests.
        trained_parameters: Numbers that training moves, of all members.
        extra_parameters: Numbers in the artifact besides one LoRA pair for each module.
        train_seconds: Wall time of training and of a fit that follows it; null when it was
            interrupted and resumed, since the time before is not known.
        train_nll: Mean NLL of training rows after training, nats, default predictive.
        train_nll_rows: How many rows that was.
        evaluations: What was scored.
    """

    format: Literal[1] = FORMAT
    key: str
    label: str
    task: str
    seed: int
    status: Literal["done", "failed"]
    error: str | None = None
    settings: dict[str, JsonValue]
    sizes: dict[str, int]
    provenance: dict[str, JsonValue] = Field(default_factory=dict)
    trained_parameters: int | None = None
    extra_parameters: int | None = None
    train_seconds: float | None = None
    train_nll: float | None = None
    train_nll_rows: int = 0
    evaluations: tuple[Evaluation, ...] = ()


_RecordT = TypeVar("_RecordT", bound=Record)


class Result(Record):
    """A record as one cell of the grid sees it.

    Attributes:
        line: Its place in its file, from 1.
        lines: How many there are.
        sha256: Of the rest of the line, as JSON.
    """

    line: int
    lines: int
    sha256: str


@dataclass(frozen=True)
class Scores:
    """The scores of one evaluation.

    Attributes:
        ids: n row ids.
        labels: (n,) int64, -1 where the adapter has no such label.
        log_mean_probs: (n, C) float32, natural log, -inf where a label is no choice.
        scores: Name to (n,) float32; see `SCORES`.
        groups: (n,) int64, the place of the first row that is the same question.
    """

    ids: tuple[str, ...]
    labels: Tensor
    log_mean_probs: Tensor
    scores: Mapping[str, Tensor]
    groups: Tensor


def run_directory(out: Path, key: str) -> Path:
    """Return where a run's files are."""
    return out / "runs" / key


@contextmanager
def hold(directory: Path, *, wait: bool) -> Iterator[None]:
    """Keep other processes out of a directory; a lock dies with the process that has it.

    Raises:
        ConfigError: Another process is in it, and ``wait`` is False.
    """
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / ".lock").open("w", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise ConfigError(
                f"another process works in {directory}; wait for it or give another --output"
            ) from None
        yield


def write_record(out: Path, record: Record) -> None:
    """Write a record in one step."""
    text = json.dumps(record.model_dump(mode="json"), indent=1, allow_nan=False) + "\n"
    place_file(run_directory(out, record.key) / _RECORD_FILE, text.encode())


def read_record(out: Path, key: str) -> Record | None:
    """Return a run's record, None when there is none.

    Raises:
        DataError: It cannot be read, or is another run's; names file and line.
    """
    path = run_directory(out, key) / _RECORD_FILE
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error
    record = _parsed(Record, content, path, 1)
    if record.key != key:
        raise DataError(f"{path}: key must be {key!r}, got {record.key!r}")
    return record


def with_sound_scores(out: Path, record: Record) -> tuple[Record, list[str]]:
    """Return a record without the evaluations whose scores are lost, and what is wrong with them.

    They count as not done, so that they are scored again.
    """
    sound: list[Evaluation] = []
    faults: list[str] = []
    for one in record.evaluations:
        path = run_directory(out, record.key) / one.scores
        try:
            found = hashlib.sha256(path.read_bytes()).hexdigest()
        except OSError as error:
            faults.append(f"{path} cannot be read: {error.strerror}")
            continue
        if found == one.scores_sha256:
            sound.append(one)
        else:
            faults.append(f"{path} has sha256 {found}, its record says {one.scores_sha256}")
    return record.model_copy(update={"evaluations": tuple(sound)}), faults


def cell_fault(record: Record, wanted: Collection[str]) -> str | None:
    """Return why a cell of the grid is not done, None if it is.

    A run that failed in one evaluation has done the cells that do not want it.

    Args:
        record: Of the cell's run.
        wanted: Ids of the cell's evaluations.
    """
    missing = set(wanted) - {one.id for one in record.evaluations}
    if not missing:
        return None
    return record.error or (
        f"{len(missing)} of {len(set(wanted))} evaluations are missing; `dalorra bench run` with "
        "the same grid goes on"
    )


def write_results(out: Path, planned: Sequence[Planned], records: Mapping[str, Record]) -> Path:
    """Write the line of every cell that has a record, in one step, and return the file.

    A cell sees those of the run's evaluations that it wants, and paths that begin at ``out``. It is
    done when they are all there.
    """
    found = [(cell, records[cell.key]) for cell in planned if cell.key in records]
    lines = []
    for number, (plan, record) in enumerate(found, 1):
        prefix = run_directory(Path(), record.key)
        own = [one for one in record.evaluations if one.id in plan.wanted]
        own.sort(key=lambda one: plan.wanted.index(one.id))
        placed = [one.model_copy(update={"scores": str(prefix / one.scores)}) for one in own]
        error = cell_fault(record, plan.wanted)
        values = record.model_dump(mode="json") | {
            "label": plan.cell.label,
            "task": plan.cell.task,
            "seed": plan.cell.seed,
            "status": "done" if error is None else "failed",
            "error": error,
            "evaluations": [one.model_dump(mode="json") for one in placed],
            "line": number,
            "lines": len(found),
        }
        lines.append(_line(values | {"sha256": _line_sha256(values)}))
    path = out / RESULTS_FILE
    place_file(path, "".join(lines).encode())
    return path


def read_results(out: Path) -> list[Result]:
    """Return the lines of a results file, all of them.

    Raises:
        ConfigError: There is no such file.
        DataError: A line cannot be read or is missing; names file and line.
    """
    path = out / RESULTS_FILE
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be read ({error.strerror}): OUT must be the --output of `dalorra bench "
            "run`"
        ) from error
    if not content:
        raise DataError(
            f"{path}, line 1: the file is empty; it was cut, or no run has ended yet. {_AGAIN}"
        )
    results = [
        _whole_line(_parsed(Result, line, path, number), line, path, number)
        for number, line in enumerate(content.splitlines(), start=1)
    ]
    for number, result in enumerate(results, start=1):
        if (result.line, result.lines) != (number, len(results)):
            raise DataError(
                f"{path}, line {number}: says it is line {result.line} of {result.lines}, but the "
                f"file has {len(results)} lines. {_AGAIN}"
            )
    return results


def write_scores(path: Path, scores: Scores) -> str:
    """Write scores in one step and return the file's sha256."""
    tensors = {
        "labels": scores.labels.long(),
        "groups": scores.groups.long(),
        "log_mean_probs": scores.log_mean_probs.float(),
        **{name: value.float() for name, value in scores.scores.items()},
    }
    content = save(
        {name: value.contiguous() for name, value in tensors.items()},
        {"ids": json.dumps(scores.ids)},
    )
    place_file(path, content)
    return hashlib.sha256(content).hexdigest()


def read_scores(path: Path, sha256: str) -> Scores:
    """Return stored scores.

    Raises:
        DataError: The file is not there, or is not the one that was written.
    """
    try:
        found = hashlib.sha256(path.read_bytes()).hexdigest()
        if found != sha256:
            raise DataError(f"{path} has sha256 {found}, its record says {sha256}. {_AGAIN}")
        with safe_open(path, framework="pt") as file:
            ids = json.loads((file.metadata() or {})["ids"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        labels, log_mean_probs, groups = (
            tensors.pop(name) for name in ("labels", "log_mean_probs", "groups")
        )
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    return Scores(tuple(ids), labels, log_mean_probs, tensors, groups)


def _line(values: Mapping[str, Any]) -> str:
    return json.dumps(values, allow_nan=False) + "\n"


def _line_sha256(values: Mapping[str, Any]) -> str:
    rest = {name: value for name, value in values.items() if name != "sha256"}
    return hashlib.sha256(_line(rest).encode()).hexdigest()


def _whole_line(result: Result, line: bytes, path: Path, number: int) -> Result:
    """Return a result whose line is as it was written."""
    if (found := _line_sha256(json.loads(line))) != result.sha256:
        raise DataError(
            f"{path}, line {number}: was changed: its sha256 is {found}, it says {result.sha256}. "
            f"{_AGAIN}"
        )
    return result


def _parsed(model: type[_RecordT], content: bytes, path: Path, line: int) -> _RecordT:
    try:
        return model.model_validate(json.loads(content))
    except ValidationError as error:
        fault = error.errors()[0]
        place = ".".join(str(part) for part in fault["loc"])
        raise DataError(
            f"{path}, line {line}: {place}: {fault['msg']}, got {str(fault['input'])[:80]!r}. "
            f"{_AGAIN}"
        ) from None
    except json.JSONDecodeError as error:
        where = line + error.lineno - 1
        raise DataError(
            f"{path}, line {where}: not one whole JSON object ({error.msg}). {_AGAIN}"
        ) from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}, line {line}: cannot be read: {error}. {_AGAIN}") from None
