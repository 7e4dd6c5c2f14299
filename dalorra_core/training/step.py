"""One training step: draw a pack, bind, forward at the last position, loss and divergences."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dalorra_core.adapters.inject import TargetSpec
from dalorra_core.adapters.pack import SamplePack
from dalorra_core.adapters.state import AdapterState
from dalorra_core.config import AdapterConfig, MethodSettings, OptimConfig
from dalorra_core.data.collate import TokenBatch
from dalorra_core.errors import ConfigError
from dalorra_core.methods import METHODS, Method
from dalorra_core.methods.method import Draw, TrainingPoint
from dalorra_core.objectives.elbo import KlTerm, mean_nll, neg_elbo
from dalorra_core.predictive.forward import LabelModel

__all__ = ["StepLoss", "TrainStep"]

_SEPARATOR = "|"  # parameter names inside a module may not hold dots


@dataclass(frozen=True)
class StepLoss:
    """Terms of one step's loss, in nats per example.

    Attributes:
        data_loss: The method's loss on the data, with gradient.
        nll: Mean negative log-likelihood over the label subset.
        kl_terms: Each divergence, unweighted, with its factor.
        pack: The samples that the forward pass used.
    """

    data_loss: Tensor
    nll: Tensor
    kl_terms: Mapping[str, KlTerm]
    pack: SamplePack

    @property
    def loss(self) -> Tensor:
        """Data loss plus weighted divergences, with gradient."""
        return neg_elbo(self.data_loss, self.kl_terms)


class TrainStep(nn.Module):
    """The trainable parameters around a frozen label model: a module."""

    def __init__(  # noqa: PLR0913  all by name
        self,
        model: LabelModel,
        specs: tuple[TargetSpec, ...],
        adapter: AdapterConfig,
        method_config: MethodSettings,
        *,
        optim: OptimConfig,
        num_examples: int,
        seed: int,
        recompute: bool = False,
        start: Mapping[str, Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.label_model = model
        self.method: Method = METHODS[method_config.name]
        self.method_config = method_config
        self._specs, self._adapter = specs, adapter
        self._optim, self._num_examples, self._seed = optim, num_examples, seed
        self._recompute = recompute
        initial = self.method.init(specs, adapter.r, seed, method_config)
        if missing := sorted((start or {}).keys() - initial.keys()):
            raise ConfigError(
                f"adapter.start must be null for method {method_config.name}, which trains no "
                f"{missing[0]}, got {adapter.start!r}"
            )
        initial |= start or {}
        self.adapter = nn.ParameterDict(
            {name.replace(".", _SEPARATOR): nn.Parameter(value) for name, value in initial.items()}
        )

    @property
    def params(self) -> dict[str, nn.Parameter]:
        """The adapter's parameters by their artifact names."""
        return {name.replace(_SEPARATOR, "."): value for name, value in self.adapter.items()}

    @property
    def state(self) -> AdapterState:
        """The adapter as the method's functions see it."""
        return AdapterState(self._specs, self._adapter.r, self._adapter.scaling, self.params)

    def forward(self, batch: TokenBatch, step: int, part: int = 0, first_row: int = 0) -> StepLoss:
        """Return the loss of ``batch`` under the samples of optimiser step ``step``.

        The samples are named by (run seed, step) alone: micro-batches of one step and the processes
        that share one have the same, and a resumed run draws what the first would have drawn.
        Noise that each row has for itself is named by the row's place besides.

        Args:
            batch: Rows.
            step: Optimiser steps already taken.
            part: Number of the micro-batch in its step.
            first_row: Place of the first row in its micro-batch.
        """
        state, config = self.state, self.method_config
        draw = Draw(self._key(step), self.method.num_train_samples(config), part, first_row)
        pack = self.label_model.settled(self.method.train_pack(state, config, draw), batch)
        with self.label_model.trunk.recomputing(enabled=self._recompute):
            logits = self.label_model(batch, pack).logits  # (S, B, C)
        data_loss = self.method.data_loss(logits, batch.labels, batch.allowed, config)
        nll = mean_nll(logits.detach(), batch.labels, batch.allowed)
        # Those that have a step of their own are computed again for it; these are for the log.
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.method.divergence_apart):
            kl_terms = self.divergences(step, pack)
        return StepLoss(data_loss, nll, kl_terms, pack)

    def divergences(self, step: int, pack: SamplePack) -> Mapping[str, KlTerm]:
        """Return the method's divergences at the parameters as they are now.

        Args:
            step: Optimiser steps already taken.
            pack: The samples of the forward pass.
        """
        optim = self._optim
        batch_size = optim.batch_size * optim.gradient_accumulation
        point = TrainingPoint(step, optim.steps, self._num_examples, batch_size, self._key(step))
        return self.method.kl_terms(self.state, self.method_config, point, pack)

    def _key(self, step: int) -> tuple[str | int, ...]:
        return ("train", self._seed, step)
