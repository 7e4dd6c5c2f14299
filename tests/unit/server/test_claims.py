"""server.claims: an id says what was answered, to the bit, and nothing of the question."""

from dataclasses import replace
from typing import Any

import pytest

from server.claims import sign_answers
from server.decision import Verdict
from server.feedback import PredictionClaim, PredictionSigner, answer_digest
from server.ports import AdapterCard
from server.ruling import INLINE, rule
from server.schemas.policies import ThresholdPolicy
from tests.support.fake_engine import TOPICS, TOPICS_CERTIFIED, score

SIGNER = PredictionSigner(["s" * 40])
CARD = replace(
    TOPICS_CERTIFIED,
    manifest_sha256="ab" * 32,
    deterministic=True,
    threads=3,
    dtype="bfloat16",
)


def claims(
    card: AdapterCard = CARD, asked: Any = None, locked: str | None = None, **verdict: Any
) -> list[PredictionClaim]:
    """Sign two answers and return what the ids say."""
    ruling = rule(card, asked, card.defaults, locked)
    rows = tuple(score(text, card.labels, card.defaults, card) for text in ("one", "two"))
    verdicts = tuple(Verdict(**({"decision": "review", "reasons": ()} | verdict)) for _ in rows)
    ids = sign_answers(SIGNER, card, ruling, card.defaults, rows, verdicts, mask_set="ms_4_0")
    assert len(set(ids)) == 2
    return [SIGNER.verify(one) for one in ids]


def test_an_id_keeps_what_is_needed_to_compute_the_answer_again() -> None:
    for claim, text in zip(claims(), ("one", "two"), strict=True):
        scores = score(text, CARD.labels, CARD.defaults, CARD)
        kept = claim.reproduction
        assert kept is not None
        assert (claim.adapter, claim.revision, claim.label) == (
            CARD.name,
            CARD.revision,
            scores.label,
        )
        assert claim.confidence == pytest.approx(scores.confidence, abs=1e-9)
        assert kept.probs == answer_digest(scores.labels, scores.probs)
        assert (kept.manifest, kept.mask_set) == ("ab" * 16, "ms_4_0")
        assert (kept.deterministic, kept.threads) == (True, 3)
        assert (kept.dtype, kept.design) == ("bfloat16", "iid")
        assert (kept.truncated, kept.combined_with) == (False, None)


def test_an_id_says_that_the_question_was_cut() -> None:
    for claim in claims(reasons=("low_confidence", "truncated")):
        assert claim.reproduction is not None
        assert claim.reproduction.truncated


def test_an_id_names_the_locked_policy_that_decided_as_well() -> None:
    asked = ThresholdPolicy.model_validate({"min_confidence": 0.1})
    (locked, _) = claims(asked=asked, locked=CARD.policies[0].name)
    assert (locked.policy, locked.reproduction and locked.reproduction.combined_with) == (
        INLINE,
        CARD.policies[0].name,
    )
    bare = replace(TOPICS, policies=())
    (nothing, _) = claims(card=bare, asked=asked, locked="strict")
    assert nothing.reproduction is not None
    assert nothing.reproduction.combined_with == ""
