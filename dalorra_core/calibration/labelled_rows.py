"""Read the rows that shall calibrate an adapter, and refuse a set that cannot."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dalorra_core.artifact.manifest import LabelsRef
from dalorra_core.calibration.split import row_digest
from dalorra_core.data.examples import Example, gold_label
from dalorra_core.data.readers import read_source
from dalorra_core.errors import ConfigError, DataError

__all__ = ["RowSource", "content_digest", "read_labelled_rows"]

_SHOWN = 5


@dataclass(frozen=True)
class RowSource:
    """Where rows come from.

    Attributes:
        spec: Directory, ``.jsonl`` file or ``hub:NAME``.
        split: Which split of it; without effect for a file.
        only_out_of_scope: Take the rows with the adapter's out-of-scope label and leave the others.
    """

    spec: str
    split: str
    only_out_of_scope: bool = False


def read_labelled_rows(
    sources: Sequence[RowSource], labels: LabelsRef, *, allow_missing_labels: bool = False
) -> list[Example]:
    """Return the rows of all sources.

    Args:
        sources: At least one.
        labels: Of the adapter.
        allow_missing_labels: Accept data in which a label of the adapter has no row at all.

    Raises:
        ConfigError: A source cannot be read, or the adapter has no out-of-scope label to look for.
        DataError: A label is unknown to the adapter, a label has no row, or a question is there
            twice (it might fall into two parts that must not share a row).
    """
    examples: list[Example] = []
    places: dict[str, str] = {}  # row id -> where it was read
    for source in sources:
        found = read_source(source.spec, source.split)
        if source.only_out_of_scope:
            found = _out_of_scope_only(found, source, labels.out_of_scope_label)
        for example in found:
            if example.id in places:
                raise DataError(
                    f"row id {example.id!r} is in {places[example.id]} and in {source.spec}; "
                    "every row may be given once"
                )
            places[example.id] = source.spec
        examples += found
    _check_labels(examples, places, labels)
    _check_questions(examples, places)
    if not allow_missing_labels:
        _check_every_label(examples, labels)
    return examples


def content_digest(examples: Sequence[Example]) -> str:
    """Return the sha256 over ids, questions and labels of rows, whatever their order."""
    lines = sorted(f"{e.id}\0{row_digest(e).hex()}\0{gold_label(e)}" for e in examples)
    return "sha256:" + hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _out_of_scope_only(
    examples: list[Example], source: RowSource, out_of_scope_label: str | None
) -> list[Example]:
    if out_of_scope_label is None:
        raise ConfigError(
            f"out-of-scope rows were asked for from {source.spec}, but the adapter was trained "
            "without data.out_of_scope_label"
        )
    found = [example for example in examples if gold_label(example) == out_of_scope_label]
    if not found:
        raise DataError(f"{source.spec} has no row with the label {out_of_scope_label!r}")
    return found


def _check_labels(
    examples: Sequence[Example], places: Mapping[str, str], labels: LabelsRef
) -> None:
    known = {*labels.labels, labels.out_of_scope_label}
    unknown = [example for example in examples if gold_label(example) not in known]
    if unknown:
        first = unknown[0]
        outside = labels.out_of_scope_label
        raise DataError(
            f"{places[first.id]}, row {first.id!r}: field label: {gold_label(first)!r} is none of "
            f"the adapter's {len(labels.labels)} labels"
            + (f" nor its out-of-scope label {outside!r}" if outside else "")
            + f" ({len(unknown)} such rows)"
        )


def _check_questions(examples: Sequence[Example], places: Mapping[str, str]) -> None:
    first: dict[bytes, str] = {}
    repeated: list[tuple[str, str]] = []
    for example in examples:
        before = first.setdefault(row_digest(example), example.id)
        if before != example.id:
            repeated.append((before, example.id))
    if repeated:
        one, other = repeated[0]
        raise DataError(
            f"rows {one!r} ({places[one]}) and {other!r} ({places[other]}) ask the same question; "
            f"{len(repeated)} rows repeat another one, remove them: the parts must not share a row"
        )


def _check_every_label(examples: Sequence[Example], labels: LabelsRef) -> None:
    there = {gold_label(example) for example in examples}
    missing = [label for label in labels.labels if label not in there]
    if missing:
        shown = ", ".join(missing[:_SHOWN]) + (", ..." if len(missing) > _SHOWN else "")
        raise DataError(
            f"{len(missing)} of the adapter's {len(labels.labels)} labels have no calibration row: "
            f"{shown}. A certificate from such rows says nothing about traffic with these labels; "
            "add rows, or pass --allow-missing-labels if they never occur"
        )
