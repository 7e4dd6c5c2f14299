"""From scores to a decision: accept, review or abstain, and why. Plain Python."""

from dataclasses import dataclass
from typing import Literal

from server.ports import (
    HIGHER_IS_SURER,
    AdapterCard,
    Limit,
    Policy,
    RowScores,
    Sampling,
    ScoreName,
)

__all__ = [
    "DECISIONS",
    "REASONS",
    "Decision",
    "Reason",
    "Verdict",
    "decide",
    "missing_score",
    "strictest",
]

Decision = Literal["accept", "review", "abstain"]
Reason = Literal[
    "low_confidence",
    "high_epistemic",
    "high_entropy",
    "low_label_mass",
    "low_combined_score",
    "no_certified_threshold",
    "truncated",
    "adapter_uncalibrated",
]
DECISIONS: tuple[Decision, ...] = ("accept", "review", "abstain")
"""From the least to the most strict."""

REASONS: tuple[Reason, ...] = (
    "low_confidence",
    "high_epistemic",
    "high_entropy",
    "low_label_mass",
    "low_combined_score",
    "no_certified_threshold",
    "truncated",
    "adapter_uncalibrated",
)

_REASON_OF: dict[ScoreName, Reason] = {
    "confidence": "low_confidence",
    "predictive_entropy": "high_entropy",
    "mutual_information": "high_epistemic",
    "label_mass": "low_label_mass",
    "combined": "low_combined_score",
}
_STRICTNESS: dict[Decision, int] = {decision: rank for rank, decision in enumerate(DECISIONS)}


@dataclass(frozen=True, slots=True)
class Verdict:
    """What to do with one answer, and every reason against accepting it."""

    decision: Decision
    reasons: tuple[Reason, ...]


def decide(policy: Policy | None, scores: RowScores, *, truncated: bool) -> Verdict:
    """Return the decision on one answer.

    Abstain when an abstain limit is not passed; else accept when every accept limit is; else
    review. A truncated question is never accepted, since the part that was cut away may have said
    otherwise. Without a policy, or when one of its scores was not measured, nothing is known about
    the error rate: review.

    Args:
        policy: The rule; None when the adapter has none.
        scores: The answer's scores.
        truncated: Whether a part of the question was cut away.

    Returns:
        The decision; ``reasons`` is empty exactly when it is ``accept``.
    """
    cut: tuple[Reason, ...] = ("truncated",) if truncated else ()
    if policy is None:
        return Verdict("review", ("adapter_uncalibrated", *cut))
    refused = _faults(policy.abstain, scores)
    past: list[Reason] = [reason for reason in refused if reason != "adapter_uncalibrated"]
    if past:
        return Verdict("abstain", _each_once(*past, *cut))
    reasons = _each_once(*refused, *_doubts(policy, scores), *cut)
    return Verdict("review", reasons) if reasons else Verdict("accept", ())


def strictest(first: Verdict, second: Verdict) -> Verdict:
    """Return the stricter of two verdicts on one answer, with the reasons of both."""
    if _STRICTNESS[second.decision] > _STRICTNESS[first.decision]:
        first, second = second, first
    return Verdict(first.decision, _each_once(*first.reasons, *second.reasons))


def missing_score(policy: Policy, sampling: Sampling, card: AdapterCard) -> str | None:
    """Return why a policy cannot be applied to answers sampled this way; None when it can.

    Mutual information is the disagreement between samples. One function has nobody to disagree
    with, so a limit on it would let everything pass; the combined score is partly made of it.
    """
    names = {limit.score for limit in (*(policy.accept or ()), *policy.abstain)}
    if "mutual_information" in names and card.point_method:
        return "limits mutual_information, but the adapter's method has none"
    if "combined" in names and not (card.calibration and card.calibration.has_combined):
        return "limits the combined score, but the adapter stores none"
    sampled = sorted(names & {"mutual_information", "combined"})
    if sampled and not card.point_method and sampling.num_functions < 2:  # noqa: PLR2004 - the fewest
        return (
            f"limits {sampled[0]}, which needs the monte_carlo estimator with num_samples of at "
            "least 2"
        )
    return None


def _doubts(policy: Policy, scores: RowScores) -> list[Reason]:
    """Return what the accept limits have against an answer."""
    if policy.accept is None:
        return ["no_certified_threshold"]
    limits = policy.accept
    by_label = policy.accept_by_label
    if by_label and scores.label in by_label:
        threshold = by_label[scores.label]
        if threshold is None:
            return ["no_certified_threshold"]
        limits = (Limit(limits[0].score, threshold), *limits[1:])
    return _faults(limits, scores)


def _faults(limits: tuple[Limit, ...], scores: RowScores) -> list[Reason]:
    """Return one reason for every limit that is not passed."""
    reasons: list[Reason] = []
    for limit in limits:
        value = _value(limit.score, scores)
        if value is None:
            reasons.append("adapter_uncalibrated")
        elif not _passes(value, limit):
            reasons.append(_REASON_OF[limit.score])
    return reasons


def _passes(value: float, limit: Limit) -> bool:
    if HIGHER_IS_SURER[limit.score]:
        return value >= limit.threshold
    return value <= limit.threshold


def _value(name: ScoreName, scores: RowScores) -> float | None:
    value: float | None = getattr(scores, name)  # the scores are named as the fields are
    return value


def _each_once(*reasons: Reason) -> tuple[Reason, ...]:
    return tuple(dict.fromkeys(reasons))
