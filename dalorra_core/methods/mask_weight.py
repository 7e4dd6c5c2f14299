"""Gates and Gaussian weights together: dW = s B diag(z) (A + sigma * eps), spike and slab.

Each rank has a Bernoulli gate as in DALorRA and Gaussian entries of A as in BLoB; where the gate is
0 the entries keep their prior, so their divergence counts with the keep probability only. Equation
numbers are those of docs/method.md, section 9.
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
from dalorra_core.methods.dalorra import (
    PHI,
    GateSettings,
    gate_summary,
    kl_factor,
    prediction_gates,
    prior_logits,
    training_gates,
)
from dalorra_core.methods.method import Draw, Method, ParamGroup, TrainingPoint, factors_and
from dalorra_core.methods.weight_noise import (
    NoiseKind,
    WeightNoiseSettings,
    designs_of_noise,
    noisy_packs,
)
from dalorra_core.objectives.elbo import KlTerm
from dalorra_core.objectives.kl import mask_kl, normal_kl

__all__ = ["LOG_SIGMA", "METHOD", "MaskWeightConfig"]

LOG_SIGMA = "log_sigma"
"""Log standard deviations of A: ``<module>.log_sigma`` (r, d_in), or ``log_sigma`` (L, r)."""


class MaskWeightConfig(GateSettings, WeightNoiseSettings, frozen=True):
    """Gates and weights: Bernoulli gates over the ranks and Gaussian entries of lora_A."""

    name: Literal["mask_weight"] = "mask_weight"
    train_noise: NoiseKind = Field(
        default="weight_sample",
        description="Noise on A in training: weight_sample draws A once for each of the S samples; "
        "flipout gives each token of each row signs of its own.",
    )
    prior_sigma: float = Field(
        default=0.15, gt=0, le=1e3, description="Prior standard deviation of the entries of A."
    )
    initial_sigma: float = Field(
        default=1e-3, gt=0, le=10, description="Standard deviation of A that training starts from."
    )
    sigma_per: Literal["entry", "rank"] = Field(
        default="entry",
        description="One standard deviation for each entry of A, or one for each of its rows.",
    )
    sigma_lr: float = Field(
        default=1e-3, gt=0, description="Peak learning rate of log sigma, by AdamW."
    )
    weight_kl_weight: float = Field(
        default=1.0,
        ge=0,
        le=1e6,
        description="Factor on the KL of A beside kl_weight; 1 is the ELBO, under which gates of "
        "wide modules close when rows are few.",
    )


def _shapes(specs: Sequence[TargetSpec], r: int, config: MaskWeightConfig) -> Shapes:
    own: dict[str, tuple[int, ...]] = {PHI: (len(specs), r)}
    if config.sigma_per == "rank":
        own[LOG_SIGMA] = (len(specs), r)
    else:
        own |= {f"{spec.name}.{LOG_SIGMA}": (r, spec.d_in) for spec in specs}
    return factor_shapes(specs, r) | own


def _init(
    specs: Sequence[TargetSpec], r: int, seed: int, config: MaskWeightConfig
) -> dict[str, Tensor]:
    params = init_factors(specs, r, seed)
    start = math.log(config.initial_sigma)
    own = {
        name: torch.full(shape, start)
        for name, shape in _shapes(specs, r, config).items()
        if name not in params
    }
    return params | own | {PHI: prior_logits(len(specs), r, config)}


def _log_sigma(state: AdapterState, config: MaskWeightConfig) -> Mapping[str, Tensor]:
    """Return each module's log standard deviations, (r, d_in) or (r, 1)."""
    if config.sigma_per == "rank":
        rows = state.params[LOG_SIGMA].unsqueeze(-1)  # (L, r, 1)
        return {spec.name: rows[i] for i, spec in enumerate(state.specs)}
    return {spec.name: state.params[f"{spec.name}.{LOG_SIGMA}"] for spec in state.specs}


def _train_pack(state: AdapterState, config: MaskWeightConfig, draw: Draw) -> SamplePack:
    log_sigma = _log_sigma(state, config)
    modules = noisy_packs(
        state,
        lambda spec: log_sigma[spec.name].exp(),
        draw,
        kind=config.train_noise,
        training=True,
        z=training_gates(state, config, draw),
    )
    return SamplePack(draw.num_samples, state.scaling, modules)


def _predict_pack(state: AdapterState, config: MaskWeightConfig, draw: Draw) -> SamplePack:
    log_sigma = _log_sigma(state, config)
    modules = noisy_packs(
        state,
        lambda spec: log_sigma[spec.name].detach().exp(),
        draw,
        kind=config.test_noise,
        training=False,
        z=prediction_gates(state, config, draw),
    )
    return SamplePack(draw.num_samples, state.scaling, modules)


def _mean_pack(state: AdapterState, _: MaskWeightConfig) -> SamplePack:
    keep_prob = state.params[PHI].sigmoid().unsqueeze(0)  # (1, L, r)
    return SamplePack(1, state.scaling, module_packs(state, keep_prob))


def _kl_terms(
    state: AdapterState, config: MaskWeightConfig, point: TrainingPoint, _: SamplePack
) -> Mapping[str, KlTerm]:
    phi, log_sigma = state.params[PHI], _log_sigma(state, config)
    of_ranks = torch.stack(
        [
            normal_kl(state.params[f"{spec.name}.lora_A"], log_sigma[spec.name], config.prior_sigma)
            for spec in state.specs
        ]
    )  # (L, r)
    factor = kl_factor(config, point)
    return {
        "mask_kl": KlTerm(mask_kl(phi, config.prior_prob), factor),
        "weight_kl": KlTerm(
            (phi.double().sigmoid() * of_ranks).sum(), config.weight_kl_weight * factor
        ),
    }


def _param_groups(
    state: AdapterState, optim: OptimConfig, config: MaskWeightConfig
) -> tuple[ParamGroup, ...]:
    spreads = tuple(name for name in state.params if name.endswith(LOG_SIGMA))
    return factors_and(
        state,
        optim,
        ParamGroup((PHI,), config.mask_lr, 0.0),
        ParamGroup(spreads, config.sigma_lr, 0.0),
    )


def _summary(state: AdapterState, config: MaskWeightConfig) -> dict[str, Any]:
    sigma = {name: value.detach().exp().mean() for name, value in _log_sigma(state, config).items()}
    return {
        **gate_summary(state, config),
        "prior_sigma": config.prior_sigma,
        "mean_sigma": {name: float(value) for name, value in sigma.items()},
    }


METHOD = Method(
    settings=MaskWeightConfig,
    stochastic=True,
    init=_init,
    shapes=_shapes,
    train_pack=_train_pack,
    predict_pack=_predict_pack,
    mean_pack=_mean_pack,
    designs=designs_of_noise,
    kl_terms=_kl_terms,
    param_groups=_param_groups,
    num_train_samples=lambda config: config.num_train_samples,
    summary=_summary,
)
