"""One decoded JSON row -> one example; knows field names and types, nothing of files.

Every reader, from a file or from a hub, goes through :func:`parse_row`, so that a row is judged by
the same rules wherever it comes from.
"""

from collections.abc import Mapping

from dalorra_core.data.examples import (
    Choice,
    ChoiceExample,
    Example,
    TextExample,
    example_fault,
)
from dalorra_core.errors import DataError

__all__ = ["parse_row"]

CHOICE_FIELDS = ("question", "choices")
_SHOWN_CHARACTERS = 60


def parse_row(row: object, *, require_labels: bool = True) -> Example:
    """Return the example that a decoded JSON row describes.

    A row with ``question`` or ``choices`` is a question, a row with ``text`` a text. Fields that
    neither form knows (``label_fine``, for one) are allowed and not read.

    Args:
        row: What the JSON decoder returned.
        require_labels: Refuse a row without ``label`` (text) or ``answer`` (question). When
            False, a missing or null label gives an example without one.

    Raises:
        DataError: Names the field, what is allowed and what was found; not the file or line,
            which the caller knows.

    Example:
        >>> parse_row({"id": "1", "text": "hello", "label": "greeting"})
        TextExample(id='1', text='hello', label='greeting')
    """
    if not isinstance(row, Mapping):
        raise DataError(f"a row must be a JSON object, got {_shown(row)}")
    is_choice = any(field in row for field in CHOICE_FIELDS)
    if is_choice and "text" in row:
        raise DataError(
            "a row must be either a text ('text') or a question ('question' and 'choices'), "
            "got the fields of both"
        )
    example = _choice_row(row, require_labels) if is_choice else _text_row(row, require_labels)
    fault = example_fault(example)
    if fault is not None:
        field, reason = fault
        raise DataError(f"field {field!r} {reason}")
    return example


def _text_row(row: Mapping[str, object], require_labels: bool) -> TextExample:  # noqa: FBT001
    return TextExample(
        id=_string(row, "id"),
        text=_string(row, "text"),
        label=_string(row, "label") if require_labels else _optional_string(row, "label"),
    )


def _choice_row(row: Mapping[str, object], require_labels: bool) -> ChoiceExample:  # noqa: FBT001
    return ChoiceExample(
        id=_string(row, "id"),
        question=_string(row, "question"),
        context=_optional_string(row, "context"),
        choices=_choices(row),
        answer=_string(row, "answer") if require_labels else _optional_string(row, "answer"),
    )


def _choices(row: Mapping[str, object]) -> tuple[Choice, ...]:
    found = _present(row, "choices")
    if not isinstance(found, list):
        raise DataError(f"field 'choices' must be a list of objects, got {_shown(found)}")
    choices: list[Choice] = []
    for i, item in enumerate(found):
        if not isinstance(item, Mapping):
            raise DataError(
                f"field 'choices[{i}]' must be an object with 'label' and 'text', "
                f"got {_shown(item)}"
            )
        place = f"choices[{i}]."
        choices.append(Choice(_string(item, "label", place), _string(item, "text", place)))
    return tuple(choices)


def _present(row: Mapping[str, object], field: str, place: str = "") -> object:
    if field not in row:
        known = ", ".join(repr(str(name)) for name in row) or "none"
        raise DataError(f"field {place + field!r} is missing; the fields found are: {known}")
    return row[field]


def _string(row: Mapping[str, object], field: str, place: str = "") -> str:
    found = _present(row, field, place)
    if not isinstance(found, str):
        raise DataError(f"field {place + field!r} must be a string, got {_shown(found)}")
    return found


def _optional_string(row: Mapping[str, object], field: str) -> str | None:
    return None if row.get(field) is None else _string(row, field)


def _shown(value: object) -> str:
    """Return a value short enough for one line, with its type."""
    text = repr(value)
    short = text if len(text) <= _SHOWN_CHARACTERS else text[:_SHOWN_CHARACTERS] + "..."
    return f"{short} ({type(value).__name__})"
