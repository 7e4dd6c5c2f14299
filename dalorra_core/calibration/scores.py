"""Scores of labelled rows, as every calibration step reads them."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from dalorra_core.artifact.calibration_record import (
    HIGHER_IS_SURER,
    CombinedScore,
    Limit,
    ScoreName,
)
from dalorra_core.calibration.combined import combined_score
from dalorra_core.errors import ConfigError
from dalorra_core.metrics.uncertainty import summarise
from dalorra_core.predictive.scoring import Prediction

__all__ = ["ScoreTable", "passes", "score_table", "surer"]


@dataclass(frozen=True, eq=False)
class ScoreTable:
    """n answered rows with what is known about them.

    Attributes:
        labels: (n,) right labels, -1 for out of scope.
        predicted: (n,) most probable labels.
        scores: (n,) float64 each, by name; a score that was not measured is not there.
    """

    labels: Tensor
    predicted: Tensor
    scores: Mapping[ScoreName, Tensor]

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def correct(self) -> Tensor:
        """Whether each answer is right; an out-of-scope row has no right answer."""
        return self.predicted == self.labels

    @property
    def outside(self) -> Tensor:
        """Whether each row is out of scope."""
        return self.labels < 0

    def rows(self, chosen: Tensor) -> "ScoreTable":
        """Return the rows that a mask or an index tensor picks."""
        scores: dict[ScoreName, Tensor] = {n: v[chosen] for n, v in self.scores.items()}
        return ScoreTable(self.labels[chosen], self.predicted[chosen], scores)

    def score(self, name: ScoreName) -> Tensor:
        """Return one score.

        Raises:
            ConfigError: If it was not measured; names those that were.
        """
        if name not in self.scores:
            raise ConfigError(
                f"score {name} was not measured here; there are: {', '.join(sorted(self.scores))}"
            )
        return self.scores[name]


def score_table(
    prediction: Prediction, labels: Tensor, combined: CombinedScore | None = None
) -> ScoreTable:
    """Return the scores of answered rows.

    Args:
        prediction: Answers to n rows, calibrated if the scores shall be.
        labels: (n,) right labels, -1 for out of scope.
        combined: Adds the score ``combined``.

    Returns:
        All scores that these answers have: one function alone has no mutual information.
    """
    summary = summarise(prediction.log_probs)
    scores: dict[ScoreName, Tensor] = {
        "confidence": summary.confidence.double(),
        "predictive_entropy": summary.predictive_entropy.double(),
    }
    if prediction.log_probs.shape[0] > 1:
        scores["mutual_information"] = summary.mutual_information.double()
    if prediction.label_mass is not None:
        scores["label_mass"] = prediction.label_mass.double()
    if combined is not None:
        scores["combined"] = combined_score(combined, scores)
    return ScoreTable(labels.long(), summary.predicted.long(), scores)


def surer(name: ScoreName, values: Tensor) -> Tensor:
    """Return values of a score so that higher is surer: lower-is-surer scores are negated."""
    return values if HIGHER_IS_SURER[name] else -values


def passes(limit: Limit, table: ScoreTable) -> Tensor:
    """Return which rows are at least as sure as a limit asks, shape (n,)."""
    threshold = torch.tensor(limit.threshold, dtype=torch.float64)
    return surer(limit.score, table.score(limit.score)) >= surer(limit.score, threshold)
