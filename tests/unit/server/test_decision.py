from dataclasses import replace

import pytest

from server.decision import Verdict, decide, missing_score, strictest
from server.ports import Limit, Policy, RowScores, Sampling, ScoreName
from tests.support.fake_engine import CALIBRATION, TOPICS, TOPICS_CERTIFIED, TOPICS_POINT

SCORES = RowScores(
    labels=("a", "b"),
    probs=(0.9, 0.1),
    confidence=0.9,
    label_mass=0.5,
    predictive_entropy=0.3,
    normalized_entropy=0.4,
    variation_ratio=0.0,
    expected_entropy=0.25,
    mutual_information=0.05,
    confidence_std=0.01,
    samples=((0.9, 0.1),),
    combined=0.7,
)
CONFIDENT = Limit("confidence", 0.8)
POLICY = Policy("p", accept=(CONFIDENT,), abstain=(Limit("predictive_entropy", 1.0),))

PASSED: list[Limit] = [
    Limit("confidence", 0.8),
    Limit("predictive_entropy", 0.4),
    Limit("mutual_information", 0.06),
    Limit("label_mass", 0.4),
    Limit("combined", 0.6),
]
FAILED: list[tuple[Limit, str]] = [
    (Limit("confidence", 0.95), "low_confidence"),
    (Limit("predictive_entropy", 0.2), "high_entropy"),
    (Limit("mutual_information", 0.04), "high_epistemic"),
    (Limit("label_mass", 0.6), "low_label_mass"),
    (Limit("combined", 0.8), "low_combined_score"),
]


def test_confident_and_in_scope_is_accepted() -> None:
    assert decide(POLICY, SCORES, truncated=False) == Verdict("accept", ())


@pytest.mark.parametrize("limit", PASSED, ids=lambda limit: limit.score)
def test_a_limit_that_is_passed_accepts_and_does_not_abstain(limit: Limit) -> None:
    policy = Policy("p", accept=(limit,), abstain=(limit,))
    assert decide(policy, SCORES, truncated=False) == Verdict("accept", ())


@pytest.mark.parametrize(("limit", "reason"), FAILED)
def test_a_limit_that_is_not_passed_says_so(limit: Limit, reason: str) -> None:
    reviews = Policy("p", accept=(CONFIDENT, limit))
    assert decide(reviews, SCORES, truncated=False) == Verdict("review", (reason,))  # type: ignore[arg-type]
    abstains = replace(POLICY, abstain=(limit,))
    assert decide(abstains, SCORES, truncated=False) == Verdict("abstain", (reason,))  # type: ignore[arg-type]


@pytest.mark.parametrize("score", ["confidence", "predictive_entropy", "combined"])
def test_a_value_at_the_threshold_passes(score: ScoreName) -> None:
    limit = Limit(score, getattr(SCORES, score))
    policy = Policy("p", accept=(limit,), abstain=(limit,))
    assert decide(policy, SCORES, truncated=False).decision == "accept"


def test_every_reason_is_named_once() -> None:
    policy = Policy("p", accept=tuple(limit for limit, _ in FAILED))
    reasons = tuple(reason for _, reason in FAILED)
    assert decide(policy, SCORES, truncated=False) == Verdict("review", reasons)  # type: ignore[arg-type]
    abstains = replace(policy, abstain=tuple(limit for limit, _ in FAILED))
    assert decide(abstains, SCORES, truncated=False) == Verdict("abstain", reasons)  # type: ignore[arg-type]
    missing = Policy("p", accept=(CONFIDENT, CONFIDENT))
    assert decide(missing, replace(SCORES, confidence=0.1), truncated=False).reasons == (
        "low_confidence",
    )


def test_without_limits_to_accept_by_nothing_is_doubted_but_null_accepts_nothing() -> None:
    assert decide(Policy("p", accept=()), SCORES, truncated=False) == Verdict("accept", ())
    never = Policy("p", accept=None)
    assert decide(never, SCORES, truncated=False) == Verdict("review", ("no_certified_threshold",))


def test_a_label_has_its_own_threshold_in_place_of_the_first() -> None:
    strict = Policy("p", accept=(Limit("confidence", 0.2),), accept_by_label={"a": 0.95})
    assert decide(strict, SCORES, truncated=False) == Verdict("review", ("low_confidence",))
    lax = Policy("p", accept=(Limit("confidence", 0.99),), accept_by_label={"a": 0.9})
    assert decide(lax, SCORES, truncated=False).decision == "accept"
    unlisted = replace(strict, accept_by_label={"b": 0.95})
    assert decide(unlisted, SCORES, truncated=False).decision == "accept"
    second = replace(lax, accept=(*(lax.accept or ()), Limit("label_mass", 0.6)))
    assert decide(second, SCORES, truncated=False).reasons == ("low_label_mass",)


