"""DALorRA: dW = B diag(z) A with variational Bernoulli gates z over the ranks.

One logit phi per adapted module and rank; q(z = 1) = sigmoid(phi). Training draws relaxed
binary-Concrete gates, prediction hard ones. Equation numbers are those of docs/method.md.
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
from dalorra_core.config import MethodSettings, OptimConfig
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
from dalorra_core.sampling.designs import sample_uniforms

__all__ = [
    "METHOD",
    "PHI",
    "DalorraConfig",
    "GateDrawSettings",
    "GateKind",
    "GateSettings",
    "gate_summary",
    "gate_uniforms",
    "gates_of",
    "hard_gates",
    "kl_factor",
    "prediction_gates",
    "prior_logits",
    "relaxed_gates",
    "training_gates",
]

PHI = "phi"
"""Name of the gate logits (L, r)."""

_UNIFORM_MARGIN = 1e-6
"""Training uniforms stay this far from 0 and 1, which bounds logit(v) by 13.8."""

GateKind = Literal["relaxed", "straight_through", "hard", "mean"]
"""How gates come from logits; ``mean`` takes the keep probabilities."""


class GateDrawSettings(MethodSettings, frozen=True):
    """Bernoulli gates over the ranks: their prior and their draws."""

    prior_prob: float = Field(
        default=0.5, gt=0, lt=1, description="p0: prior and initial keep probability of a rank."
    )
    tau: float = Field(
        default=2 / 3, gt=0, le=5, description="Temperature of the relaxed gates in training."
    )
    num_train_samples: int = Field(
        default=1,
        ge=1,
        le=64,
        description="S: gate draws per optimiser step; log-likelihoods are averaged.",
    )
    train_masks: Literal["relaxed", "straight_through"] = Field(
        default="relaxed",
        description="relaxed: binary-Concrete; straight_through: hard forward, relaxed gradient.",
    )
    test_masks: Literal["hard", "relaxed"] = Field(
        default="hard",
        description="Gates at prediction: hard Bernoulli draws, or relaxed at tau.",
    )


class GateSettings(GateDrawSettings, frozen=True):
    """Bernoulli gates that are learned: the weight of their KL and their learning rate."""

    kl_weight: float = Field(default=1.0, ge=0, description="Factor on the KL; 1 is the ELBO.")
    kl_scale: Literal["per_example", "unit"] = Field(
        default="per_example",
        description="per_example: KL times kl_weight / N (the ELBO); unit: times kl_weight.",
    )
    mask_lr: float = Field(
        default=1e-2, gt=0, description="Peak learning rate of the gate logits phi."
    )


class DalorraConfig(GateSettings, frozen=True):
    """DALorRA: variational Bernoulli gates over the ranks of every adapted module."""

    name: Literal["dalorra"] = "dalorra"


def relaxed_gates(phi: Tensor, uniforms: Tensor, tau: float) -> Tensor:
    """Return binary-Concrete gates in (0, 1), differentiable in ``phi``.

    Args:
        phi: Gate logits (L, r), or any shape that broadcasts against the uniforms.
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
        phi: Gate logits (L, r), or any shape that broadcasts against the uniforms.
        uniforms: (M, L, r) in (0, 1); the gates lie where they do.
    """
    drop_prob = (-phi.detach().double()).sigmoid().to(uniforms.device)  # (L, r)
    return (uniforms > drop_prob).float()  # (M, L, r)


def gates_of(phi: Tensor, uniforms: Tensor | None, kind: GateKind, tau: float) -> Tensor:
    """Return gates of the broadcast shape of logits and uniforms.

    Args:
        phi: Gate logits.
        uniforms: In (0, 1); None for ``mean``.
        kind: See ``GateKind``.
        tau: Relaxation temperature.
    """
    if uniforms is None or kind == "mean":
        return phi.sigmoid()
    if kind == "hard":
        return hard_gates(phi, uniforms)
    z = relaxed_gates(phi, uniforms, tau)
    if kind == "straight_through":
        z = z + (hard_gates(phi, uniforms).to(z.device) - z).detach()
    return z


def training_gates(state: AdapterState, config: GateDrawSettings, draw: Draw) -> Tensor:
    """Return the gates of a training step (S, L, r), differentiable in ``phi``."""
    return gates_of(state.params[PHI], gate_uniforms(state, draw), config.train_masks, config.tau)


def prediction_gates(state: AdapterState, config: GateDrawSettings, draw: Draw) -> Tensor:
    """Return the gates of a prediction (M, L, r)."""
    return gates_of(state.params[PHI], gate_uniforms(state, draw), config.test_masks, config.tau)


def prior_logits(num_modules: int, r: int, config: GateDrawSettings) -> Tensor:
    """Return the logits of the prior (L, r), where ``phi`` starts."""
    logit = math.log(config.prior_prob) - math.log1p(-config.prior_prob)
    return torch.full((num_modules, r), logit)


def kl_factor(config: GateSettings, point: TrainingPoint) -> float:
    """Return the factor of a divergence of the whole posterior in the loss per example."""
    scale = 1.0 / point.num_examples if config.kl_scale == "per_example" else 1.0
    return config.kl_weight * scale


def gate_uniforms(state: AdapterState, draw: Draw) -> Tensor:
    """Return the uniforms behind the gates, (M, L, r) in float64 on the CPU."""
    shape = (len(state.specs), state.r)
    return sample_uniforms((*draw.key, "z"), draw.num_samples, shape, draw.design)


def _shapes(specs: Sequence[TargetSpec], r: int, _: GateDrawSettings) -> Shapes:
    return factor_shapes(specs, r) | {PHI: (len(specs), r)}


def _init(
    specs: Sequence[TargetSpec], r: int, seed: int, config: GateDrawSettings
) -> dict[str, Tensor]:
    return init_factors(specs, r, seed) | {PHI: prior_logits(len(specs), r, config)}


def _train_pack(state: AdapterState, config: GateDrawSettings, draw: Draw) -> SamplePack:
    z = training_gates(state, config, draw)
    return SamplePack(draw.num_samples, state.scaling, module_packs(state, z))


def _predict_pack(state: AdapterState, config: GateDrawSettings, draw: Draw) -> SamplePack:
    z = prediction_gates(state, config, draw)
    return SamplePack(draw.num_samples, state.scaling, module_packs(state, z))


def _mean_pack(state: AdapterState, _: GateDrawSettings) -> SamplePack:
    keep_prob = state.params[PHI].sigmoid().unsqueeze(0)  # (1, L, r)
    return SamplePack(1, state.scaling, module_packs(state, keep_prob))


def _kl_terms(
    state: AdapterState, config: DalorraConfig, point: TrainingPoint, _: SamplePack
) -> Mapping[str, KlTerm]:
    value = mask_kl(state.params[PHI], config.prior_prob)
    return {"mask_kl": KlTerm(value, kl_factor(config, point))}


def _param_groups(
    state: AdapterState, optim: OptimConfig, config: DalorraConfig
) -> tuple[ParamGroup, ...]:
    # decay would pull p towards 0.5
    return factors_and(state, optim, ParamGroup((PHI,), config.mask_lr, 0.0))


def gate_summary(state: AdapterState, _: MethodSettings) -> dict[str, Any]:
    """Return what the keep probabilities look like, as JSON values."""
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
    settings=DalorraConfig,
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
    summary=gate_summary,
)
