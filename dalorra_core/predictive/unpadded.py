"""Rows of a forward pass one after the other, without padding.

A CPU pays for every token, those of padding too. Seen as one long row whose positions begin anew
with every row, a batch has none; from such positions transformers makes a mask in which a token
sees its own row alone. Attention then forms products that the mask throws away, N² for N tokens,
which is less than padding costs for short rows of unlike length.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from dalorra_core.adapters.inject import LM_HEAD
from dalorra_core.adapters.pack import SamplePack

__all__ = ["LayerWork", "UnpaddedRows", "any_length"]


def any_length(packs: Sequence[SamplePack]) -> bool:
    """Return whether packs do the same to every token of a row, whichever row that is.

    They have no transforms, and no gates that rows have for themselves. The label head does not
    matter: it sees last positions only.
    """
    return all(pack.per_row is None for pack in packs) and all(
        not any(module.transforms) and (module.z is None or module.z.dim() == 2)  # noqa: PLR2004
        for pack in packs
        for name, module in pack.modules.items()
        if name != LM_HEAD
    )


@dataclass(frozen=True, eq=False)
class UnpaddedRows:
    """Where the N tokens of B rows are, whose longest has T.

    Attributes:
        places: Of the tokens among the B*T positions of the padded rows, (N,).
        positions: Of each token in its row, (1, N).
        lengths: Tokens of each row.
    """

    places: Int64[Tensor, " N"]
    positions: Int64[Tensor, "1 N"]
    lengths: tuple[int, ...]

    @classmethod
    def of(cls, lengths: Sequence[int]) -> Self:
        """Return rows of these lengths."""
        is_token = torch.arange(max(lengths)) < torch.tensor(lengths).unsqueeze(1)  # (B, T)
        row, position = is_token.nonzero(as_tuple=True)
        return cls(row * max(lengths) + position, position.unsqueeze(0), tuple(lengths))

    @property
    def longest(self) -> int:
        """T."""
        return max(self.lengths)

    def joined(self, x: Tensor) -> Tensor:
        """Return padded rows (B, at least T, ...) without their padding, (1, N, ...)."""
        return x[:, : self.longest].flatten(0, 1)[self.places].unsqueeze(0)

    def padded(self, x: Float[Tensor, "S N d"]) -> Float[Tensor, "S*B T d"]:
        """Return the rows of S samples padded on the right with zeros, row s*B + b."""
        count, longest = len(self.lengths), self.longest
        found = x.new_zeros(len(x), count * longest, x.shape[2])
        found[:, self.places] = x
        return found.view(len(x) * count, longest, x.shape[2])

    def of_longest(self, x: Float[Tensor, "S N d"]) -> Float[Tensor, "S T d"]:
        """Return what the longest row has, whose positions are all there are."""
        row = self.lengths.index(self.longest)
        start = sum(self.lengths[:row])
        return x[:, start : start + self.longest]


@dataclass(frozen=True)
class LayerWork:
    """What a decoder layer does, in multiplications.

    Attributes:
        token: For each token: the entries of its matrices.
        pair: For each pair of tokens that attention looks at.
    """

    token: int
    pair: int

    @classmethod
    def of(cls, decoder: nn.Module) -> Self:
        """Return that of a decoder's last layer."""
        config: Any = decoder.config
        layers: Any = decoder.layers
        linear = (m for m in layers[-1].modules() if isinstance(m, nn.Linear))
        head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        entries = sum(m.in_features * m.out_features for m in linear)
        return cls(entries, 2 * config.num_attention_heads * head)

    def saved_by(self, lengths: Sequence[int]) -> int:
        """Return how much less work rows are without padding; negative where they are more."""
        padded, tokens = len(lengths) * max(lengths), sum(lengths)
        pairs = padded * max(lengths)
        return self.token * (padded - tokens) + self.pair * (pairs - tokens**2)
