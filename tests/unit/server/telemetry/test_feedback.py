"""Feedback in numbers: outcomes, the bins of the calibration error, certificates."""

from dataclasses import replace

import pytest

from server.ports import FeedbackRisk
from server.telemetry import FEEDBACK_REJECTIONS, Telemetry
from tests.support.drift_cards import measured

CARD = measured()
OWN = {"adapter": CARD.name, "revision": CARD.revision}
POLICY = "risk_0.05"


def loaded() -> Telemetry:
    telemetry = Telemetry()
    telemetry.adapters_loaded((CARD,), 1.0)
    return telemetry


def value(telemetry: Telemetry, name: str, **labels: str) -> float | None:
    return telemetry.registry.get_sample_value(f"dalorra_{name}", {**OWN, **labels})


def risk(**changes: object) -> FeedbackRisk:
    found = FeedbackRisk(
        **OWN,
        policy=POLICY,
        target_risk=0.05,
        n=200,
        wrong=30,
        risk_lower_bound=0.09,
        violated=True,
    )
    return replace(found, **changes)


def test_outcomes_are_counted_by_decision() -> None:
    telemetry = loaded()
    for correct in (True, True, False):
        telemetry.feedback(**OWN, decision="accept", confidence=0.9, correct=correct)
    telemetry.feedback(**OWN, decision="abstain", confidence=0.2, correct=False)
    found = {
        (decision, outcome): value(telemetry, "feedback_total", decision=decision, outcome=outcome)
        for decision in ("accept", "review", "abstain")
        for outcome in ("correct", "wrong")
    }
    assert found[("accept", "correct")] == 2
    assert found[("accept", "wrong")] == 1
    assert found[("abstain", "wrong")] == 1
    assert sum(count or 0 for count in found.values()) == 4


@pytest.mark.parametrize(("confidence", "bin_"), [(0.0, 0), (0.51, 7), (0.999, 14), (1.0, 14)])
def test_the_bins_hold_what_the_calibration_error_is_made_of(confidence: float, bin_: int) -> None:
    telemetry = loaded()
    for correct in (True, False):
        telemetry.feedback(**OWN, decision="accept", confidence=confidence, correct=correct)
    assert value(telemetry, "calibration_bin_total", bin=str(bin_)) == 2
    assert value(telemetry, "calibration_bin_correct_total", bin=str(bin_)) == 1
    summed = value(telemetry, "calibration_bin_confidence_sum_total", bin=str(bin_))
    assert summed == pytest.approx(2 * confidence)


def test_feedback_for_another_revision_is_not_counted() -> None:
    telemetry = loaded()
    telemetry.feedback(
        adapter=CARD.name, revision="000", decision="accept", confidence=0.9, correct=True
    )
    assert value(telemetry, "feedback_total", decision="accept", outcome="correct") == 0


def test_refusals_are_counted_by_reason() -> None:
    telemetry = loaded()
    telemetry.feedback_rejected("conflict")
    get = telemetry.registry.get_sample_value
    found = [get("dalorra_feedback_rejections_total", {"reason": r}) for r in FEEDBACK_REJECTIONS]
    assert found == [float(reason == "conflict") for reason in FEEDBACK_REJECTIONS]


def test_gauges_show_what_the_database_says_now() -> None:
    telemetry = loaded()
    known: list[FeedbackRisk] = []
    telemetry.watch_feedback(lambda: known)
    assert value(telemetry, "feedback_rows", policy=POLICY) == 0
    assert value(telemetry, "certificate_violated", policy=POLICY) == 0
    assert value(telemetry, "feedback_selective_risk_ratio", policy=POLICY) is None
    known.append(risk())
    assert value(telemetry, "feedback_rows", policy=POLICY) == 200
    assert value(telemetry, "feedback_selective_risk_ratio", policy=POLICY) == 0.15
    assert value(telemetry, "feedback_risk_lower_bound_ratio", policy=POLICY) == 0.09
    assert value(telemetry, "certificate_violated", policy=POLICY) == 1


def test_only_loaded_adapters_and_their_own_policies_are_shown() -> None:
    telemetry = loaded()
    telemetry.watch_feedback(lambda: [risk(revision="000"), risk(policy="typed by a client")])
    found = {
        tuple(sample.labels.values())
        for family in telemetry.collect()
        for sample in family.samples
        if sample.name == "dalorra_feedback_rows"
    }
    assert found == {(*OWN.values(), policy.name) for policy in CARD.policies}


def test_without_feedback_nothing_is_said_about_certificates() -> None:
    telemetry = loaded()
    assert value(telemetry, "feedback_rows", policy=POLICY) is None
    assert value(telemetry, "certificate_violated", policy=POLICY) is None


def test_only_a_certificate_can_be_violated() -> None:
    void = replace(CARD.policies[1], void="measured in another precision")
    telemetry = Telemetry()
    telemetry.adapters_loaded((replace(CARD, policies=(CARD.policies[0], void)),), 1.0)
    telemetry.watch_feedback(lambda: ())
    assert value(telemetry, "certificate_violated", policy=POLICY) == 0
    assert value(telemetry, "certificate_violated", policy=void.name) is None
    assert value(telemetry, "feedback_rows", policy=void.name) == 0
