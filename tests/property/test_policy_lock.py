"""Whatever a request asks for, a locked policy is never loosened."""

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from server.decision import DECISIONS, decide
from server.ports import RowScores
from server.ruling import rule
from server.schemas.policies import NamedPolicy, PolicyForm, RiskPolicy, ThresholdPolicy
from tests.support.fake_engine import TOPICS_CERTIFIED

SHARE = st.floats(0, 1)
NATS = st.floats(0, 2)
SCORES = st.builds(
    lambda probs, mass, entropy, information, combined: RowScores(
        labels=("billing", "fraud", "other"),
        probs=probs,
        confidence=max(probs),
        label_mass=mass,
        predictive_entropy=entropy,
        normalized_entropy=min(entropy, 1.0),
        variation_ratio=0.0,
        expected_entropy=None,
        mutual_information=information,
        confidence_std=None,
        samples=(probs,),
        combined=combined,
    ),
    st.tuples(SHARE, SHARE, SHARE),
    SHARE | st.none(),
    NATS,
    NATS | st.none(),
    SHARE | st.none(),
)
LIMITS = {
    "min_confidence": SHARE,
    "max_predictive_entropy": NATS,
    "max_mutual_information": NATS,
    "min_label_mass": SHARE,
    "min_combined": SHARE,
}


def some_limits() -> st.SearchStrategy[dict[str, float]]:
    return st.fixed_dictionaries({}, optional=LIMITS).filter(bool)


NAMES = [policy.name for policy in TOPICS_CERTIFIED.policies]
INLINE = st.builds(
    lambda accept, abstain: ThresholdPolicy.model_validate(
        accept | ({"abstain": abstain} if abstain else {})
    ),
    some_limits(),
    st.none() | some_limits(),
)
ASKED: st.SearchStrategy[PolicyForm | None] = (
    st.none()
    | INLINE
    | st.builds(NamedPolicy, name=st.sampled_from(NAMES))
    | st.builds(RiskPolicy, max_risk=st.floats(0.05, 0.9))
)


@given(scores=SCORES, asked=ASKED, locked=st.sampled_from(NAMES), truncated=st.booleans())
def test_no_request_is_decided_less_strictly_than_by_the_locked_policy(
    scores: RowScores, asked: PolicyForm | None, locked: str, truncated: bool
) -> None:
    ruling = rule(TOPICS_CERTIFIED, asked, TOPICS_CERTIFIED.defaults, locked)
    (lock,) = (policy for policy in TOPICS_CERTIFIED.policies if policy.name == locked)
    least = decide(lock, scores, truncated=truncated)
    verdict = ruling.decide(scores, truncated=truncated)
    assert DECISIONS.index(verdict.decision) >= DECISIONS.index(least.decision)
    assert (verdict.decision == "accept") == (not verdict.reasons)
    if ruling.target_risk is not None:  # a promise is passed on for its own policy alone
        assert ruling.policy == lock
        assert verdict == least


@given(scores=SCORES, asked=INLINE, truncated=st.booleans())
def test_an_adapter_without_policies_accepts_nothing_under_a_lock(
    scores: RowScores, asked: ThresholdPolicy, truncated: bool
) -> None:
    bare = replace(TOPICS_CERTIFIED, policies=())
    ruling = rule(bare, asked, bare.defaults, "risk_0.05")
    assert ruling.decide(scores, truncated=truncated).decision != "accept"
