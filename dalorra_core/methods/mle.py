"""MLE: plain LoRA trained by the label-subset likelihood; a point estimate, one function."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from dalorra_core.adapters.inject import TargetSpec
from dalorra_core.adapters.pack import SamplePack
from dalorra_core.adapters.state import AdapterState, init_factors, module_packs
from dalorra_core.config import MleConfig, OptimConfig
from dalorra_core.methods.method import Draw, Method, ParamGroup
from dalorra_core.objectives.elbo import KlTerm

__all__ = ["METHOD"]


def _init(specs: Sequence[TargetSpec], r: int, seed: int, _: MleConfig) -> dict[str, Tensor]:
    return init_factors(specs, r, seed)


def _mean_pack(state: AdapterState, _: MleConfig) -> SamplePack:
    return SamplePack(1, state.scaling, module_packs(state, z=None))


def _pack(state: AdapterState, config: MleConfig, _: Draw) -> SamplePack:
    return _mean_pack(state, config)  # one function whatever M was asked for


def _kl_terms(_: AdapterState, __: MleConfig, ___: int) -> Mapping[str, KlTerm]:
    return {}


def _param_groups(state: AdapterState, optim: OptimConfig, _: MleConfig) -> tuple[ParamGroup, ...]:
    return (ParamGroup(tuple(state.params), optim.lr, optim.weight_decay),)


def _summary(_: AdapterState) -> dict[str, Any]:
    return {}


METHOD = Method(
    name="mle",
    stochastic=False,
    init=_init,
    train_pack=_pack,
    predict_pack=_pack,
    mean_pack=_mean_pack,
    kl_terms=_kl_terms,
    param_groups=_param_groups,
    num_train_samples=lambda _: 1,
    summary=_summary,
)
