"""Rank dropout: exactly K ranks of every adapted module are off, which ones is random.

Nothing is learned about the gates: the random masking of the DALorRA paper's ablation. Gates of
one module are negatively correlated, so ``frozen_gates`` is the closer control.
"""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from dalorra_core.adapters.inject import TargetSpec
from dalorra_core.adapters.pack import SamplePack
from dalorra_core.adapters.state import (
    AdapterState,
    Shapes,
    factor_shapes,
    init_factors,
    module_packs,
)
from dalorra_core.config import MethodSettings
from dalorra_core.errors import ConfigError
from dalorra_core.methods.dalorra import gate_uniforms
from dalorra_core.methods.method import Draw, Method

__all__ = ["METHOD", "RankDropoutConfig", "gates_with_zeros"]


class RankDropoutConfig(MethodSettings, frozen=True):
    """Rank dropout: exactly num_dropped random ranks of every module are off."""

    name: Literal["rank_dropout"] = "rank_dropout"
    num_dropped: int = Field(
        default=4,
        ge=0,
        le=511,
        description="K: ranks of every module that are off; below adapter.r. 0 is plain LoRA.",
    )


def gates_with_zeros(uniforms: Tensor, num_dropped: int) -> Tensor:
    """Return gates in {0, 1} with exactly K zeros in each module, at the K smallest uniforms.

    Args:
        uniforms: (M, L, r) in (0, 1).
        num_dropped: K.

    Returns:
        (M, L, r), float32.

    Source:
        docs/method.md, section 9.6.
    """
    place = uniforms.argsort(dim=-1, stable=True).argsort(dim=-1)  # 0 for the smallest
    return (place >= num_dropped).float()


def _checked(r: int, config: RankDropoutConfig) -> None:
    if config.num_dropped >= r:
        raise ConfigError(
            f"method.num_dropped must be below adapter.r, which is {r}, got {config.num_dropped}"
        )


def _shapes(specs: Sequence[TargetSpec], r: int, config: RankDropoutConfig) -> Shapes:
    _checked(r, config)
    return factor_shapes(specs, r)


def _init(
    specs: Sequence[TargetSpec], r: int, seed: int, config: RankDropoutConfig
) -> dict[str, Tensor]:
    _checked(r, config)
    return init_factors(specs, r, seed)


def _pack(state: AdapterState, config: RankDropoutConfig, draw: Draw) -> SamplePack:
    z = gates_with_zeros(gate_uniforms(state, draw), config.num_dropped)
    return SamplePack(draw.num_samples, state.scaling, module_packs(state, z))


def _mean_pack(state: AdapterState, config: RankDropoutConfig) -> SamplePack:
    share = (state.r - config.num_dropped) / state.r
    z = torch.full((1, len(state.specs), state.r), share)
    return SamplePack(1, state.scaling, module_packs(state, z))


def _summary(state: AdapterState, config: RankDropoutConfig) -> dict[str, Any]:
    return {
        "num_gates": len(state.specs) * state.r,
        "expected_rank": {spec.name: float(state.r - config.num_dropped) for spec in state.specs},
    }


METHOD = Method(
    settings=RankDropoutConfig,
    stochastic=True,
    init=_init,
    shapes=_shapes,
    train_pack=_pack,
    predict_pack=_pack,
    mean_pack=_mean_pack,
    summary=_summary,
)
