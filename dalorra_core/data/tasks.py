"""The rows of a task: to train on, to tune on and to report.

A task is named as ``data.source: task:NAME`` and read from ``data.root``, a directory with one
folder for each data set: ``<root>/<folder>/<split>.jsonl``, and ``labels.json`` beside texts. Its
evaluation rows are never trained on and never tuned on; rows to tune on are held out of the
training rows, or come from a split that is neither.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from dalorra_core.config import DataConfig
from dalorra_core.data.examples import Example, gold_label
from dalorra_core.data.readers import read_source
from dalorra_core.data.subsets import split_held_out, take_per_class, take_rows
from dalorra_core.data.task_registry import TASKS, Task, TaskSource, find_task
from dalorra_core.errors import ConfigError

__all__ = [
    "TASKS",
    "TASK_PREFIX",
    "Task",
    "TaskData",
    "TaskSource",
    "evaluation_examples",
    "find_task",
    "load_task",
    "task_labels",
    "task_of",
    "task_prompt",
    "training_examples",
]

TASK_PREFIX = "task:"

_NOT_FOR_TASKS = ("train_split", "validation_split", "out_of_scope_label")
_ONLY_FOR_TASKS = ("train_rows", "per_class", "subset_seed", "held_out_share", "eval_drop_last")


@dataclass(frozen=True)
class TaskData:
    """The rows of a task.

    Attributes:
        task: The task.
        train: Rows to train on; empty for a task that is only evaluated.
        evaluation: Rows whose scores are reported.
        held_out: Rows for tuning and temperature, never trained on and never reported.
        labels: Labels of the rows, in the order of the probabilities; reserved ones left out.
    """

    task: Task
    train: list[Example]
    evaluation: list[Example]
    held_out: list[Example]
    labels: tuple[str, ...]


def task_of(config: DataConfig) -> Task | None:
    """Return the task that ``data.source`` names, None for any other source.

    Raises:
        ConfigError: There is no such task; or a setting was given that tasks decide themselves, or
            that only tasks have.
    """
    is_task = config.source.startswith(TASK_PREFIX)
    for name in _NOT_FOR_TASKS if is_task else _ONLY_FOR_TASKS:
        value = getattr(config, name)
        if value != DataConfig.model_fields[name].default:
            kind = "for no task" if is_task else f"only for a task ('{TASK_PREFIX}NAME')"
            raise ConfigError(
                f"data.{name} is {kind}, got {value!r} with data.source {config.source!r}"
            )
    return find_task(config.source.removeprefix(TASK_PREFIX)) if is_task else None


def task_prompt(task: Task, asked: str | None) -> str | None:
    """Return the template's name or text for `prompt_template`.

    Args:
        task: The task.
        asked: The setting ``data.prompt``; ``rl_compat`` is what published code has for this task,
            which differs between data sets.

    Source:
        methods.md 1.2.
    """
    if asked is None:
        return task.prompt
    return task.compat_prompt or asked if asked == "rl_compat" else asked


def load_task(  # noqa: PLR0913  all by name, each with a default
    task: Task | str,
    data_root: str | Path,
    *,
    train_rows: int | Literal["all"] | None = None,
    per_class: int | None = None,
    subset_seed: int = 0,
    held_out_share: float = 0.1,
    eval_drop_last: int | None = None,
) -> TaskData:
    """Return the rows of a task.

    Args:
        task: A task or its name.
        data_root: Directory with one folder for each data set.
        train_rows: Training rows, each class in its share; ``all`` takes all, None the task's own.
        per_class: Training rows of each class; None for the task's own.
        subset_seed: Picks the rows of a subset.
        held_out_share: Share of the training rows that is held out where no split is there for it.
        eval_drop_last: k: leave out the last n mod k evaluation rows, as published code does.

    Raises:
        ConfigError: The task, its folder or a split is not there, or a setting is outside its
            domain.
        DataError: A row cannot be used; names file, line and field.
    """
    found = find_task(task) if isinstance(task, str) else task
    train: list[Example] = []
    held_out: list[Example] = []
    if not found.is_for_evaluation_only:
        train, held_out = training_examples(
            found,
            data_root,
            train_rows=train_rows,
            per_class=per_class,
            subset_seed=subset_seed,
            held_out_share=held_out_share,
        )
    evaluation = evaluation_examples(found, data_root, drop_last=eval_drop_last)
    return TaskData(found, train, evaluation, held_out, task_labels(found, data_root))


def training_examples(
    task: Task,
    data_root: str | Path,
    *,
    train_rows: int | Literal["all"] | None,
    per_class: int | None,
    subset_seed: int,
    held_out_share: float,
) -> tuple[list[Example], list[Example]]:
    """Return (rows to train on, held-out rows); see `load_task`.

    Raises:
        ConfigError: As `load_task`; or the task has no training rows.
        DataError: A row cannot be used.
    """
    if task.is_for_evaluation_only:
        raise ConfigError(f"task {task.name!r} has no training rows: it is for evaluation only")
    train: list[Example] = []
    held_out: list[Example] = []
    for source in task.sources:
        rows = _read(task, source, source.train_split, data_root)
        if source.held_out_split is None:
            rows, aside = split_held_out(rows, held_out_share)
        else:
            aside = _read(task, source, source.held_out_split, data_root)
        train += rows
        held_out += aside
    return _subset(train, task, train_rows, per_class, subset_seed), held_out


def _subset(
    rows: list[Example],
    task: Task,
    train_rows: int | Literal["all"] | None,
    per_class: int | None,
    seed: int,
) -> list[Example]:
    if train_rows is not None and per_class is not None:
        raise ConfigError(
            "data.train_rows and data.per_class say two different things: give one, got "
            f"{train_rows!r} and {per_class}"
        )
    if train_rows is None and per_class is None:
        train_rows, per_class = task.train_rows, task.per_class
    if per_class is not None:
        return take_per_class(rows, per_class, seed=seed)
    if train_rows is None or train_rows == "all":
        return rows
    return take_rows(rows, train_rows, seed=seed)


def evaluation_examples(
    task: Task, data_root: str | Path, *, drop_last: int | None = None
) -> list[Example]:
    """Return the rows whose scores are reported, in file order.

    Args:
        task: The task.
        data_root: Directory with one folder for each data set.
        drop_last: k: leave out the last n mod k rows; None keeps all.

    Raises:
        ConfigError: A folder or split is not there, or ``drop_last`` leaves nothing.
        DataError: A row cannot be used.
    """
    rows = [
        row
        for source in task.sources
        for row in _read(task, source, source.evaluation_split, data_root)
    ]
    kept = len(rows) - (0 if drop_last is None else len(rows) % drop_last)
    if not kept:
        raise ConfigError(
            f"data.eval_drop_last must be at most {len(rows)}, the evaluation rows of task "
            f"{task.name!r}, got {drop_last}"
        )
    return rows[:kept]


def task_labels(task: Task, data_root: str | Path) -> tuple[str, ...]:
    """Return the labels of a task's rows, in the order of the probabilities.

    Raises:
        ConfigError: ``labels.json`` is not there or does not say what it should.
    """
    if task.labels is not None:
        return task.labels
    file = _folder(task, task.sources[0], data_root) / "labels.json"
    try:
        known: Any = json.loads(file.read_text(encoding="utf-8"))
        if task.domain is None:
            listed = [
                label for label in known["labels"] if label != known.get("out_of_scope_label")
            ]
        else:
            listed = known["domains"][task.domain]
        return tuple(sorted(str(label) for label in listed))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"{file} must list the labels of task {task.name!r} under 'labels' (and of a domain "
            f"under 'domains'), got {type(error).__name__}: {error}"
        ) from error


def _read(
    task: Task, source: TaskSource, split: str | None, data_root: str | Path
) -> list[Example]:
    if split is None:
        return []
    rows = read_source(_folder(task, source, data_root), split)
    if task.selects:
        inside = set(task_labels(task, data_root))
        rows = [row for row in rows if gold_label(row) in inside]
    if len(task.sources) == 1:
        return rows
    return [replace(row, id=f"{source.folder}/{row.id}") for row in rows]


def _folder(task: Task, source: TaskSource, data_root: str | Path) -> Path:
    folder = Path(data_root) / source.folder
    if not folder.is_dir():
        raise ConfigError(
            f"data.root must be the directory of the data sets; task {task.name!r} needs the "
            f"folder {source.folder!r} in it, got {str(data_root)!r}, where there is none"
        )
    return folder
