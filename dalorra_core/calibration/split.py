"""Which part a calibration row belongs to, and how a row is recognised again."""

import hashlib
import json
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from dalorra_core.data.examples import ChoiceExample, Example

__all__ = ["DIGEST_BYTES", "PARTS", "Part", "digests", "overlap", "part_of", "parts", "row_digest"]

Part = Literal["fit", "select", "certify"]

PARTS: tuple[Part, ...] = ("fit", "select", "certify")
"""In the order of their numbers in the stored scores."""

_UPPER_SHARES = (0.25, 0.5, 1.0)
"""A quarter fits (temperature, combined score), a quarter selects, half certifies."""

DIGEST_BYTES = 16


def part_of(row_id: str) -> int:
    """Return the number of the part that a row belongs to, by its id alone.

    The same id is in the same part in every run, whatever the other rows are, so that more rows
    never move an old one from one part to another.

    Example:
        >>> [PARTS[part_of(f"row-{i}")] for i in range(4)]
        ['fit', 'fit', 'select', 'select']
    """
    number = int.from_bytes(hashlib.sha256(row_id.encode()).digest()[:8], "big") / 2**64
    return next(k for k, upper in enumerate(_UPPER_SHARES) if number < upper)


def parts(ids: Sequence[str]) -> Tensor:
    """Return the part of each row, shape (n,), uint8."""
    return torch.tensor([part_of(row_id) for row_id in ids], dtype=torch.uint8)


def row_digest(example: Example) -> bytes:
    """Return 16 bytes that stand for what is asked; neither id nor label count.

    Two rows with the same question are the same row, under whatever ids.
    """
    if isinstance(example, ChoiceExample):
        choices = [[choice.label, choice.text] for choice in example.choices]
        content: object = [example.question, example.context, choices]
    else:
        content = example.text
    text = json.dumps(content, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).digest()[:DIGEST_BYTES]


def digests(examples: Sequence[Example]) -> Tensor:
    """Return the digests of rows, shape (n, 16), uint8."""
    content = b"".join(row_digest(example) for example in examples)
    return torch.frombuffer(bytearray(content), dtype=torch.uint8).view(-1, DIGEST_BYTES)


def overlap(examples: Sequence[Example], stored: Tensor) -> list[str]:
    """Return the ids of the rows whose digest is among the stored ones, in order."""
    known = {bytes(row) for row in stored.tolist()}
    return [example.id for example in examples if row_digest(example) in known]
