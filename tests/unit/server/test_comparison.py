"""server.replay.comparison: what counts as the same answer."""

import math
from dataclasses import replace
from typing import Any

import pytest

from server.feedback import PredictionClaim, answer_digest
from server.ports import AdapterCard, RowScores, Sampling
from server.replay import Comparison, compare, sampling_of
from server.ruling import INLINE
from tests.support.fake_engine import POLICY, TOPICS, score
from tests.support.feedback import make_claim, make_reproduction

CARD = replace(TOPICS, manifest_sha256="ab" * 32)
SCORES = replace(
    score("x", CARD.labels, CARD.defaults, CARD),
    probs=(0.95, 0.03, 0.02),
    confidence=0.95,
    predictive_entropy=0.2,
)


def claim_of(scores: RowScores = SCORES, **changes: Any) -> PredictionClaim:
    """Return the claim of an answer of ``CARD``."""
    kept = {"deterministic", "dtype", "manifest", "mask_set", "combined_with"} & changes.keys()
    reproduction = make_reproduction(
        **(
            {"manifest": "ab" * 16, "probs": answer_digest(scores.labels, scores.probs)}
            | {name: changes.pop(name) for name in kept}
        )
    )
    values = {
        "revision": CARD.revision,
        "label": scores.label,
        "confidence": scores.confidence,
        "decision": "accept",
        "policy": POLICY.name,
        "reproduction": reproduction,
    }
    return make_claim(**(values | changes))


def compared(
    claim: PredictionClaim, scores: RowScores = SCORES, card: AdapterCard = CARD, **changes: Any
) -> Comparison:
    arguments = {"truncated": False} | changes
    return compare(claim, card, scores, "ms_0123456789ab", **arguments)


def line_of(found: Comparison, name: str) -> Any:
    (line,) = [line for line in found.lines if line.name == name]
    return line


def test_the_same_answer_is_reproduced_to_the_bit() -> None:
    found = compared(claim_of())
    assert found.exact
    assert found.reproduced
    assert found.difference == 0
    assert found.notes == ()
    assert {line.same for line in found.lines} == {True}


def test_one_bit_is_enough_to_differ_where_bits_are_demanded() -> None:
    other = replace(SCORES, probs=(math.nextafter(0.95, 1), 0.03, 0.02))
    found = compared(claim_of(), other)
    assert not found.reproduced
    assert line_of(found, "probabilities").same is False
    assert "not the same bits" in found.notes[0]
    assert compared(claim_of(deterministic=False), other).reproduced
    assert compared(claim_of(), other, exact=False).reproduced
    assert not compared(claim_of(deterministic=False), other, exact=True).reproduced


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 0.05)])
def test_a_batched_answer_may_be_off_by_the_stated_tolerance(dtype: str, tolerance: float) -> None:
    card, claim = replace(CARD, dtype=dtype), claim_of(deterministic=False, dtype=dtype)
    for share, same in ((0.5, True), (1.5, False)):
        scores = replace(SCORES, confidence=SCORES.confidence - share * tolerance)
        assert compared(claim, scores, card).reproduced is same
    nothing = replace(SCORES, confidence=math.nan)
    assert not compared(claim, nothing, card).reproduced


@pytest.mark.parametrize(
    "changes",
    [
        {"label": "fraud"},
        {"decision": "review"},
        {"revision": "000000000000"},
        {"mask_set": "ms_another"},
        {"confidence": 0.9499},
    ],
)
def test_what_counts_must_agree(changes: dict[str, Any]) -> None:
    found = compared(claim_of(deterministic=False, **changes))
    assert [line.same for line in found.lines].count(False) == 1
    assert not found.reproduced


def test_another_calibration_is_said_and_does_not_count_by_itself() -> None:
    found = compared(claim_of(manifest="cd" * 16))
    assert line_of(found, "calibration").same is False
    assert found.reproduced
    assert "calibrated or changed since" in found.notes[0]


def test_a_decision_by_limits_of_the_request_cannot_be_checked() -> None:
    found = compared(claim_of(policy=INLINE, decision="abstain"))
    assert line_of(found, f"decision of {INLINE}").same is None
    assert found.reproduced
    assert "written in the request" in found.notes[0]


def test_a_policy_that_is_gone_is_said() -> None:
    found = compared(claim_of(policy="gone"))
    assert "no longer has the policy" in found.notes[0]


def test_the_locked_policy_and_the_cut_are_part_of_the_decision() -> None:
    lock = replace(POLICY, name="lock", accept=None)
    card = replace(CARD, policies=(POLICY, lock))
    claim = claim_of(decision="review", combined_with="lock")
    assert compared(claim, card=card).reproduced
    assert line_of(compared(claim), f"decision of {POLICY.name}").same is None  # no such lock
    assert compared(claim_of(decision="review"), truncated=True).reproduced
    assert compared(claim_of(decision="review", combined_with="")).reproduced


def test_an_id_of_version_1_is_compared_as_far_as_it_goes() -> None:
    found = compared(claim_of(reproduction=None))
    assert found.reproduced
    assert not found.exact
    assert [line.name for line in found.lines] == [
        *("revision", "label", "confidence", f"decision of {POLICY.name}")
    ]
    assert "version 1" in found.notes[0]


def test_the_json_form_is_complete() -> None:
    values = compared(claim_of(deterministic=False)).as_json()
    assert (values["reproduced"], values["mode"], values["tolerance"]) == (
        True,
        "tolerance",
        1e-5,
    )
    assert values["compared"]["label"] == {
        "recorded": "billing",
        "recomputed": "billing",
        "same": True,
    }


def test_the_sampling_is_that_of_the_id() -> None:
    claim = claim_of(num_samples=3, seed=7, estimator="mean_mask")
    assert sampling_of(claim) == Sampling(3, 7, "mean_mask", "iid")
    assert sampling_of(replace(claim, reproduction=None)) == Sampling(3, 7, "mean_mask", "iid")
