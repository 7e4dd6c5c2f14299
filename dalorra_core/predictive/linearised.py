"""The network linearised in its gates at their means, where all is known: f(z) ~ f(p) + J (z - p).

J takes one backward pass for each label and no sample of the gates. What the linearised network
answers on average is then known up to draws that cost no pass: an estimate by itself, and a control
variate for the samples of the network itself.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from jaxtyping import Float
from torch import Tensor

from dalorra_core.adapters.gradients import LabelGradients
from dalorra_core.adapters.pack import SamplePack
from dalorra_core.config import MethodSettings
from dalorra_core.data.collate import EncodedExample
from dalorra_core.errors import ConfigError
from dalorra_core.methods.method import Draw
from dalorra_core.objectives.elbo import label_log_probs
from dalorra_core.predictive.forward import LabelModel
from dalorra_core.predictive.gates import independent_gates
from dalorra_core.predictive.gaussian import logit_draws, probit_logits
from dalorra_core.predictive.gradients import label_gradients_of_rows

__all__ = [
    "MOST_LINEARISED_LABELS",
    "ControlledAnswers",
    "LinearisedGates",
    "controlled",
    "flat_gates",
    "gate_covariance",
    "gate_jacobian",
    "gates_to_linearise",
]

MOST_LINEARISED_LABELS = 16
"""A linearised answer takes a backward pass for each label: with more of them samples are
cheaper."""


def flat_gates(pack: SamplePack) -> Float[Tensor, "M G"]:
    """Return the gates of all modules of a pack, one module after the other."""
    return torch.cat([m.z for m in pack.modules.values() if m.z is not None], dim=1)


def gate_jacobian(pack: SamplePack, gradients: LabelGradients) -> Float[Tensor, "B C G"]:
    """Return the derivatives of the label logits in the gates, in the order of ``flat_gates``.

    Args:
        pack: The one function that the gradients were taken at.
        gradients: Of its modules that have gates, or of some of them.

    Source:
        docs/method.md, eq. (J10).
    """
    found = []
    for name, module in pack.modules.items():
        if module.z is None or name not in gradients.modules:
            continue
        of = gradients.modules[name]
        features = of.inputs @ module.lora_A[0].T  # (B, T, r)
        through = of.outputs @ module.lora_B[0]  # (C, B, T, r)
        found.append(pack.scaling * torch.einsum("cbtr,btr->bcr", through, features))
    return torch.cat(found, dim=-1)


def gates_to_linearise(
    config: MethodSettings, mean_pack: SamplePack, *, num_labels: int
) -> dict[str, Tensor]:
    """Return the keep probabilities of the modules whose gates differ from sample to sample.

    Args:
        config: The method's settings.
        mean_pack: Its ``mean_pack``.
        num_labels: Backward passes that an answer takes.

    Raises:
        ConfigError: The network cannot answer linearised, or it would not pay.
    """
    refused = "estimator linearised is not to be had of this adapter"
    try:
        keep = independent_gates(config, mean_pack)
    except ConfigError as error:
        raise ConfigError(f"{refused}: {error}") from error
    random = {name: p for name, p in keep.items() if bool(((p > 0) & (p < 1)).any())}
    if not random:
        raise ConfigError(f"{refused}: every gate is always on or always off")
    if num_labels > MOST_LINEARISED_LABELS:
        raise ConfigError(
            f"{refused}: it takes a backward pass for each label, so at most "
            f"{MOST_LINEARISED_LABELS} are allowed, and there are {num_labels}"
        )
    return random


def gate_covariance(
    mean_pack: SamplePack, keep: Mapping[str, Tensor]
) -> Callable[[LabelGradients], Float[Tensor, "B C C"]]:
    """Return what gives the covariance of the linearised label logits from their gradients.

    Args:
        mean_pack: The one function with every gate at its mean.
        keep: From ``gates_to_linearise``, in the order of the pack's modules.
    """
    probs = torch.cat(list(keep.values())).double()
    deviation = (probs * (1 - probs)).sqrt()  # (G,)

    def covariance(gradients: LabelGradients) -> Tensor:
        spread = gate_jacobian(mean_pack, gradients).double()
        spread = spread * deviation.to(spread.device)
        return spread @ spread.transpose(1, 2)

    return covariance


@dataclass(frozen=True, eq=False)
class LinearisedGates:
    """The label logits of B rows as linear functions of G independent gates.

    Attributes:
        logits: At the gates' means, (B, C) float32.
        jacobian: (B, C, G).
        keep: The gates' means, (G,) in [0, 1].
        allowed: (B, C) booleans; None allows all labels.
    """

    logits: Tensor
    jacobian: Tensor
    keep: Tensor
    allowed: Tensor | None

    @classmethod
    def of(
        cls,
        model: LabelModel,
        mean_pack: SamplePack,
        rows: Sequence[EncodedExample],
        *,
        keep: Mapping[str, Tensor],
        max_padded_tokens: int,
    ) -> Self:
        """Return rows linearised at the gates' means: one forward pass and C backward passes.

        Args:
            model: The adapted model.
            mean_pack: The one function with every gate at its mean, on the model's device.
            rows: At least one encoded row.
            keep: From ``independent_gates``.
            max_padded_tokens: See ``label_gradients_of_rows``.

        Raises:
            RowMemoryError: See ``label_gradients_of_rows``.
        """
        places: list[int] = []
        parts: list[tuple[Tensor, Tensor, Tensor]] = []
        chunks = label_gradients_of_rows(
            model, mean_pack, rows, modules=tuple(keep), max_padded_tokens=max_padded_tokens
        )
        for own, found in chunks:
            some = torch.ones_like(found.logits, dtype=torch.bool)
            allowed = some if found.allowed is None else found.allowed
            parts.append((found.logits, gate_jacobian(mean_pack, found), allowed))
            places += own
        order = torch.tensor(places).argsort()
        logits, jacobian, allowed = (
            torch.cat(each).cpu()[order] for each in zip(*parts, strict=True)
        )
        return cls(logits, jacobian, torch.cat(list(keep.values())).cpu(), allowed)

    @property
    def covariance(self) -> Float[Tensor, "B C C"]:
        """Covariance of the label logits, float64."""
        spread = self.jacobian.double() * (self.keep * (1 - self.keep)).double().sqrt()
        return spread @ spread.transpose(1, 2)

    def gaussian(self, draw: Draw) -> Float[Tensor, "K B C"]:
        """Return log-probabilities of K logits drawn from the Gaussian of their two moments."""
        return label_log_probs(logit_draws(self.logits, self.covariance, draw), self.allowed)

    def probit(self) -> Float[Tensor, "B C"]:
        """Return log-probabilities of the probit approximation: a mean, without draws."""
        return label_log_probs(probit_logits(self.logits, self.covariance), self.allowed)

    def log_probs(self, gates: Float[Tensor, "K G"]) -> Float[Tensor, "K B C"]:
        """Return what the linearised network answers under these gates."""
        moved = torch.einsum("kg,bcg->kbc", gates.cpu() - self.keep, self.jacobian)
        return label_log_probs(self.logits + moved, self.allowed)


@dataclass(frozen=True, eq=False)
class ControlledAnswers:
    """Estimates from M samples, less what the linearised network got wrong under their gates.

    Attributes:
        mean_probs: (B, C) float64; rows sum to 1, single entries may lie a little outside [0, 1].
        expected_entropy: (B,) in nats.
    """

    mean_probs: Tensor
    expected_entropy: Tensor

    @property
    def mutual_information(self) -> Tensor:
        """(B,) in nats."""
        total = torch.special.entr(self.mean_probs.clamp(min=0.0)).sum(-1)
        return (total - self.expected_entropy).clamp(min=0.0)


def controlled(
    log_probs: Float[Tensor, "M B C"],
    surrogate: Float[Tensor, "M B C"],
    expected: Float[Tensor, "K B C"],
) -> ControlledAnswers:
    """Return the mean over samples of network less surrogate, plus the surrogate's expectation.

    Without bias in the mean probability and in the expected entropy, however poor the surrogate.

    Args:
        log_probs: Of M samples.
        surrogate: Of the linearised network under the same gates.
        expected: Of the linearised network under K other draws of the gates, which cost no pass.

    Source:
        docs/method.md, eq. (J11).
    """
    ours, theirs, known = (x.double().exp() for x in (log_probs, surrogate, expected))
    entropy = [torch.special.entr(p).sum(-1).mean(0) for p in (ours, theirs, known)]
    return ControlledAnswers(
        ours.mean(0) - theirs.mean(0) + known.mean(0), entropy[0] - entropy[1] + entropy[2]
    )
