"""Decoder layers that are run again in the backward pass: less memory for more work.

Of each layer its input is kept, not what it computed on the way. The second run sees the packs of
the first, and noise is named, never drawn from a state: it computes the very same numbers.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dalorra_core.adapters.binding import Binding

__all__ = ["recomputed_from"]


@contextmanager
def recomputed_from(decoder: nn.Module, first: int, binding: Binding) -> Iterator[None]:
    """Let the layers from one on be run again for gradients, inside the block.

    Args:
        decoder: A decoder with ``layers``.
        first: Number of the layer; no gradient reaches those below.
        binding: Through which packs are lent to the layers.
    """
    layers: Any = decoder.layers
    again = (_Recomputed(layer, binding) for layer in layers[first:])
    decoder.layers = nn.ModuleList([*layers[:first], *again])
    try:
        yield
    finally:
        decoder.layers = layers


class _Recomputed(nn.Module):
    """Stands in a layer's place."""

    def __init__(self, layer: nn.Module, binding: Binding) -> None:
        super().__init__()
        self._layer, self._binding = layer, binding
        self.attention_type = getattr(layer, "attention_type", None)  # some decoders ask for it

    def forward(self, hidden_states: Tensor, **options: Any) -> Any:
        again = self._binding.again()

        def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
            return nullcontext(), again()  # of the first run and of the second

        return checkpoint(
            self._layer,
            hidden_states,
            use_reentrant=False,
            preserve_rng_state=False,  # no layer draws from a global generator
            context_fn=contexts,
            **options,
        )
