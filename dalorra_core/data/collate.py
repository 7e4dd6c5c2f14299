"""Prompts -> token ids -> padded batches; the last step before the model.

Batches are padded on the **right**. Attention is causal, so what stands after a row's last token
cannot be seen by it: positions start at 0 in every row and an answer does not depend on its
batch-mates.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from dalorra_core.data.encode import EncodedExample, Truncation, UnknownLabel, encode
from dalorra_core.errors import ConfigError, DataError

__all__ = [
    "EncodedExample",
    "TokenBatch",
    "Truncation",
    "UnknownLabel",
    "collate",
    "encode",
    "length_buckets",
]


@dataclass(frozen=True, eq=False)
class TokenBatch:
    """B rows of token ids, padded on the right to the longest, T.

    Attributes:
        input_ids: Token ids, shape (B, T).
        last_index: Position of each row's last real token, in 0..T-1, shape (B,).
        labels: Right label of each row, in 0..C-1, or -1 for none, shape (B,).
        allowed: Labels that each row may be given, shape (B, C); None when every row may be given
            all of them.
        stem: States at the input of a layer, where they are known already.
        stem_layer: Which layer that is; None: the first adapted one.
    """

    input_ids: Int64[Tensor, "B T"]
    last_index: Int64[Tensor, " B"]
    allowed: Bool[Tensor, "B C"] | None
    labels: Int64[Tensor, " B"]
    stem: Float[Tensor, "B T d"] | None = None
    stem_layer: int | None = None

    def rows(self, which: slice) -> "TokenBatch":
        """Return some rows, still padded to the longest of all."""
        return TokenBatch(
            input_ids=self.input_ids[which],
            last_index=self.last_index[which],
            allowed=None if self.allowed is None else self.allowed[which],
            labels=self.labels[which],
            stem=None if self.stem is None else self.stem[which],
            stem_layer=self.stem_layer,
        )

    def picked(self, places: Sequence[int], longest: int) -> "TokenBatch":
        """Return the rows at some places, in their order, padded to ``longest`` tokens.

        The caller knows the longest of them; to ask the device would wait for it.
        """
        index = torch.tensor(places, dtype=torch.int64, device=self.input_ids.device)
        return TokenBatch(
            input_ids=self.input_ids[index, :longest],
            last_index=self.last_index[index],
            allowed=None if self.allowed is None else self.allowed[index],
            labels=self.labels[index],
            stem=None if self.stem is None else self.stem[index, :longest],
            stem_layer=self.stem_layer,
        )

    def to(self, device: torch.device | str) -> "TokenBatch":
        """Return the batch on a device."""
        return TokenBatch(
            input_ids=self.input_ids.to(device),
            last_index=self.last_index.to(device),
            allowed=None if self.allowed is None else self.allowed.to(device),
            labels=self.labels.to(device),
            stem=None if self.stem is None else self.stem.to(device),
            stem_layer=self.stem_layer,
        )

    @property
    def num_tokens(self) -> int:
        """Real tokens, without padding."""
        return int(self.last_index.sum()) + len(self.last_index)

    @property
    def padded_tokens(self) -> int:
        """What the model computes: B times T."""
        return self.input_ids.numel()


def collate(rows: Sequence[EncodedExample], *, num_labels: int, pad_id: int = 0) -> TokenBatch:
    """Return rows as one batch, in their order.

    Args:
        rows: At least one encoded example.
        num_labels: C, the number of labels of the adapter.
        pad_id: Token id written after the end of shorter rows; never seen by the model's answer.

    Raises:
        DataError: There are no rows, a row has no tokens, or a label lies outside 0..C-1.

    Example:
        >>> row = EncodedExample("1", (5, 6, 7), 0, None, False)
        >>> collate([row], num_labels=2).last_index
        tensor([2])
    """
    if not rows:
        raise DataError("a batch must have at least one row, got none")
    for row in rows:
        _check_row(row, num_labels)
    lengths = [len(row.token_ids) for row in rows]
    input_ids = torch.full((len(rows), max(lengths)), pad_id, dtype=torch.int64)  # (B, T)
    for b, row in enumerate(rows):
        input_ids[b, : lengths[b]] = torch.tensor(row.token_ids, dtype=torch.int64)
    return TokenBatch(
        input_ids=input_ids,
        last_index=torch.tensor(lengths, dtype=torch.int64) - 1,  # (B,)
        allowed=_allowed_mask(rows, num_labels),
        labels=torch.tensor([row.label for row in rows], dtype=torch.int64),  # (B,)
    )


def _check_row(row: EncodedExample, num_labels: int) -> None:
    if not row.token_ids:
        raise DataError(f"row {row.id!r} must have at least one token, got none")
    labels = (row.label, *(row.allowed or ()))
    if not all(-1 <= label < num_labels for label in labels) or -1 in labels[1:]:
        raise DataError(
            f"labels of row {row.id!r} must lie in 0..{num_labels - 1} (-1: no label), "
            f"got label {row.label} and allowed {row.allowed}"
        )


def _allowed_mask(rows: Sequence[EncodedExample], num_labels: int) -> Bool[Tensor, "B C"] | None:
    if all(row.allowed is None for row in rows):
        return None
    mask = torch.zeros(len(rows), num_labels, dtype=torch.bool)  # (B, C)
    for b, row in enumerate(rows):
        if row.allowed is None:
            mask[b] = True
        else:
            mask[b, list(row.allowed)] = True
    return mask


def length_buckets(
    lengths: Sequence[int], *, batch_size: int, seed: int, epoch: int, window: int = 50
) -> list[list[int]]:
    """Return the batches of one epoch: random, but of rows of similar length.

    Rows are shuffled, cut into windows of ``window`` batches, sorted by length inside each window
    and cut into batches; then the batches are shuffled. Random batches of 32 short questions pad 13
    tokens to 25; this nearly halves the cost and stays close to a plain shuffle.

    The order comes from the raw output of a Philox counter keyed by (seed, epoch), which numpy
    keeps the same for ever (of its `permutation` it says that a later version may differ).

    Args:
        lengths: Tokens of each row, n of them.
        batch_size: Rows of a batch, at least 1.
        seed: In 0..2**64-1.
        epoch: In 0..2**64-1; each has its own order.
        window: Batches that are sorted together, at least 1; 1 is a plain shuffle.

    Returns:
        Lists of row numbers. Every row is in exactly one; all have ``batch_size`` rows except at
        most one, which is shorter.

    Raises:
        ConfigError: A setting lies outside its domain.

    Example:
        >>> sorted(sum(length_buckets([3, 9, 4], batch_size=2, seed=0, epoch=0), []))
        [0, 1, 2]
    """
    for name, value, low in (("batch_size", batch_size, 1), ("window", window, 1)):
        if value < low:
            raise ConfigError(f"{name} must be at least {low}, got {value}")
    for name, value in (("seed", seed), ("epoch", epoch)):
        if not 0 <= value < 2**64:
            raise ConfigError(f"{name} must lie in 0..2**64-1, got {value}")
    stream = np.random.Philox(key=np.array([seed, epoch], dtype=np.uint64))
    shuffled = _permutation(stream, len(lengths))
    batches: list[list[int]] = []
    for start in range(0, len(shuffled), window * batch_size):
        near = sorted(shuffled[start : start + window * batch_size], key=lambda i: lengths[i])
        batches += [near[i : i + batch_size] for i in range(0, len(near), batch_size)]
    return [batches[i] for i in _permutation(stream, len(batches))]


def _permutation(stream: np.random.Philox, size: int) -> list[int]:
    """Return a uniform random order of 0..size-1 (ties of 64-bit draws do not matter here)."""
    if size == 0:
        return []
    return [int(i) for i in np.argsort(stream.random_raw(size), kind="stable")]
