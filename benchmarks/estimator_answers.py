"""What the further estimators of one adapter's answers are made of."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from dalorra_core.adapters.inject import LM_HEAD
from dalorra_core.adapters.pack import SamplePack
from dalorra_core.data.collate import EncodedExample
from dalorra_core.metrics.uncertainty import mean_probs
from dalorra_core.predictive.exact_head import HeadAnswers, score_exact_head
from dalorra_core.predictive.gates import independent_gates
from dalorra_core.predictive.linearised import LinearisedGates, flat_gates
from dalorra_core.predictive.predictor import Predictor, SamplingPlan
from dalorra_core.predictive.scoring import score_rows
from dalorra_core.predictive.stem import stem_states
from dalorra_core.predictive.trunk import RowStates

__all__ = ["DRAWS", "Answers", "keep_probs"]

DRAWS = 512
"""Draws of the linearised network, which cost no pass."""


def keep_probs(predictor: Predictor) -> Mapping[str, Tensor]:
    """Return the keep probabilities of every module's gates.

    Raises:
        ConfigError: See ``independent_gates``.
    """
    return independent_gates(predictor.manifest.method, _mean_pack(predictor))


def _mean_pack(predictor: Predictor) -> SamplePack:
    return predictor.pack(SamplingPlan(estimator="mean_mask"))


@dataclass(frozen=True)
class Answers:
    """Answers of one adapter to the same rows; what several estimators use is kept."""

    predictor: Predictor
    rows: Sequence[EncodedExample]

    def pack(self, plan: SamplingPlan) -> SamplePack:
        """Return the samples of a plan."""
        return self.predictor.pack(plan)

    def of(self, plan: SamplingPlan) -> Tensor:
        """Return log-probabilities (M, B, C)."""
        return score_rows(
            self.predictor.model,
            self.pack(plan),
            self.rows,
            num_labels=len(self.predictor.labels),
            max_padded_tokens=self.predictor.max_padded_tokens,
            stems=self.stems,
        ).log_probs

    @cached_property
    def stems(self) -> RowStates | None:
        """The rows' states below the first adapted layer."""
        return stem_states(self.predictor.model, self.rows)

    def exact_head(self, plan: SamplingPlan) -> HeadAnswers:
        """Return the answers of a plan with the head's gates summed out."""
        return score_exact_head(
            self.predictor.model,
            self.pack(plan),
            self.rows,
            keep=keep_probs(self.predictor)[LM_HEAD],
            max_padded_tokens=self.predictor.max_padded_tokens,
            stems=self.stems,
        )

    @cached_property
    def mean_mask(self) -> Tensor:
        """Probabilities of the deterministic pass, (B, C)."""
        return mean_probs(self.of(SamplingPlan(estimator="mean_mask")))

    def linearise(self) -> LinearisedGates:
        """Return the rows linearised in the gates, computed anew."""
        return LinearisedGates.of(
            self.predictor.model,
            _mean_pack(self.predictor),
            self.rows,
            keep=keep_probs(self.predictor),
            max_padded_tokens=self.predictor.max_padded_tokens,
        )

    @cached_property
    def linearised(self) -> LinearisedGates:
        """The same, kept."""
        return self.linearise()

    @cached_property
    def expected(self) -> Tensor:
        """What the linearised network answers under many draws of the gates, (K, B, C)."""
        return self.linearised.log_probs(flat_gates(self.pack(SamplingPlan(DRAWS, 99))))
