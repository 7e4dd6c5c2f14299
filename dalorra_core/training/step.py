"""One training step: draw gates, bind, forward at the last position, negative ELBO."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from dalorra_core.adapters.inject import TargetSpec
from dalorra_core.adapters.state import AdapterState
from dalorra_core.config import AdapterConfig, MethodConfig
from dalorra_core.data.collate import TokenBatch
from dalorra_core.methods import METHODS, Method
from dalorra_core.methods.method import Draw
from dalorra_core.objectives.elbo import KlTerm, mean_nll, neg_elbo
from dalorra_core.predictive.forward import LabelModel

__all__ = ["StepLoss", "TrainStep"]

_SEPARATOR = "|"  # parameter names inside a module may not hold dots


@dataclass(frozen=True)
class StepLoss:
    """Terms of one step's loss, in nats per example.

    Attributes:
        loss: The negative ELBO, with gradient.
        nll: Mean negative log-likelihood over the label subset.
        kl_terms: Each KL, unweighted and summed over the posterior, with its factor.
    """

    loss: Tensor
    nll: Tensor
    kl_terms: Mapping[str, KlTerm]


class TrainStep(nn.Module):
    """The trainable parameters around a frozen label model, as accelerate wants them: a module."""

    def __init__(
        self,
        model: LabelModel,
        specs: tuple[TargetSpec, ...],
        adapter: AdapterConfig,
        method_config: MethodConfig,
        *,
        num_examples: int,
        seed: int,
    ) -> None:
        super().__init__()
        self.label_model = model
        self.method: Method = METHODS[method_config.name]
        self.method_config = method_config
        self._specs, self._adapter = specs, adapter
        self._num_examples, self._seed = num_examples, seed
        initial = self.method.init(specs, adapter.r, seed, method_config)
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

    def forward(self, batch: TokenBatch, step: int) -> StepLoss:
        """Return the loss of ``batch`` under the gates of optimiser step ``step``.

        The gates are named by (run seed, step) alone: micro-batches of one step and the processes
        of a distributed run share them, and a resumed run draws what the first would have drawn.
        """
        state = self.state
        samples = self.method.num_train_samples(self.method_config)
        draw = Draw(("train", self._seed, step), samples)
        pack = self.method.train_pack(state, self.method_config, draw)
        logits = self.label_model(batch, pack).logits  # (S, B, C)
        nll = mean_nll(logits, batch.labels, batch.allowed)
        kl_terms = self.method.kl_terms(state, self.method_config, self._num_examples)
        return StepLoss(neg_elbo(nll, kl_terms), nll.detach(), kl_terms)
