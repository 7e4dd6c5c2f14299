"""MAP: plain LoRA with a Gaussian prior on its factors; a point estimate, one function."""

from collections.abc import Mapping
from typing import Literal

import torch
from pydantic import Field

from dalorra_core.adapters.pack import SamplePack
from dalorra_core.adapters.state import AdapterState
from dalorra_core.config import MethodSettings, OptimConfig
from dalorra_core.methods.method import Method, ParamGroup, TrainingPoint
from dalorra_core.methods.mle import init_plain, plain_pack, the_plain_pack
from dalorra_core.objectives.elbo import KlTerm

__all__ = ["METHOD", "MapConfig"]


class MapConfig(MethodSettings, frozen=True):
    """MAP: plain LoRA under a Gaussian prior, one deterministic function."""

    name: Literal["map"] = "map"
    prior: Literal["gaussian", "weight_decay"] = Field(
        default="gaussian",
        description="gaussian: the negative log prior over N in the loss; weight_decay: none "
        "there, AdamW decays instead, as published baselines do.",
    )
    prior_var: float = Field(
        default=1.0,
        gt=0,
        le=1e6,
        description="Variance of the Gaussian prior of every entry of lora_A and lora_B.",
    )
    weight_decay: float = Field(
        default=1e-5,
        ge=0,
        le=1,
        description="Decoupled weight decay in place of optim's, where prior is weight_decay.",
    )


def _prior_terms(
    state: AdapterState, config: MapConfig, point: TrainingPoint, _: SamplePack
) -> Mapping[str, KlTerm]:
    if config.prior == "weight_decay":
        return {}
    squares = torch.stack([value.square().sum() for value in state.params.values()]).sum()
    return {"neg_log_prior": KlTerm(squares / (2 * config.prior_var), 1.0 / point.num_examples)}


def _param_groups(
    state: AdapterState, optim: OptimConfig, config: MapConfig
) -> tuple[ParamGroup, ...]:
    decays = config.prior == "weight_decay"
    decay = config.weight_decay if decays else optim.weight_decay
    return (ParamGroup(tuple(state.params), optim.lr, decay),)


METHOD = Method(
    settings=MapConfig,
    stochastic=False,
    init=init_plain,
    train_pack=the_plain_pack,
    predict_pack=the_plain_pack,
    mean_pack=plain_pack,
    kl_terms=_prior_terms,
    param_groups=_param_groups,
)
