"""Frozen gates: DALorRA whose gates stay at their prior, so that nothing about them is learned.

Everything else is DALorRA's, down to the random numbers: what the two differ in is what learning
the posterior brings.
"""

from dataclasses import replace
from typing import Literal

from dalorra_core.adapters.state import AdapterState
from dalorra_core.config import OptimConfig
from dalorra_core.methods import dalorra
from dalorra_core.methods.dalorra import PHI, GateDrawSettings
from dalorra_core.methods.method import ParamGroup, factors_and

__all__ = ["METHOD", "FrozenGatesConfig"]


class FrozenGatesConfig(GateDrawSettings, frozen=True):
    """Frozen gates: Bernoulli gates over the ranks, as DALorRA's, that are never learned."""

    name: Literal["frozen_gates"] = "frozen_gates"


def _param_groups(
    state: AdapterState, optim: OptimConfig, _: FrozenGatesConfig
) -> tuple[ParamGroup, ...]:
    return factors_and(state, optim, ParamGroup((PHI,), 0.0, 0.0))


METHOD = replace(
    dalorra.METHOD,
    settings=FrozenGatesConfig,
    kl_terms=lambda *_: {},  # it is 0 and stays so
    param_groups=_param_groups,
)
