"""What a method is: a handful of functions over explicit state, collected in one value."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

from dalorra_core.adapters.gradients import LabelGradients
from dalorra_core.adapters.inject import TargetSpec
from dalorra_core.adapters.pack import SamplePack
from dalorra_core.adapters.state import AdapterState, Shapes, factor_shapes
from dalorra_core.config import Design, MethodSettings, OptimConfig
from dalorra_core.errors import ConfigError
from dalorra_core.objectives.elbo import KlTerm, mean_nll
from dalorra_core.sampling.designs import DESIGNS

__all__ = [
    "Draw",
    "FitContext",
    "Method",
    "ParamGroup",
    "TrainingPoint",
    "every_design",
    "factors_and",
    "method_by_name",
]


@dataclass(frozen=True)
class Draw:
    """Names a draw of M samples: equal draws give equal packs.

    Attributes:
        key: Stream name, such as (adapter sha256, seed).
        num_samples: M.
        part: In training, which micro-batch; the samples are the same for all of them, noise that
            each row has for itself is not.
        first_row: In training, the place in the micro-batch of the first row here: processes that
            share the rows of a micro-batch share its noise in the same way.
        design: How the samples are drawn together; training leaves it at iid.
    """

    key: tuple[str | int, ...]
    num_samples: int
    part: int = 0
    first_row: int = 0
    design: Design = "iid"

    @property
    def row_key(self) -> tuple[str | int, ...]:
        """Stream name of the noise that each row of a training batch has for itself."""
        return (*self.key, "part", self.part)


@dataclass(frozen=True)
class ParamGroup:
    """Parameters that one optimiser moves at one peak learning rate.

    Attributes:
        names: Parameters; one may be in a group of each optimiser.
        lr: Peak learning rate; every group follows the run's schedule.
        weight_decay: Decoupled weight decay.
        optimizer: AdamW, or plain SGD without momentum.
    """

    names: tuple[str, ...]
    lr: float
    weight_decay: float
    optimizer: Literal["adamw", "sgd"] = "adamw"


def factors_and(
    state: AdapterState, optim: OptimConfig, *own: ParamGroup
) -> tuple[ParamGroup, ...]:
    """Return the groups of a method's own parameters after one of the rest, LoRA's factors.

    Args:
        state: The adapter.
        optim: Rate and decay of the rest.
        own: Groups of the method's own parameters.
    """
    taken = {name for group in own for name in group.names}
    rest = tuple(name for name in state.params if name not in taken)
    return (ParamGroup(rest, optim.lr, optim.weight_decay), *own) if rest else own


def method_by_name(value: object) -> object:
    """Return the settings of a method that is given by its name alone; anything else as it is."""
    return {"name": value} if isinstance(value, str) else value


@dataclass(frozen=True)
class TrainingPoint:
    """Where a run stands; weights of divergences may depend on it.

    Attributes:
        step: Optimiser steps already taken.
        num_steps: Optimiser steps of the whole run.
        num_examples: N, training rows.
        batch_size: Rows of one optimiser step, of all processes together.
        key: Name of the step's training draw, for divergences that are estimated from samples.
    """

    step: int
    num_steps: int
    num_examples: int
    batch_size: int
    key: tuple[str | int, ...] = ()


@dataclass(frozen=True)
class FitContext:
    """What a fit after training may ask of the trained model.

    Attributes:
        num_rows: N, training rows; their indices are 0 .. N-1.
        seed: Run seed, for named streams.
        predict: (pack, row indices) -> (M, n, C) log-probabilities over each row's own labels.
        gradients: (pack of one function, row indices) -> label gradients, a few rows at a time, in
            any order.
        report: Takes lines for the user.
    """

    num_rows: int
    seed: int
    predict: Callable[[SamplePack, Sequence[int]], Tensor]
    gradients: Callable[[SamplePack, Sequence[int]], Iterator[LabelGradients]]
    report: Callable[[str], None]


def every_design(_: Any) -> tuple[Design, ...]:
    """Return all designs: for methods whose draws are numbers that a whole sample shares."""
    return DESIGNS


def _independent_samples(_: Any) -> tuple[Design, ...]:
    return ("iid",)


def _no_terms(*_: Any) -> Mapping[str, KlTerm]:
    return {}


def _likelihood(logits: Tensor, labels: Tensor, allowed: Tensor | None, _: Any) -> Tensor:
    return mean_nll(logits, labels, allowed)


def _plain_factors(specs: Sequence[TargetSpec], r: int, _: Any) -> Shapes:
    return factor_shapes(specs, r)


def _all_in_one_group(state: AdapterState, optim: OptimConfig, _: Any) -> tuple[ParamGroup, ...]:
    return (ParamGroup(tuple(state.params), optim.lr, optim.weight_decay),)


@dataclass(frozen=True, kw_only=True)
class Method:
    """The functions that make a method; ``config`` below is a value of its ``settings`` class.

    Training minimises ``data_loss + sum of weight * divergence``. A method that is fitted after
    training trains as another one first.

    Attributes:
        settings: Its settings; the default of ``name`` there is the method's name.
        stochastic: False for point methods: one function, no epistemic part.
        init: (specs, r, seed, config) -> initial parameters.
        train_pack: (state, config, draw) -> pack of the S training samples, with gradients.
        predict_pack: (state, config, draw) -> pack of M posterior samples.
        mean_pack: (state, config) -> the one deterministic function at the posterior mean.
        designs: config -> the designs that ``predict_pack`` follows; a prediction by another one
            is refused.
        shapes: (specs, r, config) -> shape of every stored tensor; allocates nothing, because what
            it says is compared with files of unknown origin before anything is made of that size.
        kl_terms: (state, config, point, pack) -> divergences with their factors in the loss; the
            pack is the one that the forward pass used, with what its transforms noted.
        data_loss: (logits (S, B, C), labels, allowed, config) -> the loss on the data, nats.
        param_groups: (state, optim, config) -> optimiser groups covering every parameter.
        divergence_apart: Take two steps for each batch: AdamW on the data loss, then SGD on the
            divergences, whose gradients add to what the first left on SGD's own parameters.
        num_train_samples: config -> S.
        num_functions: config -> how many functions there are, whatever M is asked for; None where
            any number may be drawn.
        one_answer: config -> whether there is one answer without an epistemic part all the same:
            the softmax of the mean logits of the functions, all of them in ``mean_pack``; or, with
            ``logit_covariance``, the probit approximation.
        members: config -> how many adapters are trained one after the other, each with its own
            seed and order of the rows.
        join: States of the members -> parameters of the whole.
        trained_as: config -> settings under which the parameters of each member are trained, before
            ``join`` and ``fit``.
        fit: (state, config, context) -> all parameters after a fit that follows training; ``init``
            and ``train_pack`` are then those of the method it is trained as.
        gradient_modules: (specs, config) -> the adapted modules whose label gradients ``fit`` and
            ``logit_covariance`` look at.
        logit_covariance: (state, config, gradients) -> (B, C, C) covariance of the label logits
            around those of ``mean_pack``. A method that has it is Gaussian in the logits, and its
            samples are draws of them instead of packs.
        summary: (state, config) -> what ``dalorra inspect`` shows of the posterior, JSON values.
    """

    settings: type[MethodSettings]
    stochastic: bool
    init: Callable[[Sequence[TargetSpec], int, int, Any], dict[str, Tensor]]
    train_pack: Callable[[AdapterState, Any, Draw], SamplePack]
    predict_pack: Callable[[AdapterState, Any, Draw], SamplePack]
    mean_pack: Callable[[AdapterState, Any], SamplePack]
    designs: Callable[[Any], tuple[Design, ...]] = _independent_samples
    shapes: Callable[[Sequence[TargetSpec], int, Any], Shapes] = _plain_factors
    kl_terms: Callable[[AdapterState, Any, TrainingPoint, SamplePack], Mapping[str, KlTerm]] = (
        _no_terms
    )
    data_loss: Callable[[Tensor, Tensor, Tensor | None, Any], Tensor] = _likelihood
    param_groups: Callable[[AdapterState, OptimConfig, Any], Sequence[ParamGroup]] = (
        _all_in_one_group
    )
    divergence_apart: bool = False
    num_train_samples: Callable[[Any], int] = field(default=lambda _: 1)
    num_functions: Callable[[Any], int | None] = field(default=lambda _: None)
    one_answer: Callable[[Any], bool] = field(default=lambda _: False)
    members: Callable[[Any], int] = field(default=lambda _: 1)
    join: Callable[[Sequence[AdapterState]], dict[str, Tensor]] = field(
        default=lambda states: dict(states[0].params)
    )
    trained_as: Callable[[Any], MethodSettings] = field(default=lambda config: config)
    fit: Callable[[AdapterState, Any, FitContext], dict[str, Tensor]] | None = None
    gradient_modules: Callable[[Sequence[TargetSpec], Any], Sequence[str]] = field(
        default=lambda specs, _: tuple(spec.name for spec in specs)
    )
    logit_covariance: Callable[[AdapterState, Any, LabelGradients], Tensor] | None = None
    summary: Callable[[AdapterState, Any], dict[str, Any]] = field(default=lambda *_: {})

    @property
    def name(self) -> str:
        """Name in configuration files and manifests."""
        return str(self.settings.model_fields["name"].default)

    def draws_samples(self, config: MethodSettings) -> bool:
        """Return whether M functions are drawn, so that M, a seed and a design mean something."""
        drawn = self.stochastic and self.num_functions(config) is None
        return drawn and not self.one_answer(config)

    def check_design(self, config: MethodSettings, design: Design) -> None:
        """Refuse a design that the method's draws cannot follow.

        Args:
            config: Settings of this method.
            design: How samples are to be drawn together.

        Raises:
            ConfigError: Naming the method, the design and what is allowed.
        """
        allowed = self.designs(config)
        if design not in allowed:
            raise ConfigError(
                f"design must be {' or '.join(allowed)} for method {self.name} with these "
                f"settings, got {design}"
            )
