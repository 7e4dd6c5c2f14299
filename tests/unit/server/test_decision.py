from dataclasses import replace

import pytest

from server.decision import Verdict, decide, missing_score
from server.ports import Policy, RowScores, Sampling

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
)
ENTROPY = Policy("p", 0.8, "predictive_entropy", 1.0, abstain_above=True)


def test_confident_and_in_scope_is_accepted() -> None:
    assert decide(ENTROPY, SCORES, truncated=False) == Verdict("accept", ())


def test_confidence_at_the_threshold_is_accepted() -> None:
    policy = replace(ENTROPY, min_confidence=0.9)
    assert decide(policy, SCORES, truncated=False).decision == "accept"


def test_low_confidence_goes_to_review() -> None:
    policy = replace(ENTROPY, min_confidence=0.95)
    assert decide(policy, SCORES, truncated=False) == Verdict("review", ("low_confidence",))


@pytest.mark.parametrize(
    ("policy", "reason"),
    [
        (Policy("p", 0.5, "predictive_entropy", 0.2, abstain_above=True), "high_entropy"),
        (Policy("p", 0.5, "mutual_information", 0.04, abstain_above=True), "high_epistemic"),
        (Policy("p", 0.5, "confidence", 0.95, abstain_above=False), "low_confidence"),
        (Policy("p", 0.5, "label_mass", 0.6, abstain_above=False), "low_label_mass"),
    ],
)
def test_past_the_abstain_threshold_abstains_with_the_scores_reason(
    policy: Policy, reason: str
) -> None:
    assert decide(policy, SCORES, truncated=False) == Verdict("abstain", (reason,))  # type: ignore[arg-type]


@pytest.mark.parametrize("above", [True, False])
def test_exactly_at_the_abstain_threshold_is_not_past_it(above: bool) -> None:
    policy = Policy("p", 0.5, "predictive_entropy", 0.3, abstain_above=above)
    assert decide(policy, SCORES, truncated=False).decision == "accept"


def test_a_truncated_row_is_never_accepted() -> None:
    assert decide(ENTROPY, SCORES, truncated=True) == Verdict("review", ("truncated",))


def test_truncation_is_named_beside_the_other_reason() -> None:
    abstains = replace(ENTROPY, abstain_threshold=0.1)
    reviews = replace(ENTROPY, min_confidence=0.95)
    assert decide(abstains, SCORES, truncated=True).reasons == ("high_entropy", "truncated")
    assert decide(reviews, SCORES, truncated=True).reasons == ("low_confidence", "truncated")


def test_without_a_policy_everything_is_reviewed() -> None:
    expected = Verdict("review", ("adapter_uncalibrated",))
    assert decide(None, SCORES, truncated=False) == expected
    assert decide(None, SCORES, truncated=True).reasons == ("adapter_uncalibrated", "truncated")


def test_a_score_that_was_not_measured_is_no_reason_to_accept() -> None:
    policy = Policy("p", 0.5, "label_mass", 0.6, abstain_above=False)
    verdict = decide(policy, replace(SCORES, label_mass=None), truncated=False)
    assert verdict == Verdict("review", ("adapter_uncalibrated",))


def test_mutual_information_needs_samples() -> None:
    policy = replace(ENTROPY, abstain_score="mutual_information")
    several = Sampling(num_samples=2)
    assert missing_score(policy, several, point_method=False) is None
    assert missing_score(ENTROPY, Sampling(num_samples=1), point_method=True) is None
    assert "method" in (missing_score(policy, several, point_method=True) or "")
    one, mean = Sampling(num_samples=1), Sampling(num_samples=9, estimator="mean_mask")
    for sampling in (one, mean):
        assert "at least 2" in (missing_score(policy, sampling, point_method=False) or "")
