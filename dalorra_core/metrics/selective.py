"""Selective prediction: how good is the order in which a model would rather not answer?

n is the number of evaluated examples. Ties in a score are always averaged, never broken by the
order of the rows, so that no function here depends on it.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

__all__ = [
    "Detection",
    "RiskCoverageCurve",
    "augrc",
    "aurc",
    "auroc",
    "detection_at_threshold",
    "risk_coverage_curve",
    "selective_risk",
]


@dataclass(frozen=True, eq=False)
class RiskCoverageCurve:
    """Error rate among the answered as more and more is answered, surest first.

    Attributes:
        coverage: k/n for k = 1..n, shape (n,).
        selective_risk: Share of errors among the k surest answers, shape (n,); inside a run of
            equal confidences, its mean over all orders of that run.
        threshold: Confidence of the k-th surest answer, shape (n,). Answering everything at or
            above it reaches at least that coverage.
    """

    coverage: Float[Tensor, " n"]
    selective_risk: Float[Tensor, " n"]
    threshold: Float[Tensor, " n"]


@dataclass(frozen=True)
class Detection:
    """How a detector does at one threshold.

    Attributes:
        recall: Share of positives that are flagged, [0, 1]; higher is better.
        false_positive_rate: Share of negatives that are flagged, [0, 1]; lower is better.
    """

    recall: float
    false_positive_rate: float


def risk_coverage_curve(
    confidence: Float[Tensor, " n"], correct: Bool[Tensor, " n"]
) -> RiskCoverageCurve:
    """Return selective risk at every coverage, answering the surest examples first.

    Args:
        confidence: Any score, shape (n,), n >= 1; higher is surer.
        correct: Whether the answer was right, shape (n,).

    Returns:
        The curve, in float64.

    Raises:
        ValueError: If there are no examples or a score is NaN.

    Example:
        >>> scores = torch.tensor([0.9, 0.8, 0.7, 0.6])
        >>> curve = risk_coverage_curve(scores, torch.tensor([True, True, False, True]))
        >>> [round(risk, 3) for risk in curve.selective_risk.tolist()]
        [0.0, 0.0, 0.333, 0.25]
    """
    threshold, errors = _errors_surest_first(confidence, correct)  # (n,), (n,)
    answered = torch.arange(1, len(errors) + 1, dtype=torch.float64, device=errors.device)  # (n,)
    return RiskCoverageCurve(
        coverage=answered / len(errors),
        selective_risk=errors.cumsum(0) / answered,
        threshold=threshold,
    )


def aurc(confidence: Float[Tensor, " n"], correct: Bool[Tensor, " n"]) -> float:
    """Return the area under the risk-coverage curve.

    Defined as the mean of the selective risk at coverage k/n for k = 1..n, ties averaged. Other
    libraries use a trapezoid over the same points and get slightly smaller values.

    Args:
        confidence: Any score, shape (n,), n >= 1; higher is surer. Only its order matters.
        correct: Whether the answer was right, shape (n,).

    Returns:
        Fraction in [0, 1]; lower is better. It falls with accuracy too, not only with the order.

    Raises:
        ValueError: If there are no examples or a score is NaN.

    Source:
        Geifman et al. 2019, Bias-reduced uncertainty estimation, section 2.
    """
    return float(risk_coverage_curve(confidence, correct).selective_risk.mean())


def augrc(confidence: Float[Tensor, " n"], correct: Bool[Tensor, " n"]) -> float:
    """Return the area under the generalised risk-coverage curve.

    Generalised risk at coverage k/n is (errors among the k surest) / n: the chance that a
    question is answered and wrong. Trapezoid from (0, 0), so that it equals the closed form
    (1 - AUROC) a (1 - a) + (1 - a)^2 / 2 with a the accuracy and AUROC that of the score for
    right against wrong answers.

    Args:
        confidence: Any score, shape (n,), n >= 1; higher is surer. Only its order matters.
        correct: Whether the answer was right, shape (n,).

    Returns:
        Fraction in [0, 0.5]; lower is better.

    Raises:
        ValueError: If there are no examples or a score is NaN.

    Source:
        Traub et al. 2024, Overcoming common flaws in the evaluation of selective
        classification systems, eq. (6) and (7).
    """
    _, errors = _errors_surest_first(confidence, correct)  # (n,)
    seen = errors.cumsum(0)  # (n,)
    return float((seen - errors / 2).sum() / len(errors) ** 2)


def auroc(scores_positive: Float[Tensor, " p"], scores_negative: Float[Tensor, " q"]) -> float:
    """Return the chance that a positive scores above a negative, a tie counting half.

    Args:
        scores_positive: Scores of what should score high, shape (p,).
        scores_negative: Scores of what should score low, shape (q,).

    Returns:
        Fraction in [0, 1]; 0.5 is chance. NaN when either side is empty: undefined then.

    Raises:
        ValueError: If a score is NaN.

    Example:
        >>> auroc(torch.tensor([0.9, 0.5]), torch.tensor([0.5, 0.1]))
        0.875
    """
    _refuse_nan(scores_positive)
    _refuse_nan(scores_negative)
    if scores_positive.numel() == 0 or scores_negative.numel() == 0:
        return math.nan
    ordered = scores_negative.double().sort().values  # (q,)
    positive = scores_positive.double().contiguous()  # (p,)
    below = torch.searchsorted(ordered, positive)  # (p,); negatives strictly below
    not_above = torch.searchsorted(ordered, positive, right=True)  # (p,)
    return float((below + not_above).double().mean() / (2 * len(ordered)))


def detection_at_threshold(
    scores_positive: Float[Tensor, " p"], scores_negative: Float[Tensor, " q"], threshold: float
) -> Detection:
    """Return recall and false-positive rate of flagging every score strictly above a threshold.

    For a score that is low on positives (confidence, say) negate scores and threshold.

    Args:
        scores_positive: Scores of what should be flagged, shape (p,); higher is more positive.
        scores_negative: Scores of what should pass, shape (q,).
        threshold: A score equal to it is not flagged.

    Returns:
        The two rates; a rate over an empty side is NaN: undefined then.

    Raises:
        ValueError: If a score or the threshold is NaN.
    """
    if math.isnan(threshold):
        raise ValueError("threshold must be a number, got NaN")
    _refuse_nan(scores_positive)
    _refuse_nan(scores_negative)
    return Detection(
        recall=float((scores_positive.double() > threshold).double().mean()),
        false_positive_rate=float((scores_negative.double() > threshold).double().mean()),
    )


def selective_risk(correct: Bool[Tensor, " n"], accepted: Bool[Tensor, " n"]) -> float:
    """Return the share of errors among the answered.

    Args:
        correct: Whether the answer was (or would have been) right, shape (n,).
        accepted: Whether the question was answered, shape (n,).

    Returns:
        Fraction in [0, 1]; lower is better. NaN when nothing was answered: undefined then.
    """
    return float((~correct[accepted]).double().mean())


def _errors_surest_first(
    confidence: Float[Tensor, " n"], correct: Bool[Tensor, " n"]
) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
    """Return scores in falling order and the error of each, runs of equal scores averaged."""
    if confidence.numel() == 0:
        raise ValueError("selective prediction needs at least one example, got none")
    _refuse_nan(confidence)
    scores = confidence.double()
    values, group = scores.unique(sorted=True, return_inverse=True)  # (u,), (n,)
    count = torch.bincount(group, minlength=len(values))  # (u,)
    wrong = torch.bincount(group, weights=(~correct).double()) / count  # (u,)
    order = scores.argsort(descending=True)  # (n,)
    return scores[order], wrong[group][order]


def _refuse_nan(scores: Float[Tensor, " n"]) -> None:
    if bool(scores.isnan().any()):
        raise ValueError(f"scores must be numbers, got {int(scores.isnan().sum())} NaN")
