"""From scores to a decision: accept, review or abstain, and why. Plain Python."""

from dataclasses import dataclass
from typing import Literal

from server.ports import AbstainScore, Policy, RowScores, Sampling

__all__ = ["DECISIONS", "REASONS", "Decision", "Reason", "Verdict", "decide", "missing_score"]

Decision = Literal["accept", "review", "abstain"]
Reason = Literal[
    "low_confidence",
    "high_epistemic",
    "high_entropy",
    "low_label_mass",
    "truncated",
    "adapter_uncalibrated",
]
DECISIONS: tuple[Decision, ...] = ("accept", "review", "abstain")
REASONS: tuple[Reason, ...] = (
    "low_confidence",
    "high_epistemic",
    "high_entropy",
    "low_label_mass",
    "truncated",
    "adapter_uncalibrated",
)

_ABSTAIN_REASON: dict[AbstainScore, Reason] = {
    "confidence": "low_confidence",
    "predictive_entropy": "high_entropy",
    "mutual_information": "high_epistemic",
    "label_mass": "low_label_mass",
}


@dataclass(frozen=True, slots=True)
class Verdict:
    """What to do with one answer, and every reason against accepting it."""

    decision: Decision
    reasons: tuple[Reason, ...]


def decide(policy: Policy | None, scores: RowScores, *, truncated: bool) -> Verdict:
    """Return the decision on one answer.

    Abstain when the abstain score is past its threshold; else accept when the confidence reaches
    ``min_confidence``; else review. A truncated question is never accepted, since the part that
    was cut away may have said otherwise. Without a policy, or when the policy's score was not
    measured, nothing is known about the error rate: review.

    Args:
        policy: The rule; None when the adapter has none.
        scores: The answer's scores.
        truncated: Whether a part of the question was cut away.

    Returns:
        The decision; ``reasons`` is empty exactly when it is ``accept``.
    """
    cut: tuple[Reason, ...] = ("truncated",) if truncated else ()
    value = None if policy is None else _score(policy.abstain_score, scores)
    if policy is None or value is None:
        return Verdict("review", ("adapter_uncalibrated", *cut))
    if _is_past(policy, value):
        return Verdict("abstain", (_ABSTAIN_REASON[policy.abstain_score], *cut))
    if scores.confidence < policy.min_confidence:
        return Verdict("review", ("low_confidence", *cut))
    return Verdict("review", cut) if truncated else Verdict("accept", ())


def missing_score(policy: Policy, sampling: Sampling, *, point_method: bool) -> str | None:
    """Return why a policy cannot be applied to answers sampled this way; None when it can.

    Mutual information is the disagreement between samples. One function has nobody to disagree
    with, so a limit on it would let everything pass.
    """
    if policy.abstain_score != "mutual_information":
        return None
    if point_method:
        return "the adapter's method has no mutual information"
    if sampling.passes < 2:  # noqa: PLR2004 - two samples are the fewest that can disagree
        return "mutual information needs the monte_carlo estimator with num_samples of at least 2"
    return None


def _score(name: AbstainScore, scores: RowScores) -> float | None:
    value: float | None = getattr(scores, name)  # the scores are named as the fields are
    return value


def _is_past(policy: Policy, value: float) -> bool:
    if policy.abstain_above:
        return value > policy.abstain_threshold
    return value < policy.abstain_threshold
