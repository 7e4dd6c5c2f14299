"""From the log-probabilities of a batch to the scores of its rows."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from dalorra_core.artifact.calibration_record import CombinedScore, PredictionSets, ScoreName
from dalorra_core.calibration.combined import combined_score
from dalorra_core.calibration.prediction_sets import members
from dalorra_core.errors import ConfigError
from dalorra_core.metrics.uncertainty import UncertaintySummary, summarise
from dalorra_core.predictive.scoring import Prediction
from server.ports import RowScores

__all__ = ["Calibrated", "ScoredRow", "score_batch"]


class ScoredRow(Protocol):
    """What the scores of a row depend on."""

    @property
    def labels(self) -> tuple[str, ...]:
        """Its labels, in the order of the answer."""
        ...

    @property
    def columns(self) -> tuple[int, ...]:
        """Their places in the adapter's label set."""
        ...


@dataclass(frozen=True, slots=True)
class Calibrated:
    """What calibration adds to every answer; None where it does not.

    Attributes:
        combined: Weights of the combined score.
        sets: The rule of the prediction sets.
    """

    combined: CombinedScore | None = None
    sets: PredictionSets | None = None


def score_batch(
    prediction: Prediction, payloads: Sequence[ScoredRow], calibrated: Calibrated, *, single: bool
) -> tuple[RowScores, ...]:
    """Return the scores of every row.

    Args:
        prediction: Answers of the calibrated predictive.
        payloads: The rows, in the same order.
        calibrated: What calibration adds.
        single: There is one function only, hence no epistemic part.

    Raises:
        FloatingPointError: A probability is not finite.
    """
    log_probs = prediction.log_probs  # (M, B, C)
    allowed = torch.tensor([len(payload.columns) for payload in payloads])  # (B,)
    summary = summarise(log_probs, allowed)
    if not torch.isfinite(summary.predictive_entropy).all():
        raise FloatingPointError("the model gave probabilities that are not finite")
    probs = summary.mean_probs.tolist()  # (B, C)
    samples = log_probs.double().exp().tolist()  # (M, B, C)
    mass = prediction.label_mass.tolist() if prediction.label_mass is not None else None
    combined = _combined(calibrated.combined, prediction, summary)
    sets = _sets(calibrated.sets, summary.mean_probs)
    return tuple(
        RowScores(
            labels=payload.labels,
            probs=tuple(probs[b][column] for column in payload.columns),
            confidence=summary.confidence[b].item(),
            label_mass=None if mass is None else mass[b],
            predictive_entropy=summary.predictive_entropy[b].item(),
            normalized_entropy=summary.normalized_entropy[b].item(),
            variation_ratio=summary.variation_ratio[b].item(),
            expected_entropy=None if single else summary.expected_entropy[b].item(),
            mutual_information=None if single else summary.mutual_information[b].item(),
            confidence_std=None if single else summary.confidence_std[b].item(),
            samples=tuple(
                tuple(sample[b][column] for column in payload.columns) for sample in samples
            ),
            combined=None if combined is None else combined[b],
            prediction_set=None if sets is None else _named(payload, sets[b], probs[b]),
        )
        for b, payload in enumerate(payloads)
    )


def _combined(
    weights: CombinedScore | None, prediction: Prediction, summary: UncertaintySummary
) -> list[float] | None:
    """Return the combined score of each row; None when these answers lack a score it is made of."""
    if weights is None:
        return None
    scores: dict[ScoreName, Tensor] = {
        "confidence": summary.confidence,
        "predictive_entropy": summary.predictive_entropy,
    }
    if prediction.log_probs.shape[0] > 1:  # one sample has nobody to disagree with
        scores["mutual_information"] = summary.mutual_information
    if prediction.label_mass is not None:
        scores["label_mass"] = prediction.label_mass.to(summary.confidence)
    try:
        found: list[float] = combined_score(weights, scores).tolist()
    except ConfigError:
        return None
    return found


def _sets(rule: PredictionSets | None, mean_probs: Tensor) -> list[list[bool]] | None:
    """Return which labels are in each row's set."""
    if rule is None:
        return None
    inside: list[list[bool]] = members(rule, mean_probs).tolist()
    return inside


def _named(payload: ScoredRow, inside: list[bool], probs: list[float]) -> tuple[str, ...]:
    """Return the labels of a set, the most probable first."""
    ranked = sorted(
        (-probs[column], place) for place, column in enumerate(payload.columns) if inside[column]
    )
    return tuple(payload.labels[place] for _, place in ranked)