def test_a_label_without_a_certified_threshold_is_never_accepted() -> None:
    policy = replace(POLICY, accept_by_label={"a": None, "b": 0.1})
    expected = Verdict("review", ("no_certified_threshold",))
    assert decide(policy, SCORES, truncated=False) == expected


def test_a_truncated_row_is_never_accepted() -> None:
    assert decide(POLICY, SCORES, truncated=True) == Verdict("review", ("truncated",))


def test_truncation_is_named_beside_the_other_reason() -> None:
    abstains = replace(POLICY, abstain=(Limit("predictive_entropy", 0.1),))
    reviews = replace(POLICY, accept=(Limit("confidence", 0.95),))
    assert decide(abstains, SCORES, truncated=True) == Verdict(
        "abstain", ("high_entropy", "truncated")
    )
    assert decide(reviews, SCORES, truncated=True).reasons == ("low_confidence", "truncated")


def test_without_a_policy_everything_is_reviewed() -> None:
    expected = Verdict("review", ("adapter_uncalibrated",))
    assert decide(None, SCORES, truncated=False) == expected
    assert decide(None, SCORES, truncated=True).reasons == ("adapter_uncalibrated", "truncated")


def test_a_score_that_was_not_measured_is_no_reason_to_accept() -> None:
    unmeasured = replace(SCORES, label_mass=None)
    limit = Limit("label_mass", 0.1)
    expected = Verdict("review", ("adapter_uncalibrated",))
    assert decide(Policy("p", (limit,)), unmeasured, truncated=False) == expected
    refusing = replace(POLICY, abstain=(limit,))
    assert decide(refusing, unmeasured, truncated=False) == expected
    both = replace(POLICY, abstain=(limit, Limit("predictive_entropy", 0.1)))
    assert decide(both, unmeasured, truncated=False) == Verdict("abstain", ("high_entropy",))


def test_a_value_that_is_no_number_passes_nothing() -> None:
    broken = replace(SCORES, confidence=float("nan"), predictive_entropy=float("nan"))
    assert decide(POLICY, broken, truncated=False) == Verdict("abstain", ("high_entropy",))
    policy = Policy("p", (CONFIDENT,))
    assert decide(policy, broken, truncated=False) == Verdict("review", ("low_confidence",))


def test_the_stricter_of_two_verdicts_holds_with_the_reasons_of_both() -> None:
    accept = Verdict("accept", ())
    review = Verdict("review", ("low_confidence", "truncated"))
    abstain = Verdict("abstain", ("high_entropy", "truncated"))
    for verdict in (accept, review, abstain):
        assert strictest(verdict, verdict) == verdict
        assert strictest(accept, verdict) == strictest(verdict, accept) == verdict
    expected = Verdict("abstain", ("high_entropy", "truncated", "low_confidence"))
    assert strictest(review, abstain) == strictest(abstain, review) == expected


def limited(score: ScoreName) -> tuple[Policy, Policy]:
    """Return a policy that accepts by a score, and one that abstains by it."""
    limit = Limit(score, 0.5)
    return Policy("p", accept=(limit,)), Policy("p", accept=None, abstain=(limit,))


@pytest.mark.parametrize("policy", limited("mutual_information"))
def test_mutual_information_needs_samples(policy: Policy) -> None:
    several, one = Sampling(num_samples=2), Sampling(num_samples=1)
    mean = Sampling(num_samples=9, estimator="mean_mask")
    assert missing_score(policy, several, TOPICS) is None
    assert "method has none" in (missing_score(policy, several, TOPICS_POINT) or "")
    for sampling in (one, mean):
        assert "at least 2" in (missing_score(policy, sampling, TOPICS) or "")


@pytest.mark.parametrize("policy", limited("combined"))
def test_the_combined_score_needs_weights_and_samples(policy: Policy) -> None:
    several, one = Sampling(num_samples=2), Sampling(num_samples=1)
    assert missing_score(policy, several, TOPICS_CERTIFIED) is None
    assert "combined, which needs" in (missing_score(policy, one, TOPICS_CERTIFIED) or "")
    without = replace(TOPICS, calibration=replace(CALIBRATION, has_combined=False))
    for card in (TOPICS, without):
        assert "stores none" in (missing_score(policy, several, card) or "")
    point = replace(TOPICS_POINT, calibration=CALIBRATION)
    assert missing_score(policy, one, point) is None


def test_other_scores_need_nothing() -> None:
    assert missing_score(POLICY, Sampling(num_samples=1), TOPICS_POINT) is None
    assert missing_score(Policy("p", accept=None), Sampling(num_samples=1), TOPICS) is None
