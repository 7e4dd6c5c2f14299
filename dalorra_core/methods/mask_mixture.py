"""DALorRA whose gate posterior is a mixture of K products of Bernoulli distributions.

A sample first picks a component k with probability w_k, then draws the gates of that component.
Gates of all modules so depend on each other through k. K = 1 is DALorRA, with the same draws.
Equation numbers are those of docs/method.md.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
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
    gate_uniforms,
    gates_of,
    hard_gates,
    kl_factor,
    prior_logits,
)
from dalorra_core.methods.method import (
    Draw,
    Method,
    ParamGroup,
    TrainingPoint,
    every_design,
    factors_and,
)
from dalorra_core.objectives.elbo import KlTerm
from dalorra_core.objectives.kl import mask_kl
from dalorra_core.sampling.designs import iid_uniforms, spread_uniforms
from dalorra_core.sampling.streams import normals, uniforms

__all__ = ["METHOD", "WEIGHTS", "MaskMixtureConfig", "component_information", "log_prob"]

WEIGHTS = "component_logits"
"""Name of the logits of the weights w (K,); phi is (K, L, r)."""


class MaskMixtureConfig(GateSettings, frozen=True):
    """Mixture of masks: DALorRA with K products of Bernoulli gates in place of one.

    The KL is bounded by the mean of the components' KLs; at prediction the samples are spread over
    the components in proportion to their weights.
    """

    name: Literal["mask_mixture"] = "mask_mixture"
    num_components: int = Field(default=4, ge=1, le=32, description="K: components.")
    component_spread: float = Field(
        default=0.5,
        ge=0,
        le=10,
        description="Standard deviation of phi around logit(p0) at the start, where K > 1; "
        "0 leaves all components equal for ever.",
    )
    diversity: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="Share of the information between component and gates that is taken off the "
        "KL's bound, estimated from hard gates; 1 is the KL itself.",
    )
    diversity_samples: int = Field(
        default=8, ge=2, le=256, description="Hard gates of each component in that estimate."
    )


def _component_log_probs(phi: Tensor, z: Tensor) -> Tensor:
    """Return ln q_k(z) of every component, (..., K), for phi (K, L, r) and z (..., L, r)."""
    shut = F.logsigmoid(-phi).sum((-2, -1))  # (K,), as z phi + ln sigmoid(-phi) is each gate's part
    dtype = torch.promote_types(z.dtype, phi.dtype)
    return torch.einsum("...lr,klr->...k", z.to(dtype), phi.to(dtype)) + shut


def log_prob(state: AdapterState, z: Tensor) -> Tensor:
    """Return the posterior's log-probability of hard masks, in nats.

    Args:
        state: The adapter; of its parameters only phi and the weights matter.
        z: Gates in {0, 1}, (M, L, r).

    Returns:
        (M,), with gradient.

    Source:
        docs/method.md, eq. (M1).
    """
    weights = state.params[WEIGHTS].log_softmax(0)  # (K,)
    return (weights + _component_log_probs(state.params[PHI], z)).logsumexp(-1)


def component_information(phi: Tensor, weight_logits: Tensor, noise: Tensor) -> Tensor:
    """Return an estimate of the mutual information of component and gates, in nats.

    Value and gradient are unbiased: the gates are hard, so the gradient in what they are drawn from
    is the score function's, each sample measured against the mean of the others.

    Args:
        phi: Gate logits (K, L, r).
        weight_logits: (K,).
        noise: Uniforms (n, K, L, r) in (0, 1), n at least 2.

    Returns:
        Scalar, float64. The value estimated lies in [0, ln K].

    Source:
        docs/method.md, eq. (M3).
    """
    wide, log_weights = phi.double(), weight_logits.double().log_softmax(0)
    weights = log_weights.exp()
    z = hard_gates(wide, noise).to(wide)  # (n, K, L, r)
    log_probs = _component_log_probs(wide, z)  # (n, K, K); the last axis is whose probability
    own = log_probs.diagonal(dim1=-2, dim2=-1)  # (n, K)
    gain = own - (log_weights + log_probs).logsumexp(-1)
    n = len(gain)
    against_others = ((gain - gain.mean(0)) * n / (n - 1)).detach()
    score = against_others * (own - own.detach())  # zero, with a gradient
    return (weights * gain.mean(0) + weights.detach() * score.mean(0)).sum()


def _shapes(specs: Sequence[TargetSpec], r: int, config: MaskMixtureConfig) -> Shapes:
    k = config.num_components
    return factor_shapes(specs, r) | {PHI: (k, len(specs), r), WEIGHTS: (k,)}


def _init(
    specs: Sequence[TargetSpec], r: int, seed: int, config: MaskMixtureConfig
) -> dict[str, Tensor]:
    phi = prior_logits(len(specs), r, config).repeat(config.num_components, 1, 1)  # (K, L, r)
    if config.num_components > 1:
        noise = torch.from_numpy(normals(("init", seed, PHI), phi.numel())).float()
        phi = phi + config.component_spread * noise.view_as(phi)
    return init_factors(specs, r, seed) | {PHI: phi, WEIGHTS: torch.zeros(config.num_components)}


def _picked(state: AdapterState, draw: Draw, tau: float) -> Tensor:
    """Return which component each training sample has, one-hot (S, K).

    Hard in the forward pass; the gradient is that of the softmax of the same Gumbel noise at
    temperature tau.
    """
    logits = state.params[WEIGHTS].log_softmax(0)  # (K,)
    drawn = [uniforms((*draw.key, "component", s), len(logits)) for s in range(draw.num_samples)]
    gumbel = -(-torch.from_numpy(np.stack(drawn)).log()).log()  # (S, K)
    noisy = logits + gumbel.float().to(logits.device)
    soft = (noisy / tau).softmax(-1)
    hard = F.one_hot(noisy.argmax(-1), len(logits)).to(soft)
    return hard + (soft - soft.detach())


def _train_pack(state: AdapterState, config: MaskMixtureConfig, draw: Draw) -> SamplePack:
    phi = state.params[PHI]
    noise = gate_uniforms(state, draw).unsqueeze(1)  # (S, 1, L, r): the same for every component
    z = gates_of(phi, noise, config.train_masks, config.tau)  # (S, K, L, r)
    picked = _picked(state, draw, config.tau)
    z = (picked[:, :, None, None] * z).sum(1)  # (S, L, r)
    return SamplePack(draw.num_samples, state.scaling, module_packs(state, z))


def _components(state: AdapterState, draw: Draw) -> Tensor:
    """Return which component each sample of a prediction has, (M,)."""
    edges = state.params[WEIGHTS].detach().double().cpu().softmax(0).cumsum(0)
    points = spread_uniforms((*draw.key, "component"), draw.num_samples, len(edges))
    return torch.searchsorted(edges[:-1].contiguous(), points, right=True)


def _predict_pack(state: AdapterState, config: MaskMixtureConfig, draw: Draw) -> SamplePack:
    phi, noise = state.params[PHI], gate_uniforms(state, draw)
    own = phi[_components(state, draw).to(phi.device)]  # (M, L, r)
    z = gates_of(own, noise, config.test_masks, config.tau)
    return SamplePack(draw.num_samples, state.scaling, module_packs(state, z))


def _keep_prob(state: AdapterState) -> Tensor:
    """Return the mean of every gate under the mixture, (L, r)."""
    weights = state.params[WEIGHTS].softmax(0)
    return (weights[:, None, None] * state.params[PHI].sigmoid()).sum(0)


def _mean_pack(state: AdapterState, _: MaskMixtureConfig) -> SamplePack:
    return SamplePack(1, state.scaling, module_packs(state, _keep_prob(state).unsqueeze(0)))


def _kl_terms(
    state: AdapterState, config: MaskMixtureConfig, point: TrainingPoint, _: SamplePack
) -> Mapping[str, KlTerm]:
    phi, logits = state.params[PHI], state.params[WEIGHTS]
    each = torch.stack([mask_kl(component, config.prior_prob) for component in phi])  # (K,)
    bound = (logits.softmax(0) * each).sum()
    if config.diversity > 0:
        key, n = (*point.key, "information"), config.diversity_samples
        noise = iid_uniforms(key, n, phi.shape[0] * phi.shape[1], phi.shape[2]).view(n, *phi.shape)
        bound = bound - config.diversity * component_information(phi, logits, noise)
    return {"mask_kl_bound": KlTerm(bound, kl_factor(config, point))}


def _param_groups(
    state: AdapterState, optim: OptimConfig, config: MaskMixtureConfig
) -> tuple[ParamGroup, ...]:
    # decay would pull p to 0.5 and the weights together
    return factors_and(state, optim, ParamGroup((PHI, WEIGHTS), config.mask_lr, 0.0))


def _summary(state: AdapterState, config: MaskMixtureConfig) -> dict[str, Any]:
    keep_prob = _keep_prob(state).detach().double()
    mean = replace(state, params={PHI: keep_prob.logit()})
    each = state.params[PHI].detach().double().sigmoid()  # (K, L, r)
    return {
        **gate_summary(mean, config),
        "component_weights": state.params[WEIGHTS].detach().double().softmax(0).tolist(),
        "expected_rank_of_components": each.sum((-2, -1)).tolist(),
    }


METHOD = Method(
    settings=MaskMixtureConfig,
    stochastic=True,
    init=_init,
    shapes=_shapes,
    train_pack=_train_pack,
    predict_pack=_predict_pack,
    mean_pack=_mean_pack,
    designs=every_design,
    kl_terms=_kl_terms,
    param_groups=_param_groups,
    num_train_samples=lambda config: config.num_train_samples,
    summary=_summary,
)
