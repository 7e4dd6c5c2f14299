"""What makes two runs the same run: settings, rows and base model, never a label or a path.

A run trains one adapter, so its key is made of what training depends on. What is scored afterwards
has ids of its own: another predictive, another test set or a temperature are added to a finished
run without training it again.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from dalorra_core.artifact.peft_io import peft_sha256
from dalorra_core.bench.grid import Cell, EvaluationSettings, Grid, Predictive
from dalorra_core.config import DataConfig
from dalorra_core.data.examples import ChoiceExample, Example
from dalorra_core.data.prompts import prompt_template
from dalorra_core.data.tasks import (
    Task,
    TaskData,
    evaluation_examples,
    find_task,
    load_task,
    task_labels,
    task_of,
    task_prompt,
)
from dalorra_core.errors import ConfigError
from dalorra_core.methods import METHODS
from dalorra_core.predictive.matching import BaseIdentity
from dalorra_core.predictive.shared_base import identify
from dalorra_core.training.settings import TrainConfig
from dalorra_core.training.sources import with_defaults_of

__all__ = [
    "FORMAT",
    "IN",
    "Job",
    "Planned",
    "Wanted",
    "plan_jobs",
    "rows_sha256",
    "run_key",
    "spaced",
]

FORMAT = 1
"""Of keys and records; another one when either means something else."""

IN = "in"
"""Name of the set of the task's own evaluation rows."""

_KEY_DIGITS = 16
_Row = TypeVar("_Row")


@dataclass(frozen=True)
class Wanted:
    """One evaluation.

    Attributes:
        id: Stands for all that decides its numbers, but the run.
        set: ``in``, or the task whose rows are scored as out of distribution.
        predictive: How the rows are answered.
        tempered: Whether a temperature is fitted on held-out rows first.
    """

    id: str
    set: str
    predictive: Predictive
    tempered: bool


@dataclass(frozen=True)
class Job:
    """One run: an adapter to train and the evaluations that the grid wants of it.

    Attributes:
        key: 16 hex digits; names its directory.
        cell: The first cell of the grid that it answers for.
        evaluation: What is scored.
        wanted: All evaluations, of all cells with this key.
        sizes: Rows of ``train``, ``held_out`` and ``evaluation``.
        digests: sha256 of those rows, of the out-of-distribution ones, of base and tokenizer.
    """

    key: str
    cell: Cell
    evaluation: EvaluationSettings
    wanted: tuple[Wanted, ...]
    sizes: dict[str, int]
    digests: dict[str, str]

    @property
    def rows_trained(self) -> int:
        """Rows that pass through training forwards: batch x steps, of every member."""
        config = self.cell.config
        optim, method = config.optim, METHODS[config.method.name]
        steps = optim.steps * optim.batch_size * optim.gradient_accumulation
        return steps * method.members(config.method)

    @property
    def rows_scored(self) -> int:
        """Rows times functions of every set and predictive.

        Temperatures and ``train_nll`` come on top.
        """
        config = self.cell.config
        seen = {(one.set, one.predictive) for one in self.wanted}
        return sum(
            self.sizes["evaluation" if name == IN else name] * _functions(config, predictive)
            for name, predictive in seen
        )


@dataclass(frozen=True)
class Planned:
    """One cell with the run and the evaluations that answer for it."""

    cell: Cell
    key: str
    wanted: tuple[str, ...]


def plan_jobs(grid: Grid, found: Sequence[Cell]) -> tuple[list[Job], list[Planned]]:
    """Return the runs of a grid, each once, and which of them answers for which cell.

    Reads all rows and hashes the base models; loads no model.

    Raises:
        ConfigError: A data set or a base model is not there, or a set has rows of another form.
        DataError: A row cannot be used.
    """
    rows_of: dict[str, TaskData] = {}
    base_of = cache(identify)
    jobs: dict[str, Job] = {}
    planned = []
    for cell in found:
        asked = cell.config.data.model_dump_json()
        if asked not in rows_of:
            rows_of[asked] = _task_rows(cell.config.data)
        data = rows_of[asked]
        base = base_of(cell.config.base)
        key = run_key(cell.config, data, base)
        sets = {
            IN: spaced(data.evaluation, grid.evaluation.rows),
            **{name: _other_rows(cell, name, data, grid.evaluation.rows) for name in cell.others},
        }
        digests = {name: rows_sha256(rows) for name, rows in sets.items()}
        held_out = rows_sha256(spaced(data.held_out, grid.evaluation.temperature_rows))
        if cell.temperature and not data.held_out:
            raise ConfigError(
                f"methods.{cell.label}: temperature needs held-out rows; data.held_out_share must "
                f"be above 0 for {cell.task}, got {cell.config.data.held_out_share}"
            )
        wanted = tuple(
            _wanted(
                name,
                one,
                grid.evaluation,
                digests,
                _reading(data.task, cell.config.data, of=None if name == IN else name),
                held_out if cell.temperature else None,
            )
            for name in sets
            for one in grid.evaluation.predictives
        )
        planned.append(Planned(cell, key, tuple(one.id for one in wanted)))
        sizes = {name: len(rows) for name, rows in sets.items()}
        job = Job(
            key,
            cell,
            grid.evaluation,
            wanted,
            {
                "train": len(data.train),
                "held_out": len(data.held_out),
                "evaluation": sizes.pop(IN),
                **sizes,
            },
            {
                "train": rows_sha256(data.train),
                "held_out": rows_sha256(data.held_out),
                "evaluation": digests.pop(IN),
                **digests,
                "base": base.fingerprint,
                "tokenizer": base.tokenizer_sha256,
            },
        )
        jobs[key] = _joined(jobs[key], job) if key in jobs else job
    return list(jobs.values()), planned


