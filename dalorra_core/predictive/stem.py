"""The layers below the first adapted one: frozen, so a row's states there never change.

Training meets every row many times. Where its states at the first adapted layer fit into memory,
they are computed once, and every step begins at that layer.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from dalorra_core.data.collate import EncodedExample, collate
from dalorra_core.predictive.forward import LabelModel
from dalorra_core.predictive.scoring import padded_token_limit, plan_chunks
from dalorra_core.predictive.trunk import RowStates

__all__ = ["MAX_BYTES", "StemStates", "kept_stem_states", "stem_states"]

MAX_BYTES = 2**30
"""Rows whose states would take more are run from the embeddings every time."""


class StemStates:
    """The states of some rows at the input of the first adapted layer."""

    def __init__(self, states: Sequence[Tensor]) -> None:
        self._states = states

    def of(self, places: Sequence[int]) -> Tensor:
        """Return the states of some rows, (B, T, d), padded on the right with zeros."""
        return nn.utils.rnn.pad_sequence([self._states[i] for i in places], batch_first=True)

    def pick(self, places: Sequence[int]) -> "StemStates":
        """Return the states of some rows as a set of their own."""
        return StemStates([self._states[i] for i in places])

    @property
    def nbytes(self) -> int:
        """Memory of the states, in bytes."""
        return sum(states.nbytes for states in self._states)

    @property
    def flat(self) -> Tensor:
        """All rows' states one after the other, (sum of lengths, d)."""
        return torch.cat(list(self._states))


@torch.no_grad()
def stem_states(
    model: LabelModel,
    rows: Sequence[EncodedExample],
    on_progress: Callable[[int], None] | None = None,
) -> StemStates | None:
    """Return the rows' states below the first adapted layer; None where that gains nothing.

    It gains nothing when the first layer is adapted, when the model cannot be begun in its middle,
    or when the states would take more than ``MAX_BYTES``. They depend on the rows alone, chunks
    included, so that a resumed run has the very same ones.

    Args:
        model: The adapted model.
        rows: Encoded rows.
        on_progress: Called with the number of rows finished since the last call.
    """
    layer = model.fold_layer
    if layer is None or not rows:
        return None
    width = model.head.weight.shape[1]
    itemsize = next(model.trunk.model.parameters()).element_size()
    lengths = [len(row.token_ids) for row in rows]
    if sum(lengths) * width * itemsize > MAX_BYTES:
        return None
    device = model.head.weight.device
    found: list[Tensor] = [torch.empty(0)] * len(rows)
    for places, _ in plan_chunks(lengths, 1, padded_token_limit(device)):
        batch = collate([rows[i] for i in places], num_labels=model.num_labels)
        with model.trunk.turns:
            states = model.trunk.stem(batch.input_ids.to(device), layer).states
        for place, own in zip(places, states, strict=True):
            found[place] = own[: lengths[place]].clone()
        if on_progress is not None:
            on_progress(len(places))
    return StemStates(found)


def kept_stem_states(model: LabelModel, rows: Sequence[EncodedExample]) -> RowStates | None:
    """Return the rows' states from the base model's shelf; None without one."""
    shelf = model.trunk.shelf
    return None if shelf is None else shelf.of(model, rows)
