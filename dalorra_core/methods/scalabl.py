"""ScalaBL: a Gaussian on the r singular values of the down factor, dW = s B diag(z) V.

Trained by AdamW on the likelihood and, apart from it, by SGD on the divergence. Equation numbers
are those of docs/method.md, section 9.
"""

import math
from collections.abc import Mapping, Sequence
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
from dalorra_core.config import OptimConfig
from dalorra_core.errors import ConfigError
from dalorra_core.methods.kl_bursts import KlBurstSettings, burst_factor
from dalorra_core.methods.method import (
    Draw,
    Method,
    ParamGroup,
    TrainingPoint,
    every_design,
    factors_and,
)
from dalorra_core.objectives.elbo import KlTerm
from dalorra_core.objectives.kl import normal_kl, normal_kl_reversed
from dalorra_core.sampling.designs import sample_normals
from dalorra_core.sampling.streams import uniforms

__all__ = ["LOG_SCALE", "LOG_SIGMA", "METHOD", "ScalablConfig"]

LOG_SCALE = "log_scale"
"""Logarithms of the mean singular values (L, r)."""

LOG_SIGMA = "log_sigma"
"""Logarithms of their standard deviations (L, r)."""


class ScalablConfig(KlBurstSettings, frozen=True):
    """ScalaBL: a Gaussian posterior on the singular values of every adapter."""

    name: Literal["scalabl"] = "scalabl"
    prior_sigma: float = Field(
        default=1.0, gt=0, le=1e3, description="Prior standard deviation of a singular value."
    )
    initial_sigma: float = Field(
        default=0.05,
        gt=0,
        le=10,
        description="e: standard deviations start uniform in (e / sqrt 2, e).",
    )
    num_train_samples: int = Field(
        default=1, ge=1, le=64, description="S: draws of the singular values per optimiser step."
    )
    kl_direction: Literal["forward", "reverse"] = Field(
        default="forward",
        description="forward: KL(posterior, prior), as in the bound; reverse: KL(prior, "
        "posterior), as in the published code.",
    )
    kl_lr: float = Field(
        default=0.2, gt=0, le=1e3, description="Peak learning rate of the SGD step on the KL."
    )


def _shapes(specs: Sequence[TargetSpec], r: int, _: ScalablConfig) -> Shapes:
    own = (len(specs), r)
    return factor_shapes(specs, r) | {LOG_SCALE: own, LOG_SIGMA: own}


def _init(
    specs: Sequence[TargetSpec], r: int, seed: int, config: ScalablConfig
) -> dict[str, Tensor]:
    """Return the factors with A as right singular vectors, and the values apart."""
    params, log_scale = init_factors(specs, r, seed), []
    for spec in specs:
        if r > spec.d_in:
            raise ConfigError(
                f"method scalabl needs adapter.r of at most the input width of every module; "
                f"{spec.name} has {spec.d_in}, got {r}"
            )
        name = f"{spec.name}.lora_A"
        _, scale, directions = torch.linalg.svd(params[name].double(), full_matrices=False)
        params[name] = directions.float().contiguous()  # (r, d_in)
        log_scale.append(scale.log().float())
    top = config.initial_sigma
    low = top / math.sqrt(2)
    drawn = torch.from_numpy(uniforms(("init", seed, LOG_SIGMA), len(specs) * r))
    log_sigma = (low + (top - low) * drawn).log().float().view(len(specs), r)
    return params | {LOG_SCALE: torch.stack(log_scale), LOG_SIGMA: log_sigma}


def _pack(state: AdapterState, _: ScalablConfig, draw: Draw) -> SamplePack:
    scale, sigma = state.params[LOG_SCALE].exp(), state.params[LOG_SIGMA].exp()
    shape = (len(state.specs), state.r)
    eps = sample_normals((*draw.key, "z"), draw.num_samples, shape, draw.design)
    z = scale + sigma * eps.to(sigma.device)  # (M, L, r)
    return SamplePack(draw.num_samples, state.scaling, module_packs(state, z))


def _mean_pack(state: AdapterState, _: ScalablConfig) -> SamplePack:
    scale = state.params[LOG_SCALE].exp().unsqueeze(0)  # (1, L, r)
    return SamplePack(1, state.scaling, module_packs(state, scale))


def _kl_terms(
    state: AdapterState, config: ScalablConfig, point: TrainingPoint, _: SamplePack
) -> Mapping[str, KlTerm]:
    divergence = normal_kl if config.kl_direction == "forward" else normal_kl_reversed
    scale = state.params[LOG_SCALE].double().exp()
    value = divergence(scale, state.params[LOG_SIGMA], config.prior_sigma).sum()
    return {"scale_kl": KlTerm(value, burst_factor(config, point))}


def _param_groups(
    state: AdapterState, optim: OptimConfig, config: ScalablConfig
) -> tuple[ParamGroup, ...]:
    own = (LOG_SCALE, LOG_SIGMA)
    return factors_and(
        state,
        optim,
        ParamGroup(own, optim.lr, 0.0),  # decay would pull the values towards 1
        ParamGroup(own, config.kl_lr, 0.0, optimizer="sgd"),
    )


def _summary(state: AdapterState, config: ScalablConfig) -> dict[str, Any]:
    scale, sigma = (
        state.params[name].detach().double().exp().cpu() for name in (LOG_SCALE, LOG_SIGMA)
    )
    return {
        "prior_sigma": config.prior_sigma,
        "scale": {s.name: row.tolist() for s, row in zip(state.specs, scale, strict=True)},
        "sigma": {s.name: row.tolist() for s, row in zip(state.specs, sigma, strict=True)},
    }


METHOD = Method(
    settings=ScalablConfig,
    stochastic=True,
    init=_init,
    shapes=_shapes,
    train_pack=_pack,
    predict_pack=_pack,
    mean_pack=_mean_pack,
    designs=every_design,
    kl_terms=_kl_terms,
    param_groups=_param_groups,
    divergence_apart=True,
    num_train_samples=lambda config: config.num_train_samples,
    summary=_summary,
)
