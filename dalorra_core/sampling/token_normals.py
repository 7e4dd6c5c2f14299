"""Standard normal numbers for every token: one meaning at prediction, another in training.

At prediction a number belongs to (sample, position), so that an answer depends neither on the rows
that share its batch nor on their lengths. In training every row has numbers of its own.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from dalorra_core.sampling.streams import normals

__all__ = ["NormalTable", "PositionNormals", "RowNormals", "TokenNormals"]

_POSITIONS_AT_A_TIME = 32


@runtime_checkable
class TokenNormals(Protocol):
    """Draws k numbers for every token of M samples; the same ones on every device."""

    def of(self, num_rows: int, length: int, device: torch.device) -> Tensor:
        """Return (M, B, T, k) or, where rows share them, (M, 1, T, k), float32.

        Args:
            num_rows: B.
            length: T.
            device: Where they are to lie.
        """
        ...

    def narrow(self, start: int, stop: int) -> "TokenNormals":
        """Return the numbers of samples ``start`` to ``stop - 1``."""
        ...

    def tensors(self) -> Sequence[Tensor]:
        """Return what is kept in memory."""
        ...

    def bytes_to_come(self, length: int) -> int:
        """Return what will be kept beside that once ``of`` was asked for this length."""
        ...


class NormalTable:
    """Numbers of (sample, position), drawn once; grows with the longest row it is asked for.

    Args:
        key: Name of the streams; sample m has the stream (*key, m), position after position.
        num_samples: M.
        width: k.
    """

    def __init__(self, key: tuple[str | int, ...], num_samples: int, width: int) -> None:
        self._key, self._num_samples, self._width = key, num_samples, width
        self.values: Tensor | None = None  # (M, T, k)

    def upto(self, length: int, device: torch.device) -> Tensor:
        """Return (M, T, k) with at least ``length`` positions."""
        found = self.values
        if found is None or found.shape[1] < length or found.device != device:
            found = self.values = self._drawn(_rounded_up(length), device)
        return found

    def bytes_to_come(self, length: int) -> int:
        """Return how much larger the table is after ``upto`` this length, in bytes."""
        there = 0 if self.values is None else self.values.shape[1]
        missing = max(0, _rounded_up(length) - there)
        return self._num_samples * missing * self._width * torch.float32.itemsize

    def _drawn(self, length: int, device: torch.device) -> Tensor:
        size = length * self._width
        rows = [normals((*self._key, m), size) for m in range(self._num_samples)]
        with torch.inference_mode(mode=False):  # it outlives the pass that made it
            drawn = torch.from_numpy(np.stack(rows).astype(np.float32)).to(device)
            return drawn.view(self._num_samples, length, self._width)


def _rounded_up(length: int) -> int:
    """Return the positions that are drawn for a length; one where one is all that is asked for."""
    return 1 if length == 1 else -(-length // _POSITIONS_AT_A_TIME) * _POSITIONS_AT_A_TIME


@dataclass(frozen=True)
class PositionNormals:
    """The numbers of some samples of a table; all rows share them.

    Attributes:
        table: Where they are kept.
        samples: Which ones.
    """

    table: NormalTable
    samples: slice

    @classmethod
    def named(cls, key: tuple[str | int, ...], num_samples: int, width: int) -> "PositionNormals":
        """Return the numbers of a table of their own; arguments as for ``NormalTable``."""
        return cls(NormalTable(key, num_samples, width), slice(0, num_samples))

    def of(self, num_rows: int, length: int, device: torch.device) -> Tensor:  # noqa: ARG002
        """Return (M, 1, T, k)."""
        return self.table.upto(length, device)[self.samples, :length].unsqueeze(1)

    def narrow(self, start: int, stop: int) -> "PositionNormals":
        """Return the numbers of some of these samples, out of the same table."""
        first = self.samples.start
        return replace(self, samples=slice(first + start, first + stop))

    def tensors(self) -> Sequence[Tensor]:
        """Return the table, once there is one."""
        return () if self.table.values is None else (self.table.values,)

    def bytes_to_come(self, length: int) -> int:
        """Return how much larger the table, of all its samples, will be."""
        return self.table.bytes_to_come(length)


@dataclass(frozen=True)
class RowNormals:
    """Numbers of every sample, row and position of one forward pass; nothing is kept.

    Attributes:
        key: Name of the streams; sample m has the stream (*key, m), row after row.
        samples: The numbers m of the samples.
        width: k.
        first_row: Place of the first row here among those that share the streams.
    """

    key: tuple[str | int, ...]
    samples: range
    width: int
    first_row: int = 0

    def of(self, num_rows: int, length: int, device: torch.device) -> Tensor:
        """Return (M, B, T, k)."""
        of_row = length * self.width
        start, size = self.first_row * of_row, num_rows * of_row
        rows = np.stack([normals((*self.key, m), size, start) for m in self.samples])
        drawn = torch.from_numpy(rows.astype(np.float32)).to(device)
        return drawn.view(len(self.samples), num_rows, length, self.width)

    def narrow(self, start: int, stop: int) -> "RowNormals":
        """Return the numbers of some of these samples."""
        return replace(self, samples=self.samples[start:stop])

    def tensors(self) -> Sequence[Tensor]:
        """Return nothing."""
        return ()

    def bytes_to_come(self, length: int) -> int:  # noqa: ARG002
        """Return 0: nothing is kept."""
        return 0
