"""Policies, certificates and calibration as clients see them."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from server.ports import (
    HIGHER_IS_SURER,
    AdapterCard,
    CalibrationCard,
    Limit,
    Policy,
    PredictionSetRule,
    ScoreName,
)
from server.schemas.receipts import (
    AbstainGuaranteeCard,
    ByLabelCard,
    CalibrationSection,
    GuaranteeCard,
    LimitCard,
    PlanSection,
    PolicyCard,
    PredictionSetsCard,
    Side,
    StoredPolicyCard,
    Thresholds,
    UncertifiedCard,
)

__all__ = [
    "calibration_section",
    "policy_card",
    "prediction_sets_card",
    "side_that_passes",
    "stored_policy_card",
]


def policy_card(policy: Policy, combined_with: Policy | None = None) -> PolicyCard:
    """Return the receipt of a policy.

    Args:
        policy: The rule, with the promises that hold.
        combined_with: The locked policy that was applied as well.
    """
    return PolicyCard(**_parts(policy), combined_with=combined_with.name if combined_with else None)


def stored_policy_card(policy: Policy) -> StoredPolicyCard:
    """Return a policy of an adapter, with every threshold."""
    by_label = policy.accept_by_label
    return StoredPolicyCard(
        **_parts(policy), accept_by_label=None if by_label is None else dict(by_label)
    )


def prediction_sets_card(card: AdapterCard) -> PredictionSetsCard | None:
    """Return the rule behind prediction sets; None when the adapter has none that holds here."""
    calibration = card.calibration
    if calibration is None or calibration.void is not None or not calibration.prediction_sets:
        return None
    return _prediction_sets(calibration.prediction_sets[0])


def calibration_section(calibration: CalibrationCard) -> CalibrationSection:
    """Return what calibration found out."""
    return CalibrationSection(
        date=calibration.date,
        n=calibration.n,
        n_out_of_scope=calibration.n_out_of_scope,
        temperature=calibration.temperature,
        prediction_sets=[_prediction_sets(rule) for rule in calibration.prediction_sets],
        uncertified=[UncertifiedCard(**asdict(target)) for target in calibration.uncertified],
        void=calibration.void,
        plan=None if calibration.plan is None else PlanSection(**asdict(calibration.plan)),
    )


def side_that_passes(score: ScoreName) -> Side:
    """Return on which side of a threshold on this score values pass."""
    return "at_least" if HIGHER_IS_SURER[score] else "at_most"


def _parts(policy: Policy) -> dict[str, Any]:
    guarantee, abstaining = policy.guarantee, policy.abstain_guarantee
    return {
        "name": policy.name,
        "thresholds": Thresholds(
            accept=None if policy.accept is None else [_limit(limit) for limit in policy.accept],
            abstain=[_limit(limit) for limit in policy.abstain],
            by_label=_by_label(policy.accept_by_label),
        ),
        "target_selective_risk": policy.target_selective_risk,
        "chosen_on": dict(policy.chosen_on),
        "guarantee": GuaranteeCard(**asdict(guarantee)) if guarantee else None,
        "abstain_guarantee": AbstainGuaranteeCard(**asdict(abstaining)) if abstaining else None,
        "void": policy.void,
    }


def _limit(limit: Limit) -> LimitCard:
    return LimitCard(
        score=limit.score, threshold=limit.threshold, passes=side_that_passes(limit.score)
    )


def _by_label(by_label: Mapping[str, float | None] | None) -> ByLabelCard | None:
    if by_label is None:
        return None
    accepting = [threshold for threshold in by_label.values() if threshold is not None]
    return ByLabelCard(
        num_labels=len(by_label),
        num_never_accepted=len(by_label) - len(accepting),
        lowest=min(accepting, default=None),
        highest=max(accepting, default=None),
    )


def _prediction_sets(rule: PredictionSetRule) -> PredictionSetsCard:
    return PredictionSetsCard(**asdict(rule))
