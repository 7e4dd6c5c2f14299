"""What the two amortised forms of DALorRA share: gate logits that depend on the input.

Each has DALorRA's global logits phi and a small net, zero at first, that adds a deviation. The
deviation is paid for by a divergence of its own.
"""

from collections.abc import Mapping
from typing import Literal

from pydantic import Field
from torch import Tensor

from dalorra_core.adapters.state import AdapterState
from dalorra_core.config import OptimConfig
from dalorra_core.methods.dalorra import (
    PHI,
    GateSettings,
    hard_gates,
    kl_factor,
    relaxed_gates,
)
from dalorra_core.methods.method import ParamGroup, TrainingPoint
from dalorra_core.objectives.elbo import KlTerm
from dalorra_core.objectives.kl import mask_kl

__all__ = ["AmortisedSettings", "GateKind", "gate_divergences", "gate_groups", "gates_of"]

GateKind = Literal["relaxed", "straight_through", "hard", "mean"]
"""How gates come from logits; ``mean`` takes the keep probabilities."""


class AmortisedSettings(GateSettings, frozen=True):
    """Bernoulli gates whose logits are phi plus a deviation that a net reads from the input."""

    width: int = Field(default=16, ge=1, le=1024, description="Hidden units of the gate net.")
    local_kl_weight: float = Field(
        default=1e-2,
        ge=0,
        le=1e3,
        description="beta: factor on the KL of the input's gates from the global ones. 1 counts it "
        "in full and pins the gates to phi; 0 leaves the deviation free.",
    )
    net_lr: float = Field(
        default=1e-3, gt=0, description="Peak learning rate of the gate net, by AdamW."
    )


def gates_of(phi: Tensor, uniforms: Tensor | None, kind: GateKind, tau: float) -> Tensor:
    """Return gates of the broadcast shape of logits and uniforms.

    Args:
        phi: Gate logits.
        uniforms: In (0, 1), on the device of ``phi``; None for ``mean``.
        kind: See ``GateKind``.
        tau: Relaxation temperature.
    """
    if uniforms is None or kind == "mean":
        return phi.sigmoid()
    if kind == "hard":
        return hard_gates(phi, uniforms)
    z = relaxed_gates(phi, uniforms, tau)
    return z + (hard_gates(phi, uniforms) - z).detach() if kind == "straight_through" else z


def gate_divergences(
    state: AdapterState, config: AmortisedSettings, point: TrainingPoint, local: Tensor
) -> Mapping[str, KlTerm]:
    """Return the global divergence, a term of the bound, and the local one with its factor beta.

    Args:
        state: The adapter.
        config: Weights.
        point: Where the run stands.
        local: The local divergence in nats per example, summed over the gates.

    Source:
        docs/method.md, eq. (A2).
    """
    value = mask_kl(state.params[PHI], config.prior_prob)
    return {
        "mask_kl": KlTerm(value, kl_factor(config, point)),
        "local_kl": KlTerm(local, config.local_kl_weight),
    }


def gate_groups(
    state: AdapterState, optim: OptimConfig, config: AmortisedSettings, net: tuple[str, ...]
) -> tuple[ParamGroup, ...]:
    """Return the groups of the factors, of phi and of the gate net, the last two without decay.

    Args:
        state: The adapter.
        optim: Of the factors.
        config: Rates of the others.
        net: Names of the net's parameters.
    """
    factors = tuple(name for name in state.params if name != PHI and name not in net)
    return (
        ParamGroup(factors, optim.lr, optim.weight_decay),
        ParamGroup((PHI,), config.mask_lr, 0.0),
        ParamGroup(net, config.net_lr, 0.0),
    )
