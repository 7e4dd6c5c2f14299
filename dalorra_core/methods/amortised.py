"""What the two amortised forms of DALorRA share: gate logits that depend on the input.

Each has DALorRA's global logits phi and a small net, zero at first, that adds a deviation. The
deviation is paid for by a divergence of its own.
"""

from collections.abc import Mapping

from pydantic import Field
from torch import Tensor

from dalorra_core.adapters.state import AdapterState
from dalorra_core.config import OptimConfig
from dalorra_core.methods.dalorra import PHI, GateSettings, kl_factor
from dalorra_core.methods.method import ParamGroup, TrainingPoint, factors_and
from dalorra_core.objectives.elbo import KlTerm
from dalorra_core.objectives.kl import mask_kl

__all__ = ["AmortisedSettings", "gate_divergences", "gate_groups"]


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
    return factors_and(
        state,
        optim,
        ParamGroup((PHI,), config.mask_lr, 0.0),
        ParamGroup(net, config.net_lr, 0.0),
    )
