"""Run what is the same for all M samples once: repeat the batch only where samples begin to differ.

Below the first adapted layer every sample computes the same states. A hook on that layer repeats
its input M times, so the layers under it see B rows instead of M*B: exact, and for an adapter on
layers 10 to 29 of 30 about a third of the work. The hook is there for one forward only: the next
one may be of adapters that begin elsewhere.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from dalorra_core.adapters.inject import TargetSpec
from dalorra_core.adapters.pack import fold

__all__ = ["first_adapted_layer", "folded_at"]


def first_adapted_layer(decoder: nn.Module, specs: Sequence[TargetSpec]) -> int | None:
    """Return the layer at whose input samples begin to differ; None where that gains nothing.

    Works for decoders whose layers take the hidden states as first argument and get nothing else
    with a batch axis. Whether a given model is of that kind is not known but tried: see
    ``LabelModel``, which compares both ways once.
    """
    first = min((s.layer for s in specs if s.layer is not None), default=0)
    layers: Any = getattr(decoder, "layers", None)
    return first if first > 0 and isinstance(layers, nn.ModuleList) else None


@contextmanager
def folded_at(decoder: nn.Module, layer: int | None, num_samples: int) -> Iterator[None]:
    """Repeat the states ``num_samples`` times at the input of a layer, inside the block.

    Args:
        decoder: A decoder with ``layers``.
        layer: Number of the layer; None repeats nothing.
        num_samples: M.
    """
    if layer is None or num_samples == 1:
        yield
        return

    def repeat(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (fold(args[0], num_samples), *args[1:])

    layers: Any = decoder.layers
    with layers[layer].register_forward_pre_hook(repeat):
        yield
