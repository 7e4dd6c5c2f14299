"""Gaussian noise on the down factors whose signs change from token to token (flipout).

One draw N of the noise serves all tokens, but each token sees ``(s r^T) * N`` with random signs s
and r of its own: the marginal distribution of a symmetric N stays what it is, and the noise of
different tokens is uncorrelated. A sample is then no single function of the input any more.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dalorra_core.sampling.coins import random_words
from dalorra_core.sampling.streams import stream_seed

__all__ = ["FlippedNoise"]


@dataclass(frozen=True)
class FlippedNoise:
    """Adds ``s * (N (r * h))`` to the rank features ``A h`` of one module.

    The signs are drawn when they are needed and never kept. In training each row has its own; in
    prediction they depend on the sample and the position alone, so that an answer does not depend
    on the other rows, and a longer row begins with the signs of a shorter one. A module without a
    token axis has one position.

    Attributes:
        noise: N (M, r, d_in), with gradient in training.
        key: Name of the streams of signs, with the module in it.
        first: Number of the first sample here.
        by_row: Draw signs for each row too.
        first_row: Then the place of the first row here.
    """

    noise: Tensor
    key: tuple[str | int, ...]
    first: int = 0
    by_row: bool = False
    first_row: int = 0

    def __call__(self, x: Tensor) -> Tensor:
        """Return the noise of the rank features (M, B, ..., r), in the dtype of ``x``."""
        inner, outer = self.signs(x)
        noise = self.noise.to(x.dtype)
        u = (x * inner).flatten(1, -2) @ noise.transpose(1, 2)  # (M, B*..., r)
        return (u.view(*x.shape[:-1], noise.shape[1]) * outer).to(x.dtype)

    @property
    def positionless(self) -> bool:
        """True in training, where every token of every row has signs of its own."""
        return self.by_row

    def signs(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return +-1 for the inputs (M, B or 1, ..., d_in) and the rank features (..., r)."""
        r, d_in = self.noise.shape[1:]
        places = x.shape[1:-1] if self.by_row else (1, *x.shape[2:-1])
        width = -(-(r + d_in) // 64)  # words for one token
        seeds = [stream_seed((*self.key, self.first + m)) for m in range(len(x))]
        before = self.first_row * math.prod(places[1:]) * width
        words = random_words(seeds, math.prod(places) * width, x.device, before)  # 64 coins each
        octets = words.view(torch.uint8).view(len(x), *places, 8 * width, 1)
        shifts = torch.arange(8, dtype=torch.uint8, device=x.device)
        bits = (octets >> shifts).bitwise_and(1).flatten(-2)  # (..., 64 width)
        flips = bits.to(x.dtype) * 2 - 1
        return flips[..., :d_in], flips[..., d_in : d_in + r]

    def narrow(self, start: int, stop: int) -> "FlippedNoise":
        """Return the noise of samples ``start`` to ``stop - 1``."""
        return replace(self, noise=self.noise[start:stop], first=self.first + start)

    def to(self, device: torch.device, dtype: torch.dtype) -> "FlippedNoise":
        """Return the same noise there."""
        return replace(self, noise=self.noise.to(device, dtype))

    def tensors(self) -> Sequence[Tensor]:
        """Return the noise."""
        return (self.noise,)
