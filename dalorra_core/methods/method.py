"""What a method is: a handful of functions over explicit state, collected in one value."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from dalorra_core.adapters.inject import TargetSpec
from dalorra_core.adapters.pack import SamplePack
from dalorra_core.adapters.state import AdapterState
from dalorra_core.config import OptimConfig
from dalorra_core.objectives.elbo import KlTerm

__all__ = ["Draw", "Method", "ParamGroup"]


@dataclass(frozen=True)
class Draw:
    """Names a draw of M samples: equal draws give equal packs.

    Attributes:
        key: Stream name, such as (adapter sha256, seed).
        num_samples: M.
    """

    key: tuple[str | int, ...]
    num_samples: int


@dataclass(frozen=True)
class ParamGroup:
    """One optimiser group: parameter names, peak learning rate and decoupled weight decay."""

    names: tuple[str, ...]
    lr: float
    weight_decay: float


@dataclass(frozen=True)
class Method:
    """The functions that make a method; ``config`` below is its own settings class.

    Attributes:
        name: Name in configuration files and manifests.
        stochastic: False for point methods: one function, no epistemic part.
        init: (specs, r, seed, config) -> initial parameters.
        train_pack: (state, config, draw) -> pack of the S training samples, with gradients.
        predict_pack: (state, config, draw) -> pack of M posterior samples.
        mean_pack: (state, config) -> the one deterministic function at the posterior mean.
        kl_terms: (state, config, N) -> divergences with their factors in the loss.
        param_groups: (state, optim, config) -> optimiser groups covering every parameter.
        num_train_samples: config -> S.
        summary: state -> what ``dalorra inspect`` shows of the posterior, JSON values.
    """

    name: str
    stochastic: bool
    init: Callable[[Sequence[TargetSpec], int, int, Any], dict[str, Tensor]]
    train_pack: Callable[[AdapterState, Any, Draw], SamplePack]
    predict_pack: Callable[[AdapterState, Any, Draw], SamplePack]
    mean_pack: Callable[[AdapterState, Any], SamplePack]
    kl_terms: Callable[[AdapterState, Any, int], Mapping[str, KlTerm]]
    param_groups: Callable[[AdapterState, OptimConfig, Any], Sequence[ParamGroup]]
    num_train_samples: Callable[[Any], int]
    summary: Callable[[AdapterState], dict[str, Any]]
