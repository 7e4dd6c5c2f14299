"""MLE: plain LoRA trained by the label-subset likelihood; a point estimate, one function."""

from collections.abc import Sequence
from typing import Literal

from torch import Tensor

from dalorra_core.adapters.inject import TargetSpec
from dalorra_core.adapters.pack import SamplePack
from dalorra_core.adapters.state import AdapterState, init_factors, module_packs
from dalorra_core.config import MethodSettings
from dalorra_core.methods.method import Draw, Method

__all__ = ["METHOD", "MleConfig", "init_plain", "plain_pack", "the_plain_pack"]


class MleConfig(MethodSettings, frozen=True):
    """MLE: plain LoRA, one deterministic function."""

    name: Literal["mle"] = "mle"


def init_plain(
    specs: Sequence[TargetSpec], r: int, seed: int, _: MethodSettings
) -> dict[str, Tensor]:
    """Return LoRA's factors and nothing else."""
    return init_factors(specs, r, seed)


def plain_pack(state: AdapterState, _: MethodSettings) -> SamplePack:
    """Return the one function of plain LoRA."""
    return SamplePack(1, state.scaling, module_packs(state, z=None))


def the_plain_pack(state: AdapterState, config: MethodSettings, _: Draw) -> SamplePack:
    """Return the one function of plain LoRA, whatever M was asked for."""
    return plain_pack(state, config)


METHOD = Method(
    settings=MleConfig,
    stochastic=False,
    init=init_plain,
    train_pack=the_plain_pack,
    predict_pack=the_plain_pack,
    mean_pack=plain_pack,
)
