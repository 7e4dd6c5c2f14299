"""Turn a configuration into encoded rows, checking every one before any training starts."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import JsonValue

from dalorra_core.config import DataConfig
from dalorra_core.data.collate import EncodedExample
from dalorra_core.data.encode import encode
from dalorra_core.data.examples import ChoiceExample, Example, gold_label
from dalorra_core.data.labels import LabelSet, collect_labels, resolve_label_tokens
from dalorra_core.data.prompts import PromptTemplate, prompt_template
from dalorra_core.data.readers import read_source
from dalorra_core.errors import ConfigError, DataError, InputError

__all__ = ["TrainingData", "encode_rows", "prepare_training_data", "rows_digest"]


@dataclass(frozen=True)
class TrainingData:
    """Everything a run needs to know about its data.

    Attributes:
        train: In-scope rows, label in 0..C-1.
        validation: Held-out rows; out-of-scope ones have label -1. Empty when there is no split.
        label_set: The C labels and their tokens.
        template: How a row becomes a prompt.
        examples: The in-scope training examples, for golden probes.
    """

    train: list[EncodedExample]
    validation: list[EncodedExample]
    label_set: LabelSet
    template: PromptTemplate
    examples: list[Example]


def prepare_training_data(config: DataConfig, tokenizer: Any) -> TrainingData:
    """Read, check and encode both splits.

    Raises:
        ConfigError: If the source, the split or the prompt is not there.
        DataError: At the first row that cannot be used; names file, line and field.
    """
    if config.validation_split is not None and Path(config.source).is_file():
        raise ConfigError(
            f"data.source {config.source} is one file, so data.validation_split "
            f"{config.validation_split!r} would be the training rows again: give a directory with "
            "train.jsonl and validation.jsonl, or data.validation_split=null"
        )
    oos = config.out_of_scope_label
    everything = read_source(config.source, config.train_split)
    examples = [e for e in everything if oos is None or gold_label(e) != oos]
    if not examples:
        raise DataError(f"{_place(config, config.train_split)}: no in-scope row to train on")
    labels = collect_labels(examples)
    try:
        label_set = resolve_label_tokens(labels, tokenizer)
    except DataError as error:
        raise DataError(f"{_place(config, config.train_split)}: field label: {error}") from error
    kind = "choice" if isinstance(examples[0], ChoiceExample) else "text"
    template = prompt_template(kind, config.prompt)
    train = encode_rows(
        examples, config, config.train_split, tokenizer, template=template, label_set=label_set
    )
    validation: list[EncodedExample] = []
    if config.validation_split is not None:
        validation = encode_rows(
            read_source(config.source, config.validation_split),
            config,
            config.validation_split,
            tokenizer,
            template=template,
            label_set=label_set,
        )
    return TrainingData(train, validation, label_set, template, examples)


def encode_rows(
    examples: Sequence[Example],
    config: DataConfig,
    split: str,
    tokenizer: Any,
    *,
    template: PromptTemplate,
    label_set: LabelSet,
) -> list[EncodedExample]:
    """Encode labelled rows of one split; out-of-scope rows get label -1.

    Raises:
        DataError: Naming file, line and field of the first row that cannot be encoded.
    """
    rows = []
    for example in examples:
        out_of_scope = gold_label(example) == config.out_of_scope_label is not None
        try:
            rows.append(
                encode(
                    example,
                    tokenizer=tokenizer,
                    template=template,
                    label_set=label_set,
                    max_tokens=config.max_tokens,
                    truncate=config.truncate,
                    unknown_label="ignore" if out_of_scope else "error",
                )
            )
        except (InputError, DataError) as error:
            field = "text" if isinstance(error, InputError) else "label"
            where = _place(config, split, example.id)
            raise DataError(f"{where}: field {field}: {error}") from error
    return rows


def rows_digest(rows: Sequence[EncodedExample]) -> dict[str, JsonValue]:
    """Return the number of rows and a sha256 over their ids, tokens and labels."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(repr((row.id, row.token_ids, row.label, row.allowed)).encode())
    return {"rows": len(rows), "sha256": digest.hexdigest()}


def _place(config: DataConfig, split: str, row_id: str | None = None) -> str:
    """Name a row's file and line; looked up again only once something is wrong with it."""
    path = Path(config.source)
    file = path / f"{split}.jsonl" if path.is_dir() else path
    if row_id is None or not file.is_file():
        return f"{file}" if row_id is None else f"{config.source} split {split}, row {row_id!r}"
    with file.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip() and json.loads(line).get("id") == row_id:
                return f"{file}, line {number}"
    return f"{file}, row {row_id!r}"
