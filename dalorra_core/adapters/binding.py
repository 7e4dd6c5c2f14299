"""Lend a sample pack to the adapted layers for the length of one forward pass.

The layers of one model share one Binding. Nothing is bound outside a ``with`` block, so a
forward without a pack is the base model's, and a pack can never leak into the next forward.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from dalorra_core.adapters.pack import ModulePack, SamplePack

__all__ = ["Binding"]


class Binding:
    """Holds the pack of the forward pass under way; used by one thread at a time."""

    def __init__(self) -> None:
        self._pack: SamplePack | None = None

    @contextmanager
    def bind(self, pack: SamplePack) -> Iterator[None]:
        """Lend ``pack`` to the layers inside the block, then take it back, also on error."""
        if self._pack is not None:
            raise RuntimeError("a sample pack is already bound to this model")
        self._pack = pack
        try:
            yield
        finally:
            self._pack = None

    def lookup(self, module: str) -> tuple[ModulePack, int, float] | None:
        """Return (factors, M, scaling) of ``module``, or None when nothing is bound for it."""
        if self._pack is None or module not in self._pack.modules:
            return None
        return self._pack.modules[module], self._pack.num_samples, self._pack.scaling