def run_key(config: TrainConfig, data: TaskData, base: BaseIdentity) -> str:
    """Return the first 16 hex digits of the sha256 of what a run's adapter depends on.

    The adapter's name, the path of the base model and the directory of the data sets do not count:
    their contents do. Nor does whether layers are run again for gradients or spread over processes:
    it changes no number.
    """
    settings = config.model_dump(mode="json")
    del settings["name"], settings["base"], settings["data"]["root"]
    del settings["run"]["recompute"], settings["run"]["shard_base"]
    start = settings["adapter"].pop("start")
    if start is not None:  # keys of before there was such a setting stay what they were
        settings["adapter"]["start"] = peft_sha256(Path(start))
    return _digest(
        {
            "format": FORMAT,
            "settings": settings,
            "reading": _reading(data.task, config.data),
            "labels": [*data.labels, *data.task.reserved],
            "train": rows_sha256(data.train),
            "held_out": rows_sha256(data.held_out),
            "base": base.fingerprint,
            "tokenizer": base.tokenizer_sha256,
        }
    )


def rows_sha256(rows: Sequence[Example]) -> str:
    """Return the sha256 of rows: ids, questions, labels and their order."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(_canonical(asdict(row)))
    return digest.hexdigest()


def spaced(rows: Sequence[_Row], limit: int | None) -> list[_Row]:
    """Return at most ``limit`` rows, evenly spaced over the file; all of them for None."""
    if limit is None or limit >= len(rows):
        return list(rows)
    return [rows[i * len(rows) // limit] for i in range(limit)]


def _task_rows(config: DataConfig) -> TaskData:
    task = task_of(config)
    assert task is not None  # the grid names tasks only  # noqa: S101
    return load_task(
        task,
        config.root,
        train_rows=config.train_rows,
        per_class=config.per_class,
        subset_seed=config.subset_seed,
        held_out_share=config.held_out_share,
        eval_drop_last=config.eval_drop_last,
    )


def _other_rows(cell: Cell, name: str, data: TaskData, limit: int | None) -> list[Example]:
    """Return the rows of a set out of distribution.

    Raises:
        ConfigError: They are of the other form, the task's own, or have labels it does not know.
    """
    other, config = find_task(name), cell.config.data
    where = f"out_of_distribution.{cell.task}: {name} must be"
    if other.kind != data.task.kind:
        raise ConfigError(f"{where} a task of the same form ({data.task.kind}), got {other.kind}")
    rows = evaluation_examples(other, config.root, drop_last=config.eval_drop_last)
    labels = task_labels(other, config.root)
    shared = _sources(data.task) & _sources(other)
    apart = data.task.selects and other.selects and not set(labels) & set(data.labels)
    if (shared and not apart) or rows == data.evaluation:
        places = ", ".join(sorted("/".join(place) for place in shared)) or "all of them"
        raise ConfigError(
            f"{where} a task with other evaluation rows than {data.task.name}; both have {places}"
        )
    known = {*data.labels, *data.task.reserved}
    asked = set(labels) if config.softmax == "union" else set()
    asked |= {c.label for row in rows if isinstance(row, ChoiceExample) for c in row.choices}
    if other.kind == "choice" and asked - known:
        raise ConfigError(
            f"{where} a task whose choices an adapter of {data.task.name} has labels for "
            f"({', '.join(sorted(known))}), got also {', '.join(sorted(asked - known))}"
        )
    return spaced(rows, limit)


def _sources(task: Task) -> set[tuple[str, str]]:
    return {(source.folder, source.evaluation_split) for source in task.sources}


def _reading(task: Task, config: DataConfig, *, of: str | None = None) -> dict[str, str | None]:
    """Return how rows become prompts: what the settings leave to the task, filled in.

    As ``training.prepare`` does it: texts from elsewhere keep the task's own prompt, questions
    bring theirs.
    """
    asked = task if of is None else find_task(of)
    prompted = task if task.kind == "text" else asked
    template = prompt_template(task.kind, task_prompt(prompted, config.prompt))
    return {
        "prompt": template.sha256,
        "truncate": with_defaults_of(asked, config).truncate,
    }


def _wanted(
    name: str,
    predictive: Predictive,
    evaluation: EvaluationSettings,
    digests: dict[str, str],
    reading: dict[str, str | None],
    temperature_rows: str | None,
) -> Wanted:
    values = {
        "format": FORMAT,
        "set": name,
        "rows": digests[name],
        "reading": reading,
        "against": digests[IN],
        "estimator": predictive.estimator,
        "num_samples": predictive.num_samples,
        "temperature_rows": temperature_rows,
        "resamples": evaluation.resamples,
    }
    if predictive.design is not None:  # ids of before there were designs stay what they were
        values["design"] = predictive.design
    return Wanted(_digest(values), name, predictive, temperature_rows is not None)


def _joined(one: Job, other: Job) -> Job:
    """Return the first with the evaluations and sets of both."""
    wanted = {w.id: w for w in (*one.wanted, *other.wanted)}
    return replace(
        one,
        wanted=tuple(wanted.values()),
        sizes={**other.sizes, **one.sizes},
        digests={**other.digests, **one.digests},
    )


def _functions(config: TrainConfig, predictive: Predictive) -> int:
    method = METHODS[config.method.name]
    if predictive.estimator == "mean_mask" or not method.stochastic:
        return 1
    fixed = method.num_functions(config.method)
    return fixed or predictive.num_samples or config.predictive.num_samples


def _digest(values: dict[str, Any]) -> str:
    return hashlib.sha256(_canonical(values)).hexdigest()[:_KEY_DIGITS]


def _canonical(values: Any) -> bytes:
    text = json.dumps(values, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return text.encode()
