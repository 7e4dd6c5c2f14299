"""Lend sample packs to the adapted layers for the length of one forward pass.

The layers of one model share one Binding. Nothing is bound outside a ``with`` block, so a
forward without a pack is the base model's, and a pack can never leak into the next forward.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from itertools import accumulate
from typing import NamedTuple

from dalorra_core.adapters.pack import ModulePack, SamplePack
from dalorra_core.errors import ConfigError

__all__ = ["Binding", "Loan", "Share"]


class Share(NamedTuple):
    """Which rows of a batch a pack is for.

    Attributes:
        rows: Places among each sample's rows.
        of: B, the rows of all packs together.
        tokens: Places of their tokens, where rows may come one after the other without padding.
        of_tokens: N, the tokens of all rows. Rows of that length are such: padded ones, of which
            there are two and more, are shorter. 0 where they always come padded.
    """

    rows: slice
    of: int
    tokens: slice = slice(0)
    of_tokens: int = 0


class Loan(NamedTuple):
    """What one adapted layer gets of one pack.

    Attributes:
        module: Its factors.
        num_samples: M; or 1 where all samples share the module, which may then be run before rows
            are repeated for the samples or after.
        scaling: lora_alpha / r.
        share: Which rows they are for; None for all.
    """

    module: ModulePack
    num_samples: int
    scaling: float
    share: Share | None


class Binding:
    """Holds the packs of the forward pass under way; used by one thread at a time."""

    def __init__(self) -> None:
        self._lent: tuple[tuple[SamplePack, Share | None], ...] = ()

    @contextmanager
    def bind(
        self, *packs: SamplePack, rows: Sequence[int] = (), lengths: Sequence[int] = ()
    ) -> Iterator[None]:
        """Lend packs to the layers inside the block, then take them back, also on error.

        Args:
            packs: One pack for the whole batch; or several of equal M, each for its own rows.
            rows: With several packs, how many of each sample's B rows each one has, in order:
                row b of the batch belongs to the pack whose run of rows holds b.
            lengths: Tokens of each of the B rows, if layers may get them without padding.

        Raises:
            RuntimeError: Packs are lent already: two forwards would share them.
            ConfigError: The packs differ in M, or the counts do not fit them.
        """
        with self._lending(_shares(packs, rows, lengths)):
            yield

    def again(self) -> Callable[[], AbstractContextManager[None]]:
        """Return what lends the packs of the forward under way once more, when that has ended.

        For layers that are run again in the backward pass.
        """
        lent = self._lent
        return lambda: self._lending(lent)

    @contextmanager
    def _lending(self, lent: tuple[tuple[SamplePack, Share | None], ...]) -> Iterator[None]:
        if self._lent:
            raise RuntimeError("a sample pack is already bound to this model")
        self._lent = lent
        try:
            yield
        finally:
            self._lent = ()

    def lookup(self, module: str) -> tuple[Loan, ...]:
        """Return what is bound for ``module``, in order of rows; empty when nothing is."""
        return tuple(
            Loan(found, 1 if found.shared else pack.num_samples, pack.scaling, share)
            for pack, share in self._lent
            if (found := pack.modules.get(module)) is not None
        )


def _shares(
    packs: Sequence[SamplePack], rows: Sequence[int], lengths: Sequence[int]
) -> tuple[tuple[SamplePack, Share | None], ...]:
    if len(packs) == 1 and not rows:
        return ((packs[0], None),)
    samples = {pack.num_samples for pack in packs}
    if len(samples) != 1:
        raise ConfigError(f"packs bound together must have equal num_samples, got {samples}")
    if len(rows) != len(packs) or min(rows) < 1:
        raise ConfigError(f"each of {len(packs)} packs must have at least one row, got {rows}")
    stops = list(accumulate(rows))
    shares = [Share(slice(stop - n, stop), stops[-1]) for n, stop in zip(rows, stops, strict=True)]
    if lengths:
        ends = [0, *accumulate(lengths)]  # of the rows' tokens
        tokens = [slice(ends[s.rows.start], ends[s.rows.stop]) for s in shares]
        pairs = zip(shares, tokens, strict=True)
        shares = [s._replace(tokens=own, of_tokens=ends[-1]) for s, own in pairs]
    return tuple(zip(packs, shares, strict=True))
