"""Turn a configuration into encoded rows, checking every one before any training starts."""

import hashlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pydantic import JsonValue

from dalorra_core.config import DataConfig
from dalorra_core.data.collate import EncodedExample
from dalorra_core.data.encode import encode
from dalorra_core.data.examples import ChoiceExample, Example, TextExample, gold_label
from dalorra_core.data.labels import (
    LabelSet,
    last_bare_tokens,
    resolve_label_tokens,
    with_swapped_tokens,
)
from dalorra_core.data.prompts import PromptTemplate, prompt_template
from dalorra_core.data.tasks import (
    evaluation_examples,
    find_task,
    task_labels,
    task_of,
    task_prompt,
)
from dalorra_core.errors import ConfigError, DataError, InputError
from dalorra_core.training.sources import place_of, read_rows, with_defaults_of

__all__ = [
    "TrainingData",
    "encode_rows",
    "evaluation_rows",
    "prepare_training_data",
    "rows_digest",
]


@dataclass(frozen=True)
class TrainingData:
    """Everything a run needs to know about its data.

    Attributes:
        train: In-scope rows, label in 0..C-1.
        validation: Held-out rows; out-of-scope ones have label -1. Empty when there are none.
        label_set: The C labels and their tokens.
        template: How a row becomes a prompt.
        examples: The in-scope training examples, for golden probes.
        union: Labels every question is scored over besides its own choices.
        validation_name: Where the held-out rows come from.
    """

    train: list[EncodedExample]
    validation: list[EncodedExample]
    label_set: LabelSet
    template: PromptTemplate
    examples: list[Example]
    union: tuple[str, ...] = ()
    validation_name: str | None = "validation"


def prepare_training_data(config: DataConfig, tokenizer: Any) -> TrainingData:
    """Read, check and encode the rows to train on and those held out.

    Raises:
        ConfigError: If the source, the task, the split or the prompt is not there.
        DataError: At the first row that cannot be used; names file, line and field.
    """
    rows = read_rows(config)
    config, name = rows.config, rows.held_out_name
    kind = "choice" if isinstance(rows.train[0], ChoiceExample) else "text"
    template = prompt_template(kind, rows.prompt)
    try:
        label_set = _label_set(rows.labels, config, tokenizer)
    except DataError as error:
        raise DataError(f"{place_of(config, config.train_split)}: field label: {error}") from error
    union = rows.labels[: rows.num_labels] if _over_union(config, kind) else ()
    train = encode_rows(
        rows.train,
        config,
        config.train_split,
        tokenizer,
        template=template,
        label_set=label_set,
        union=union,
    )
    validation = encode_rows(
        rows.held_out,
        config,
        name or "",
        tokenizer,
        template=template,
        label_set=label_set,
        union=union,
    )
    return TrainingData(train, validation, label_set, template, rows.train, union, name)


def evaluation_rows(
    config: DataConfig, tokenizer: Any, label_set: LabelSet, *, of: str | None = None
) -> list[EncodedExample]:
    """Return the rows whose scores are reported, of the task itself or of another one.

    Texts of another task get label -1: nothing the adapter can say of them is right, whatever
    their labels are called. Questions of another task keep theirs.

    Args:
        config: Settings that the adapter was trained with; ``source`` names a task.
        tokenizer: Tokenizer of the base model.
        label_set: Labels of the adapter.
        of: Name of another task; None for the task itself.

    Raises:
        ConfigError: ``data.source`` is no task, ``of`` is none or of the other form, or its data
            set is not there.
        DataError: A question has a choice that the adapter has no label for.
    """
    task = task_of(config)
    if task is None:
        raise ConfigError(
            f"data.source must name a task ('task:NAME') to have evaluation rows, got "
            f"{config.source!r}"
        )
    asked = task if of is None else find_task(of)
    if asked.kind != task.kind:
        raise ConfigError(
            f"an adapter of task {task.name!r} ({task.kind}) can be evaluated on tasks of the same "
            f"form only, got {asked.name!r} ({asked.kind})"
        )
    examples = evaluation_examples(asked, config.root, drop_last=config.eval_drop_last)
    if task.kind == "text" and asked is not task:
        examples = [replace(e, label=None) for e in examples if isinstance(e, TextExample)]
    prompted = task if task.kind == "text" else asked
    labels = task_labels(asked, config.root)
    return encode_rows(
        examples,
        with_defaults_of(asked, config),
        "evaluation",
        tokenizer,
        template=prompt_template(task.kind, task_prompt(prompted, config.prompt)),
        label_set=label_set,
        union=labels if _over_union(config, task.kind) else (),
    )


def _over_union(config: DataConfig, kind: str) -> bool:
    return config.softmax == "union" and kind == "choice"


def _label_set(labels: tuple[str, ...], config: DataConfig, tokenizer: Any) -> LabelSet:
    if config.label_tokens == "bare":
        label_set = last_bare_tokens(labels, tokenizer)
    else:
        label_set = resolve_label_tokens(labels, tokenizer)
    if not config.boolq_label_inverted:
        return label_set
    if not {"True", "False"} <= set(labels):
        raise ConfigError(
            "data.boolq_label_inverted swaps the tokens of the labels True and False, got true for "
            f"the labels {', '.join(labels[:10])}"
        )
    return with_swapped_tokens(label_set, "True", "False")


def encode_rows(  # noqa: PLR0913  one call says all that decides the tokens
    examples: Sequence[Example],
    config: DataConfig,
    split: str,
    tokenizer: Any,
    *,
    template: PromptTemplate,
    label_set: LabelSet,
    union: Collection[str] = (),
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
                    truncate=config.truncate or "none",
                    unknown_label="ignore" if out_of_scope else "error",
                    union=union,
                    append_eos=config.append_eos,
                )
            )
        except (InputError, DataError) as error:
            field = "text" if isinstance(error, InputError) else "label"
            where = place_of(config, split, example.id)
            raise DataError(f"{where}: field {field}: {error}") from error
    return rows


def rows_digest(rows: Sequence[EncodedExample]) -> dict[str, JsonValue]:
    """Return the number of rows and a sha256 over their ids, tokens and labels."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(repr((row.id, row.token_ids, row.label, row.allowed)).encode())
    return {"rows": len(rows), "sha256": digest.hexdigest()}
