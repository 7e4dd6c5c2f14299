"""BLoB: Gaussian down factors, A ~ N(lora_A, sigma^2) with sigma = G^2; the up factors are points.

Trained by AdamW on the likelihood and, apart from it, by SGD on a divergence whose weight comes in
bursts. Equation numbers are those of docs/method.md, section 9.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from dalorra_core.adapters.inject import TargetSpec
from dalorra_core.adapters.pack import SamplePack
from dalorra_core.adapters.state import AdapterState, Shapes, factor_shapes, init_factors
from dalorra_core.config import OptimConfig
from dalorra_core.methods.kl_bursts import KlBurstSettings, burst_factor
from dalorra_core.methods.method import Draw, Method, ParamGroup, TrainingPoint
from dalorra_core.methods.mle import plain_pack
from dalorra_core.methods.weight_noise import WeightNoiseSettings, designs_of_noise, noisy_packs
from dalorra_core.objectives.elbo import KlTerm
from dalorra_core.objectives.kl import normal_kl
from dalorra_core.sampling.streams import uniforms

__all__ = ["METHOD", "SIGMA_ROOT", "BlobConfig"]

SIGMA_ROOT = "sigma_root"
"""``<module>.sigma_root`` is G (r, d_in); its square is the standard deviation of A."""

_LEAST_ROOT = 1e-3
"""Below this |G| log sigma goes on as a parabola in G; see ``_log_sigma``."""


class BlobConfig(KlBurstSettings, WeightNoiseSettings, frozen=True):
    """BLoB: a Gaussian posterior on lora_A, trained together with its mean."""

    name: Literal["blob"] = "blob"
    prior_sigma: float = Field(
        default=0.15, gt=0, le=1e3, description="Prior standard deviation of the entries of A."
    )
    initial_root: float = Field(
        default=0.05,
        gt=0,
        le=10,
        description="e: G starts uniform in (e / sqrt 2, e), the standard deviation is its square.",
    )
    num_train_samples: int = Field(
        default=1, ge=1, le=64, description="S: draws of A per optimiser step."
    )
    kl_lr: float = Field(
        default=0.0075, gt=0, le=1e3, description="Peak learning rate of the SGD step on A and G."
    )


def _shapes(specs: Sequence[TargetSpec], r: int, _: BlobConfig) -> Shapes:
    roots = {f"{spec.name}.{SIGMA_ROOT}": (r, spec.d_in) for spec in specs}
    return factor_shapes(specs, r) | roots


def _init(specs: Sequence[TargetSpec], r: int, seed: int, config: BlobConfig) -> dict[str, Tensor]:
    top = config.initial_root
    low = top / math.sqrt(2)
    params = init_factors(specs, r, seed)
    for spec in specs:
        name = f"{spec.name}.{SIGMA_ROOT}"
        drawn = torch.from_numpy(uniforms(("init", seed, spec.name, SIGMA_ROOT), r * spec.d_in))
        params[name] = (low + (top - low) * drawn).float().view(r, spec.d_in)
    return params


def _root(state: AdapterState, spec: TargetSpec) -> Tensor:
    return state.params[f"{spec.name}.{SIGMA_ROOT}"]


def _train_pack(state: AdapterState, config: BlobConfig, draw: Draw) -> SamplePack:
    modules = noisy_packs(
        state,
        lambda spec: _root(state, spec).square(),
        draw,
        kind=config.train_noise,
        training=True,
    )
    return SamplePack(draw.num_samples, state.scaling, modules)


def _predict_pack(state: AdapterState, config: BlobConfig, draw: Draw) -> SamplePack:
    modules = noisy_packs(
        state,
        lambda spec: _root(state, spec).detach().square(),
        draw,
        kind=config.test_noise,
        training=False,
    )
    return SamplePack(draw.num_samples, state.scaling, modules)


def _log_sigma(root: Tensor) -> Tensor:
    """Return log G^2 in float64; where |G| < e, the parabola 2 log e - 1 + (G / e)^2.

    Value and slope agree at e. Without it the slope 2 / G of a nearly vanished G would throw it far
    away; with it the slope is at most 2 / e, and every G but 0 is still pushed away from 0.

    Source:
        docs/method.md, section 9.2.
    """
    wide = root.double()
    near = wide.abs() < _LEAST_ROOT
    far = wide.masked_fill(near, _LEAST_ROOT).abs().log()  # finite, hence its gradient too
    parabola = math.log(_LEAST_ROOT) + 0.5 * ((wide / _LEAST_ROOT).square() - 1)
    return 2 * torch.where(near, parabola, far)


def _kl_terms(
    state: AdapterState, config: BlobConfig, point: TrainingPoint, _: SamplePack
) -> Mapping[str, KlTerm]:
    values = [
        normal_kl(
            state.params[f"{spec.name}.lora_A"],
            _log_sigma(_root(state, spec)),
            config.prior_sigma,
        ).sum()
        for spec in state.specs
    ]
    return {"weight_kl": KlTerm(torch.stack(values).sum(), burst_factor(config, point))}


def _param_groups(
    state: AdapterState, optim: OptimConfig, config: BlobConfig
) -> tuple[ParamGroup, ...]:
    roots = tuple(name for name in state.params if name.endswith(f".{SIGMA_ROOT}"))
    factors = tuple(name for name in state.params if name not in roots)
    means = tuple(name for name in factors if name.endswith(".lora_A"))
    return (
        ParamGroup(factors, optim.lr, optim.weight_decay),
        ParamGroup((*means, *roots), config.kl_lr, 0.0, optimizer="sgd"),
    )


def _summary(state: AdapterState, config: BlobConfig) -> dict[str, Any]:
    sigma = {s.name: _root(state, s).detach().double().square().cpu().numpy() for s in state.specs}
    values = np.concatenate([value.ravel() for value in sigma.values()])
    quantiles = (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0)
    return {
        "num_weights": int(values.size),
        "prior_sigma": config.prior_sigma,
        "sigma_quantiles": {f"{q:g}": float(np.quantile(values, q)) for q in quantiles},
        "mean_sigma": {name: float(value.mean()) for name, value in sigma.items()},
    }


METHOD = Method(
    settings=BlobConfig,
    stochastic=True,
    init=_init,
    shapes=_shapes,
    train_pack=_train_pack,
    predict_pack=_predict_pack,
    mean_pack=plain_pack,
    designs=designs_of_noise,
    kl_terms=_kl_terms,
    param_groups=_param_groups,
    divergence_apart=True,
    num_train_samples=lambda config: config.num_train_samples,
    summary=_summary,
)
