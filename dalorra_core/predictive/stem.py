"""The layers below the first adapted one: frozen, so a row's states there never change.

Training meets every row many times. Where its states at the first adapted layer fit into memory,
they are computed once, and every step begins at that layer.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dalorra_core.data.collate import EncodedExample, collate
from dalorra_core.predictive.forward import LabelModel
from dalorra_core.predictive.scoring import padded_token_limit, plan_chunks
from dalorra_core.predictive.trunk import RowStates, starting_at

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


def stem_states(model: LabelModel, rows: Sequence[EncodedExample]) -> StemStates | None:
    """Return the rows' states below the first adapted layer; None where that gains nothing.

    It gains nothing when the first layer is adapted, when the model cannot be begun in its middle,
    or when the states would take more than ``MAX_BYTES``. They depend on the rows alone, chunks
    included, so that a resumed run has the very same ones.

    Args:
        model: The adapted model.
        rows: Encoded rows.
    """
    layer = model.fold_layer
    if layer is None or not rows or not _can_begin_at(model, layer):
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
            states = _states_at(model.decoder, layer, batch.input_ids.to(device))
        for place, own in zip(places, states, strict=True):
            found[place] = own[: lengths[place]].clone()
    return StemStates(found)


def kept_stem_states(model: LabelModel, rows: Sequence[EncodedExample]) -> RowStates | None:
    """Return the rows' states from the base model's shelf; None without one."""
    shelf = model.trunk.shelf
    return None if shelf is None else shelf.of(model, rows)


class _ReachedError(Exception):
    """Ends a forward pass whose rest is not wanted."""


@torch.no_grad()
def _states_at(decoder: nn.Module, layer: int, input_ids: Tensor) -> Tensor:
    """Return the states (B, T, d) at the input of a layer; what lies above is not run."""
    found: list[Tensor] = []

    def stop(_: nn.Module, args: tuple[Any, ...]) -> None:
        found.append(args[0])
        raise _ReachedError

    layers: Any = decoder.layers
    with layers[layer].register_forward_pre_hook(stop), _stopped():
        decoder(input_ids=input_ids, use_cache=False)
    return found[0]


@contextmanager
def _stopped() -> Iterator[None]:
    try:
        yield
    except _ReachedError:
        return


@torch.no_grad()
def _can_begin_at(model: LabelModel, layer: int) -> bool:
    """Try both ways on two rows: some families do more to embeddings than hand them on."""
    ids = torch.tensor([[1, 2, 3], [3, 1, 2]], device=model.head.weight.device)
    with model.trunk.turns:
        whole = model.decoder(input_ids=ids, use_cache=False).last_hidden_state
        states = _states_at(model.decoder, layer, ids)
        try:
            with starting_at(model.decoder, layer):
                begun = model.decoder(inputs_embeds=states, use_cache=False).last_hidden_state
        except (RuntimeError, ValueError, TypeError):
            return False
    return begun.shape == whole.shape and torch.allclose(
        begun.float(), whole.float(), rtol=1e-2, atol=1e-2
    )
