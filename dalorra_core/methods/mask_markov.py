"""DALorRA with gates that follow the gates of the layer below: a Markov chain per projection.

The modules of one projection, such as all q_proj, form a chain in the order of the layers. Given
the gates of the module before it, a module's gates are independent Bernoulli ones whose logits are
``phi_l + C_l (z_before - sigmoid(phi_before))``. All C zero is DALorRA, with the same draws.
Equation numbers are those of docs/method.md.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F  # noqa: N812
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

__all__ = ["LINKS", "METHOD", "MaskMarkovConfig", "log_prob"]

LINKS = "links"
"""Name of the matrices C (number of links, r, r), in the order of the modules they lead to."""


class MaskMarkovConfig(GateSettings, frozen=True):
    """Markov masks: DALorRA whose gates depend on those of the layer below.

    One chain for each projection; the KL is exact given the gates below, and averaged over the
    gates that the forward pass drew.
    """

    name: Literal["mask_markov"] = "mask_markov"


@dataclass(frozen=True)
class _Link:
    """Module ``to`` depends on module ``before``, both as places in the specs."""

    before: int
    to: int


def _links(specs: Sequence[TargetSpec]) -> list[_Link]:
    """Return who depends on whom; what has no layer number, such as lm_head, stands alone."""
    last: dict[str, int] = {}
    found = []
    for place, spec in enumerate(specs):
        if spec.layer is None:
            continue
        projection = spec.name.replace(f"layers.{spec.layer}.", "", 1)
        if projection in last:
            found.append(_Link(last[projection], place))
        last[projection] = place
    return found


def _pulled(params: Mapping[str, Tensor], link: int, before: int, z: Tensor) -> Tensor:
    """Return ``C (z - sigmoid(phi_before))`` for gates z (M, r) of the module before."""
    off = z - params[PHI][before].sigmoid()  # (M, r)
    # A sum of products instead of a product of matrices: autocast leaves it in full precision.
    return (off.unsqueeze(-2) * params[LINKS][link]).sum(-1)  # (M, r)


def _walk(
    specs: Sequence[TargetSpec],
    params: Mapping[str, Tensor],
    uniforms: Tensor,
    gates: Callable[[Tensor, Tensor], Tensor],
) -> Tensor:
    """Draw every module's gates given those before it.

    Args:
        specs: The modules.
        params: phi and links.
        uniforms: (M, L, r).
        gates: (logits (M, r), uniforms (M, r)) -> gates (M, r).

    Returns:
        (M, L, r).
    """
    incoming = {link.to: (number, link.before) for number, link in enumerate(_links(specs))}
    drawn: list[Tensor] = []
    for place in range(len(specs)):
        logits = params[PHI][place].expand(len(uniforms), -1)  # (M, r)
        if place in incoming:
            number, before = incoming[place]
            logits = logits + _pulled(params, number, before, drawn[before].to(logits))
        drawn.append(gates(logits, uniforms[:, place]))
    return torch.stack(drawn, dim=1)


def _conditional_logits(
    specs: Sequence[TargetSpec], params: Mapping[str, Tensor], z: Tensor
) -> Tensor:
    """Return the logits (M, L, r) of every module's gates given those of z (M, L, r) before it."""
    logits = list(params[PHI].expand(len(z), -1, -1).unbind(1))
    for number, link in enumerate(_links(specs)):
        logits[link.to] = logits[link.to] + _pulled(params, number, link.before, z[:, link.before])
    return torch.stack(logits, dim=1)


def log_prob(state: AdapterState, z: Tensor) -> Tensor:
    """Return the posterior's log-probability of hard masks, in nats.

    Args:
        state: The adapter; of its parameters only phi and the links matter.
        z: Gates in {0, 1}, (M, L, r).

    Returns:
        (M,), with gradient.

    Source:
        docs/method.md, eq. (M4).
    """
    logits = _conditional_logits(state.specs, state.params, z)
    return (z * F.logsigmoid(logits) + (1 - z) * F.logsigmoid(-logits)).sum((-2, -1))


def _shapes(specs: Sequence[TargetSpec], r: int, _: MaskMarkovConfig) -> Shapes:
    own = {PHI: (len(specs), r), LINKS: (len(_links(specs)), r, r)}
    return factor_shapes(specs, r) | own


def _init(
    specs: Sequence[TargetSpec], r: int, seed: int, config: MaskMarkovConfig
) -> dict[str, Tensor]:
    own = {
        PHI: prior_logits(len(specs), r, config),
        LINKS: torch.zeros(len(_links(specs)), r, r),
    }
    return init_factors(specs, r, seed) | own


def _train_pack(state: AdapterState, config: MaskMarkovConfig, draw: Draw) -> SamplePack:
    gates = partial(gates_of, kind=config.train_masks, tau=config.tau)
    z = _walk(state.specs, state.params, gate_uniforms(state, draw), gates)
    return SamplePack(draw.num_samples, state.scaling, module_packs(state, z))


def _predict_pack(state: AdapterState, config: MaskMarkovConfig, draw: Draw) -> SamplePack:
    gates = partial(gates_of, kind=config.test_masks, tau=config.tau)
    # In float64, so that the last digits of a sum, which differ between machines, move no gate.
    wide = {name: state.params[name].detach().double() for name in (PHI, LINKS)}
    z = _walk(state.specs, wide, gate_uniforms(state, draw), gates).float()
    return SamplePack(draw.num_samples, state.scaling, module_packs(state, z))


def _mean_pack(state: AdapterState, _: MaskMarkovConfig) -> SamplePack:
    """Return the function of the gates sigmoid(phi): each at its mean given the mean before it."""
    keep_prob = state.params[PHI].sigmoid().unsqueeze(0)  # (1, L, r)
    return SamplePack(1, state.scaling, module_packs(state, keep_prob))


def _kl_terms(
    state: AdapterState, config: MaskMarkovConfig, point: TrainingPoint, pack: SamplePack
) -> Mapping[str, KlTerm]:
    gates = [pack.modules[spec.name].z for spec in state.specs]
    z = torch.stack([g for g in gates if g is not None], dim=1)  # (S, L, r)
    logits = _conditional_logits(state.specs, state.params, z)
    value = mask_kl(logits.flatten(0, 1), config.prior_prob) / len(z)
    return {"mask_kl": KlTerm(value, kl_factor(config, point))}


def _param_groups(
    state: AdapterState, optim: OptimConfig, config: MaskMarkovConfig
) -> tuple[ParamGroup, ...]:
    # decay would pull p to 0.5 and the gates apart
    return factors_and(state, optim, ParamGroup((PHI, LINKS), config.mask_lr, 0.0))


def _summary(state: AdapterState, config: MaskMarkovConfig) -> dict[str, Any]:
    names = [state.specs[link.to].name for link in _links(state.specs)]
    strength = state.params[LINKS].detach().double().flatten(1).abs().amax(-1).tolist()
    return {
        **gate_summary(state, config),  # with the gates below at their means
        "num_links": len(names),
        "strongest_link": dict(zip(names, strength, strict=True)),
    }


METHOD = Method(
    settings=MaskMarkovConfig,
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
