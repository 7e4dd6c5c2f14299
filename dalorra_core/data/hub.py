"""Data sets of the Hugging Face hub -> rows in our own form; needs the optional ``datasets``.

Column names differ between data sets, so a few well-known spellings are translated here and the
result then passes through the same :func:`parse_row` as a file.
"""

from collections.abc import Mapping
from typing import Any

from dalorra_core.data.examples import Example
from dalorra_core.data.rows import parse_row
from dalorra_core.errors import ConfigError, DataError

__all__ = ["HUB_PREFIX", "hub_row", "read_hub"]

HUB_PREFIX = "hub:"
TEXT_COLUMNS = ("text", "sentence")
QUESTION_COLUMNS = ("question", "question_stem")
ANSWER_COLUMNS = ("answer", "answerKey")
CONTEXT_COLUMNS = ("context", "passage")


def read_hub(spec: str, split: str, *, require_labels: bool = True) -> list[Example]:
    """Return the examples of one split of a hub data set.

    Args:
        spec: ``hub:<name>`` or ``hub:<name>:<config>``.
        split: Name of the split on the hub.
        require_labels: Refuse rows without a label.

    Raises:
        ConfigError: ``datasets`` is not installed, the hub cannot be reached, or it has no such
            data set, configuration or split.
        DataError: A row cannot be used; names the row (0-based, as the hub shows it).
    """
    name, _, config = spec.removeprefix(HUB_PREFIX).partition(":")
    if not name:
        raise ConfigError(f"data must be '{HUB_PREFIX}<name>[:config]', got {spec!r}")
    rows = _load(name, config or None, split)
    class_names = _class_names(rows)
    examples: list[Example] = []
    for i, columns in enumerate(rows):
        try:
            row = hub_row(columns, row_id=f"{split}-{i}", class_names=class_names)
            examples.append(parse_row(row, require_labels=require_labels))
        except DataError as error:
            raise DataError(f"{spec}, split {split!r}, row {i}: {error}") from error
    if not examples:
        raise DataError(f"{spec}: split {split!r} must hold at least one row, got none")
    return examples


def _load(name: str, config: str | None, split: str) -> Any:
    try:
        # Optional, and slow to import.
        import datasets  # noqa: PLC0415  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ConfigError(
            f"data '{HUB_PREFIX}{name}' needs the package 'datasets', which is not installed; "
            "install it, or give a directory of .jsonl files"
        ) from error
    try:
        return datasets.load_dataset(name, config, split=split)
    except (OSError, ValueError, RuntimeError) as error:
        raise ConfigError(
            f"data '{HUB_PREFIX}{name}' (config {config!r}, split {split!r}) cannot be loaded "
            f"from the hub; check name and network, or give a directory of .jsonl files: {error}"
        ) from error


def _class_names(rows: Any) -> list[str] | None:
    """Return the names behind an integer ``label`` column, None where it has none."""
    features = getattr(rows, "features", None) or {}
    names = getattr(features.get("label"), "names", None)
    return None if names is None else [str(name) for name in names]


def hub_row(
    columns: Mapping[str, Any], *, row_id: str, class_names: list[str] | None = None
) -> dict[str, object]:
    """Return one hub row with our own field names.

    Integer labels become names by ``class_names``; -1, the hub's mark for "hidden", becomes null.
    Choices may be ``{"label": [...], "text": [...]}`` or a list of strings (then A, B, C ...);
    labels ``1`` to ``n`` become letters, and an integer answer is an index into the choices.

    Args:
        columns: One row as the package ``datasets`` gives it.
        row_id: Used where the row has no ``id`` column.
        class_names: Names of the classes of the ``label`` column.

    Raises:
        DataError: The columns are not those of a text or of a question, or a label is not in
            ``class_names``.

    Example:
        >>> hub_row({"sentence": "fine", "label": 1}, row_id="test-0", class_names=["bad", "good"])
        {'id': 'test-0', 'text': 'fine', 'label': 'good'}
    """
    found_id = str(columns.get("id") or row_id)
    question = _first(columns, QUESTION_COLUMNS)
    if question is not None and "choices" in columns:
        return {"id": found_id, "question": question, **_hub_choices(columns)}
    text = _first(columns, TEXT_COLUMNS)
    if text is None:
        raise DataError(
            f"a row must have a column of {list(TEXT_COLUMNS)}, or one of "
            f"{list(QUESTION_COLUMNS)} with 'choices'; got {sorted(columns)}"
        )
    return {
        "id": found_id,
        "text": text,
        "label": _class_label(columns.get("label"), class_names),
    }


def _first(columns: Mapping[str, Any], names: tuple[str, ...]) -> Any:
    return next((columns[name] for name in names if columns.get(name) is not None), None)


def _class_label(label: object, class_names: list[str] | None) -> object:
    if not isinstance(label, int) or class_names is None:
        return label
    if label == -1:
        return None
    if not 0 <= label < len(class_names):
        raise DataError(f"column 'label' must lie in 0..{len(class_names) - 1}, got {label}")
    return class_names[label]


def _hub_choices(columns: Mapping[str, Any]) -> dict[str, object]:
    choices, answer = columns["choices"], _first(columns, ANSWER_COLUMNS)
    if isinstance(choices, Mapping):
        shown, texts = [str(label) for label in choices["label"]], list(choices["text"])
    else:
        texts = list(choices)
        shown = [chr(ord("A") + i) for i in range(len(texts))]
    letters = [chr(ord("A") + i) for i in range(len(texts))]
    digits = [str(i + 1) for i in range(len(texts))]
    labels = letters if shown == digits else shown
    if isinstance(answer, int):
        if not 0 <= answer < len(labels):
            raise DataError(f"column 'answer' must lie in 0..{len(labels) - 1}, got {answer}")
        answer = labels[answer]
    elif answer in shown:
        answer = labels[shown.index(answer)]
    return {
        "context": _first(columns, CONTEXT_COLUMNS),
        "choices": [
            {"label": label, "text": text} for label, text in zip(labels, texts, strict=True)
        ],
        "answer": answer or None,
    }
