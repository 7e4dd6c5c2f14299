"""Score labelled rows: accuracy, calibration, selective prediction and out-of-scope detection."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from dalorra_core.errors import DataError
from dalorra_core.metrics.bootstrap import bootstrap_interval
from dalorra_core.metrics.calibration import (
    adaptive_ece,
    brier,
    classwise_ece,
    ece,
    ece_noise_floor,
    nll,
)
from dalorra_core.metrics.scored import detection_scores, possible_labels
from dalorra_core.metrics.selective import augrc, aurc, auroc
from dalorra_core.metrics.uncertainty import UncertaintySummary, log_mean_probs, summarise

__all__ = ["Estimate", "EvaluationReport", "evaluate", "json_number", "out_of_scope_scores"]

_NUM_BINS = 15


def json_number(value: float) -> float | None:
    """Return ``value``, or None for the NaN of an undefined statistic: JSON has no NaN."""
    return None if math.isnan(value) else value


@dataclass(frozen=True)
class Estimate:
    """A statistic with its 95 % bootstrap interval over rows."""

    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class EvaluationReport:
    """What one adapter does on one labelled set.

    Attributes:
        num_in_scope: Rows whose label the adapter knows.
        num_out_of_scope: Rows with label -1.
        metrics: Statistic name to estimate; those of calibration and accuracy are over the
            in-scope rows, ``auroc_oos_*`` over both, higher = better detection. An AUROC's
            interval is NaN where a resample may hold rows of one kind only: fewer than about ten.
        ece_noise_floor: Expected ECE and its sd of a perfectly calibrated model with these
            confidences: gaps below it mean nothing.
    """

    num_in_scope: int
    num_out_of_scope: int
    metrics: Mapping[str, Estimate]
    ece_noise_floor: tuple[float, float]

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values; an undefined statistic is null."""
        values = asdict(self)
        for estimate in values["metrics"].values():
            estimate |= {name: v if v is None else json_number(v) for name, v in estimate.items()}
        return values


def out_of_scope_scores(summary: UncertaintySummary, *, point: bool) -> dict[str, Tensor]:
    """Return the scores that can flag a row as out of scope; higher = more likely so.

    Args:
        summary: Uncertainty of the rows.
        point: True for a single function: its samples cannot disagree, and the entropies are one.
    """
    scores = {
        "confidence": summary.confidence,
        "predictive_entropy": summary.predictive_entropy,
    }
    if not point:
        scores |= {
            "mutual_information": summary.mutual_information,
            "expected_entropy": summary.expected_entropy,
            "variation_ratio": summary.variation_ratio,
            "confidence_std": summary.confidence_std,
        }
    return detection_scores(scores)


def evaluate(
    log_probs: Tensor,
    labels: Tensor,
    *,
    bootstrap_seed: int | None = None,
    num_resamples: int = 1000,
) -> EvaluationReport:
    """Return the report for (M, n, C) label log-probabilities.

    Args:
        log_probs: (M, n, C), normalised.
        labels: (n,) right labels, -1 for out of scope.
        bootstrap_seed: Seed of the bootstrap; None leaves the intervals out.
        num_resamples: Bootstrap resamples.

    Raises:
        DataError: If no row is in scope.
    """
    inside = labels >= 0
    if not bool(inside.any()):
        raise DataError(f"evaluation needs an in-scope row, got {len(labels)} without any")
    summary = summarise(log_probs)
    correct = summary.mean_probs.argmax(-1) == labels
    floor = ece_noise_floor(
        summary.confidence[inside],
        num_bins=_NUM_BINS,
        num_draws=200,
        generator=torch.Generator().manual_seed(0),
    )
    in_scope = _in_scope_statistics(log_probs, labels, summary, inside)
    metrics = {
        name: _estimate(statistic, arrays, bootstrap_seed, num_resamples)
        for name, (statistic, arrays) in in_scope.items()
    }
    point = log_probs.shape[0] == 1
    for name, score in out_of_scope_scores(summary, point=point).items():
        metrics[f"auroc_error_{name}"] = _auroc_estimate(
            score[inside & ~correct], score[inside & correct], bootstrap_seed, num_resamples
        )
        if bool((~inside).any()):
            metrics[f"auroc_oos_{name}"] = _auroc_estimate(
                score[~inside], score[inside], bootstrap_seed, num_resamples
            )
    return EvaluationReport(
        int(inside.sum()), int((~inside).sum()), metrics, (floor.mean, floor.std)
    )


_Statistic = Callable[..., float]


def _in_scope_statistics(
    log_probs: Tensor, labels: Tensor, summary: UncertaintySummary, inside: Tensor
) -> dict[str, tuple[_Statistic, Sequence[Tensor]]]:
    probs, y = summary.mean_probs[inside], labels[inside]
    confidence, hit = summary.confidence[inside], (probs.argmax(-1) == y)
    log_mean = log_mean_probs(log_probs)[inside]
    return {
        "accuracy": (lambda h: float(h.double().mean()), (hit,)),
        "nll": (nll, (log_mean, y)),
        "ece": (lambda p, t: ece(p, t, _NUM_BINS), (probs, y)),
        "adaptive_ece": (lambda p, t: adaptive_ece(p, t, _NUM_BINS), (probs, y)),
        "classwise_ece": (
            lambda p, t: classwise_ece(p, t, _NUM_BINS),
            possible_labels(probs, y),
        ),
        "brier": (brier, (probs, y)),
        "aurc": (aurc, (confidence, hit)),
        "augrc": (augrc, (confidence, hit)),
    }


def _estimate(
    statistic: _Statistic, arrays: Sequence[Tensor], seed: int | None, num_resamples: int
) -> Estimate:
    value = float(statistic(*arrays))
    if seed is None:
        return Estimate(value)
    interval = bootstrap_interval(
        statistic,
        *arrays,
        num_resamples=num_resamples,
        generator=torch.Generator().manual_seed(seed),
    )
    return Estimate(value, interval.low, interval.high)


def _auroc_estimate(
    positive: Tensor, negative: Tensor, seed: int | None, num_resamples: int
) -> Estimate:
    score = torch.cat([positive, negative])
    is_positive = torch.cat([torch.ones_like(positive), torch.zeros_like(negative)]).bool()
    return _estimate(
        lambda s, flag: auroc(s[flag], s[~flag]), (score, is_positive), seed, num_resamples
    )
