"""Data files -> examples; the only file in the package that opens a data set.

Reading is strict: a row that cannot be used stops the program with file, line and field, because a
row that is skipped without a word changes a measured number without a word.
"""

import json
from collections.abc import Iterator
from pathlib import Path

from dalorra_core.data.examples import Example
from dalorra_core.data.hub import HUB_PREFIX, read_hub
from dalorra_core.data.rows import parse_row
from dalorra_core.errors import ConfigError, DataError

__all__ = ["read_jsonl", "read_source"]

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def read_source(spec: str | Path, split: str, *, require_labels: bool = True) -> list[Example]:
    """Return the examples of one split of a data source.

    Args:
        spec: A directory (``<spec>/<split>.jsonl`` is read), a ``.jsonl`` file (``split`` is then
            not used), or ``hub:<name>[:config]`` for a data set of the Hugging Face hub.
        split: Name of the split, such as ``train``, ``validation`` or ``test``.
        require_labels: Refuse rows without a label.

    Raises:
        ConfigError: The source does not exist, has no such split, or needs the package
            ``datasets`` or a network that is not there.
        DataError: A row cannot be used; names file, line and field.
    """
    if str(spec).startswith(HUB_PREFIX):
        return read_hub(str(spec), split, require_labels=require_labels)
    path = Path(spec)
    if path.is_dir():
        file = path / f"{split}.jsonl"
        if not file.is_file():
            there = ", ".join(sorted(p.stem for p in path.glob("*.jsonl"))) or "none"
            raise ConfigError(
                f"split must be one of the .jsonl files in {path} ({there}), got {split!r}"
            )
        return read_jsonl(file, require_labels=require_labels)
    if not path.is_file():
        raise ConfigError(
            "data must be a directory with <split>.jsonl files, a .jsonl file or "
            f"'{HUB_PREFIX}<name>[:config]', got {str(spec)!r}, which does not exist"
        )
    return read_jsonl(path, require_labels=require_labels)


def read_jsonl(path: str | Path, *, require_labels: bool = True) -> list[Example]:
    """Return the examples of a JSON-lines file, in file order.

    Args:
        path: UTF-8 file with one JSON object a line, all texts or all questions. A byte-order mark
            and blank lines are allowed.
        require_labels: Refuse rows without ``label`` or ``answer``.

    Returns:
        At least one example.

    Raises:
        ConfigError: The file cannot be opened.
        DataError: The file holds no row, or a row is not UTF-8, not a JSON object, misses a field,
            has one of a wrong type or a text of white space only, repeats an id, mixes texts with
            questions, or has an answer that is not among its choices.
    """
    examples: list[Example] = []
    first_lines: dict[str, int] = {}  # id -> line that used it first
    for number, line in _lines(Path(path)):
        try:
            example = parse_row(_decode(line), require_labels=require_labels)
            _check_fits(example, examples, first_lines)
        except DataError as error:
            raise DataError(f"{path}, line {number}: {error}") from error
        first_lines[example.id] = number
        examples.append(example)
    if not examples:
        raise DataError(f"{path}: a data file must hold at least one row, got an empty file")
    return examples


def _check_fits(example: Example, before: list[Example], first_lines: dict[str, int]) -> None:
    """Refuse a row that repeats an id or has another form than the rows before it."""
    if example.id in first_lines:
        raise DataError(
            f"field 'id' must be unique, {example.id!r} was already used on line "
            f"{first_lines[example.id]}"
        )
    if before and type(example) is not type(before[0]):
        raise DataError("a file must hold only texts or only questions, got both")


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yield (1-based line number, line) of the lines that are not blank.

    Lines end at a line feed only: U+2028 and its like may stand inside a JSON string.
    """
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                content = line.removeprefix(_BYTE_ORDER_MARK) if number == 1 else line
                if content.strip():
                    yield number, content
    except OSError as error:
        raise ConfigError(f"data file {path} cannot be read: {error.strerror}") from error


def _decode(line: bytes) -> object:
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"a row must be UTF-8, got byte 0x{line[error.start]:02x} at column {error.start + 1}"
        ) from error
    try:
        return json.loads(text, object_pairs_hook=_unique_fields)
    except (ValueError, RecursionError) as error:
        raise DataError(f"a row must be one JSON object: {error}") from error


def _unique_fields(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """Build an object, refusing a repeated field: JSON would silently keep the last."""
    fields = dict(pairs)
    if len(fields) < len(pairs):
        names = [name for name, _ in pairs]
        repeated = next(name for name in names if names.count(name) > 1)
        raise DataError(
            f"field {repeated!r} must appear once, got it {names.count(repeated)} times"
        )
    return fields
