"""From a setting to examples: a directory, a file, a hub data set or a task; no tokens yet."""

import json
from dataclasses import dataclass
from pathlib import Path

from dalorra_core.config import DataConfig
from dalorra_core.data.examples import Example, gold_label
from dalorra_core.data.labels import collect_labels
from dalorra_core.data.readers import read_source
from dalorra_core.data.tasks import Task, task_labels, task_of, task_prompt, training_examples
from dalorra_core.errors import ConfigError, DataError

__all__ = ["SourceRows", "place_of", "read_rows", "with_defaults_of"]


@dataclass(frozen=True)
class SourceRows:
    """Examples that were read and what is known of them before a token is made.

    Attributes:
        train: In-scope examples.
        held_out: Examples to tune on.
        labels: Labels of the adapter; those of the rows first.
        num_labels: How many of them the rows have.
        prompt: For `prompt_template`.
        config: The settings, with what a task decides filled in.
        held_out_name: Where the held-out rows come from.
    """

    train: list[Example]
    held_out: list[Example]
    labels: tuple[str, ...]
    num_labels: int
    prompt: str | None
    config: DataConfig
    held_out_name: str | None


def read_rows(config: DataConfig) -> SourceRows:
    """Return the examples to train on and those held out.

    Raises:
        ConfigError: The source, the task, the data set or the split is not there, or a setting
            does not go with it.
        DataError: A row cannot be used, or there is none to train on.
    """
    task = task_of(config)
    return _rows_of_source(config) if task is None else _rows_of_task(task, config)


def _rows_of_source(config: DataConfig) -> SourceRows:
    if config.validation_split is not None and Path(config.source).is_file():
        raise ConfigError(
            f"data.source {config.source} is one file, so data.validation_split "
            f"{config.validation_split!r} would be the training rows again: give a directory with "
            "train.jsonl and validation.jsonl, or data.validation_split=null"
        )
    oos = config.out_of_scope_label
    everything = read_source(config.source, config.train_split)
    train = [e for e in everything if oos is None or gold_label(e) != oos]
    if not train:
        raise DataError(f"{place_of(config, config.train_split)}: no in-scope row to train on")
    split = config.validation_split
    held_out = [] if split is None else read_source(config.source, split)
    labels = collect_labels(train)
    filled_in = config.model_copy(update={"truncate": config.truncate or "none"})
    return SourceRows(train, held_out, labels, len(labels), config.prompt, filled_in, split)


def _rows_of_task(task: Task, config: DataConfig) -> SourceRows:
    train, held_out = training_examples(
        task,
        config.root,
        train_rows=config.train_rows,
        per_class=config.per_class,
        subset_seed=config.subset_seed,
        held_out_share=config.held_out_share,
    )
    labels = task_labels(task, config.root)
    prompt, filled_in = task_prompt(task, config.prompt), with_defaults_of(task, config)
    every = (*labels, *task.reserved)
    return SourceRows(train, held_out, every, len(labels), prompt, filled_in, "held-out")


def with_defaults_of(task: Task, config: DataConfig) -> DataConfig:
    """Return the settings with what was left to the task filled in."""
    return config.model_copy(update={"truncate": config.truncate or task.truncate})


def place_of(config: DataConfig, split: str, row_id: str | None = None) -> str:
    """Return a row's file and line; looked up again only once something is wrong with it.

    Args:
        config: Names the source.
        split: Which split of it.
        row_id: The row; None for the whole split.
    """
    path = Path(config.source)
    file = path / f"{split}.jsonl" if path.is_dir() else path
    if row_id is None or not file.is_file():
        return f"{file}" if row_id is None else f"{config.source} split {split}, row {row_id!r}"
    with file.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip() and json.loads(line).get("id") == row_id:
                return f"{file}, line {number}"
    return f"{file}, row {row_id!r}"
