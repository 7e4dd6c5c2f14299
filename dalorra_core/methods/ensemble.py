"""Deep ensemble of LoRA: n adapters trained apart, with starts and orders of rows of their own."""

from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from dalorra_core.adapters.inject import TargetSpec
from dalorra_core.adapters.pack import ModulePack, SamplePack
from dalorra_core.adapters.state import AdapterState, Shapes, factor_shapes
from dalorra_core.config import MethodSettings
from dalorra_core.methods.method import Draw, Method
from dalorra_core.methods.mle import MleConfig, init_plain, plain_pack, the_plain_pack

__all__ = ["METHOD", "EnsembleConfig"]


class EnsembleConfig(MethodSettings, frozen=True):
    """Ensemble: the mixture of several plain LoRA adapters, trained one after the other."""

    name: Literal["ensemble"] = "ensemble"
    num_members: int = Field(default=3, ge=2, le=64, description="n: adapters of the ensemble.")
    average: Literal["probabilities", "logits"] = Field(
        default="probabilities",
        description="What is averaged over the members; logits is the published code's way and "
        "gives one answer without an epistemic part.",
    )


def _of_member(member: int, name: str) -> str:
    """Return what a parameter of one member is called in the whole; the first keeps its names."""
    return name if member == 0 else f"member.{member}.{name}"


def _shapes(specs: Sequence[TargetSpec], r: int, config: EnsembleConfig) -> Shapes:
    one = factor_shapes(specs, r)
    return {
        _of_member(member, name): shape
        for member in range(config.num_members)
        for name, shape in one.items()
    }


def _join(states: Sequence[AdapterState]) -> dict[str, Tensor]:
    return {
        _of_member(member, name): value
        for member, state in enumerate(states)
        for name, value in state.params.items()
    }


def _all_members(state: AdapterState, config: EnsembleConfig) -> SamplePack:
    def stacked(name: str) -> Tensor:
        members = range(config.num_members)
        return torch.stack([state.params[_of_member(member, name)] for member in members])

    modules = {
        spec.name: ModulePack(
            lora_A=stacked(f"{spec.name}.lora_A"),  # (n, r, d_in)
            lora_B=stacked(f"{spec.name}.lora_B"),  # (n, d_out, r)
        )
        for spec in state.specs
    }
    return SamplePack(config.num_members, state.scaling, modules)


def _predict_pack(state: AdapterState, config: EnsembleConfig, _: Draw) -> SamplePack:
    return _all_members(state, config)


def _mean_pack(state: AdapterState, config: EnsembleConfig) -> SamplePack:
    """Return the first member, since an ensemble has no mean; or all of them for their logits."""
    return (_all_members if config.average == "logits" else plain_pack)(state, config)


METHOD = Method(
    settings=EnsembleConfig,
    stochastic=True,
    init=init_plain,
    shapes=_shapes,
    train_pack=the_plain_pack,
    predict_pack=_predict_pack,
    mean_pack=_mean_pack,
    members=lambda config: config.num_members,
    join=_join,
    num_functions=lambda config: config.num_members,
    one_answer=lambda config: config.average == "logits",
    trained_as=lambda _: MleConfig(),
)
