"""Monte-Carlo dropout: the inputs of every adapter are dropped out, in training and in prediction.

LoRA's frozen part sees all of its inputs; only the low-rank part is noisy.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from dalorra_core.adapters.pack import SamplePack
from dalorra_core.adapters.state import AdapterState, module_packs
from dalorra_core.config import MethodSettings
from dalorra_core.methods.method import Draw, Method
from dalorra_core.methods.mle import init_plain, plain_pack
from dalorra_core.sampling.coins import coins
from dalorra_core.sampling.streams import stream_seed

__all__ = ["METHOD", "McDropoutConfig"]

_OWN_FEATURES, _OWN_ROWS, _OWN_POSITIONS = -1, 1, 2
"""First axis of the activations (M, B, ..., d_in) along which dropout is drawn anew."""


class McDropoutConfig(MethodSettings, frozen=True):
    """MC dropout: dropout on the adapters' inputs that stays on at prediction."""

    name: Literal["mc_dropout"] = "mc_dropout"
    drop_prob: float = Field(
        default=0.1, ge=0, le=0.95, description="Probability that an input feature is dropped."
    )
    noise: Literal["per_token", "tied"] = Field(
        default="per_token",
        description="per_token: every token has dropout of its own; tied: one for each sample and "
        "module, so that a sample is one function.",
    )


@dataclass(frozen=True)
class _Dropout:
    """Zeroes features with probability p and divides the rest by 1 - p.

    Attributes:
        seeds: Stream of each sample.
        drop_prob: p.
        own_from: Axes of the activations from this one on have dropout of their own.
        first_row: Place of the first row, where rows have dropout of their own.
    """

    seeds: tuple[int, ...]
    drop_prob: float
    own_from: int
    first_row: int = 0

    def __call__(self, x: Tensor) -> Tensor:
        """Return the thinned activations (M, B, ..., d_in).

        A module without a token axis (``lm_head``) has one position.
        """
        own = x.shape[self.own_from :]
        before = self.first_row * math.prod(own[1:])
        dropped = coins(self.seeds, math.prod(own), self.drop_prob, x.device, before)
        shared = [1] * (x.dim() - 1 - len(own))
        return x.masked_fill(dropped.view(-1, *shared, *own), 0.0) / (1 - self.drop_prob)

    @property
    def positionless(self) -> bool:
        """False where the dropout belongs to positions: at prediction, unless it is tied."""
        return self.own_from != _OWN_POSITIONS

    def narrow(self, start: int, stop: int) -> "_Dropout":
        """Return the dropout of samples ``start`` to ``stop - 1``."""
        return replace(self, seeds=self.seeds[start:stop])

    def to(self, _device: torch.device, _dtype: torch.dtype) -> "_Dropout":
        """Return the same: there is nothing to move."""
        return self

    def tensors(self) -> Sequence[Tensor]:
        """Return nothing: the coins are tossed again for every pass."""
        return ()


def _pack(state: AdapterState, config: McDropoutConfig, draw: Draw, own_from: int) -> SamplePack:
    def dropout(module: str) -> _Dropout:
        tied = config.noise == "tied"
        by_row = own_from == _OWN_ROWS and not tied
        name = (*(draw.row_key if by_row else draw.key), "dropout", module)
        keys = [(*name, m) for m in range(draw.num_samples)]
        return _Dropout(
            tuple(stream_seed(key) for key in keys),
            config.drop_prob,
            _OWN_FEATURES if tied else own_from,
            draw.first_row if by_row else 0,
        )

    plain = module_packs(state, z=None)
    modules = {name: replace(pack, before=dropout(name)) for name, pack in plain.items()}
    return SamplePack(draw.num_samples, state.scaling, modules)


def _train_pack(state: AdapterState, config: McDropoutConfig, draw: Draw) -> SamplePack:
    return _pack(state, config, draw, _OWN_ROWS)


def _predict_pack(state: AdapterState, config: McDropoutConfig, draw: Draw) -> SamplePack:
    return _pack(state, config, draw, _OWN_POSITIONS)  # the same for all rows: see Transform


METHOD = Method(
    settings=McDropoutConfig,
    stochastic=True,
    init=init_plain,
    train_pack=_train_pack,
    predict_pack=_predict_pack,
    mean_pack=plain_pack,
)
