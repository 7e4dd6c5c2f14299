"""DALorRA: dW = B diag(z) A with variational Bernoulli gates z over the ranks.

One logit phi per adapted module and rank; q(z = 1) = sigmoid(phi). Training draws relaxed
binary-Concrete gates, prediction hard ones. Equation numbers are those of docs/method.md.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dalorra_core.adapters.inject import TargetSpec
from dalorra_core.adapters.pack import SamplePack
from dalorra_core.adapters.state import AdapterState, init_factors, module_packs
from dalorra_core.config import DalorraConfig, OptimConfig
from dalorra_core.methods.method import Draw, Method, ParamGroup
from dalorra_core.objectives.elbo import KlTerm
from dalorra_core.objectives.kl import mask_kl
from dalorra_core.sampling.designs import iid_uniforms

__all__ = ["METHOD", "hard_gates", "relaxed_gates"]

PHI = "phi"

_UNIFORM_MARGIN = 1e-6
"""Training uniforms stay this far from 0 and 1, which bounds logit(v) by 13.8."""


def relaxed_gates(phi: Tensor, uniforms: Tensor, tau: float) -> Tensor:
    """Return binary-Concrete gates in (0, 1), differentiable in ``phi``.

    Args:
        phi: Gate logits (L, r).
        uniforms: (M, L, r) in (0, 1).
        tau: Relaxation temperature, positive; lower is nearer to hard.

    Returns:
        (M, L, r), float32.

    Source:
        docs/method.md, eq. (5).
    """
    v = uniforms.clamp(_UNIFORM_MARGIN, 1 - _UNIFORM_MARGIN)
    noise = (v.log() - (-v).log1p()).float()  # logistic noise, (M, L, r)
    return ((phi + noise.to(phi.device)) / tau).sigmoid()


def hard_gates(phi: Tensor, uniforms: Tensor) -> Tensor:
    """Return gates in {0, 1} with P(z = 1) = sigmoid(phi), from the same noise as the relaxed.

    z = 1 where phi + logit(v) > 0, that is where v > 1 - sigmoid(phi): the limit of
    ``relaxed_gates`` as tau goes to 0.

    Args:
        phi: Gate logits (L, r).
        uniforms: (M, L, r) in (0, 1).
    """
    drop_prob = (-phi.detach().double()).sigmoid().cpu()  # (L, r)
    return (uniforms > drop_prob).float()  # (M, L, r)


def _init(
    specs: Sequence[TargetSpec], r: int, seed: int, config: DalorraConfig
) -> dict[str, Tensor]:
    logit = math.log(config.prior_prob) - math.log1p(-config.prior_prob)
    return init_factors(specs, r, seed) | {PHI: torch.full((len(specs), r), logit)}


def _uniforms(state: AdapterState, draw: Draw) -> Tensor:
    return iid_uniforms((*draw.key, "z"), draw.num_samples, len(state.specs), state.r)


def _train_pack(state: AdapterState, config: DalorraConfig, draw: Draw) -> SamplePack:
    phi, uniforms = state.params[PHI], _uniforms(state, draw)
    z = relaxed_gates(phi, uniforms, config.tau)
    if config.train_masks == "straight_through":
        z = z + (hard_gates(phi, uniforms).to(z.device) - z).detach()
    return SamplePack(draw.num_samples, state.scaling, module_packs(state, z))


def _predict_pack(state: AdapterState, config: DalorraConfig, draw: Draw) -> SamplePack:
    phi, uniforms = state.params[PHI], _uniforms(state, draw)
    hard = config.test_masks == "hard"
    z = hard_gates(phi, uniforms) if hard else relaxed_gates(phi, uniforms, config.tau)
    return SamplePack(draw.num_samples, state.scaling, module_packs(state, z))


def _mean_pack(state: AdapterState, _: DalorraConfig) -> SamplePack:
    keep_prob = state.params[PHI].sigmoid().unsqueeze(0)  # (1, L, r)
    return SamplePack(1, state.scaling, module_packs(state, keep_prob))


def _kl_terms(
    state: AdapterState, config: DalorraConfig, num_examples: int
) -> Mapping[str, KlTerm]:
    scale = 1.0 / num_examples if config.kl_scale == "per_example" else 1.0
    value = mask_kl(state.params[PHI], config.prior_prob)
    return {"mask_kl": KlTerm(value, config.kl_weight * scale)}


def _param_groups(
    state: AdapterState, optim: OptimConfig, config: DalorraConfig
) -> tuple[ParamGroup, ...]:
    factors = tuple(name for name in state.params if name != PHI)
    return (
        ParamGroup(factors, optim.lr, optim.weight_decay),
        ParamGroup((PHI,), config.mask_lr, 0.0),  # decay would pull p towards 0.5
    )


def _summary(state: AdapterState) -> dict[str, Any]:
    keep_prob = state.params[PHI].detach().double().sigmoid().cpu()  # (L, r)
    quantiles = torch.tensor([0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0], dtype=torch.float64)
    values = keep_prob.flatten().quantile(quantiles)
    return {
        "num_gates": keep_prob.numel(),
        "keep_prob_quantiles": {
            f"{float(q):g}": float(v) for q, v in zip(quantiles, values, strict=True)
        },
        "expected_rank": {
            spec.name: float(row.sum()) for spec, row in zip(state.specs, keep_prob, strict=True)
        },
        "keep_prob": {
            spec.name: [float(p) for p in row]
            for spec, row in zip(state.specs, keep_prob, strict=True)
        },
    }


METHOD = Method(
    name="dalorra",
    stochastic=True,
    init=_init,
    train_pack=_train_pack,
    predict_pack=_predict_pack,
    mean_pack=_mean_pack,
    kl_terms=_kl_terms,
    param_groups=_param_groups,
    num_train_samples=lambda config: config.num_train_samples,
    summary=_summary,
)
