"""What is signed into a prediction id: the answer, under which promise, and how to get it again."""

import time

from server.decision import Verdict
from server.feedback import (
    PredictionClaim,
    PredictionSigner,
    Reproduction,
    answer_digest,
    make_nonce,
)
from server.ports import AdapterCard, RowScores, Sampling
from server.ruling import Ruling

__all__ = ["MANIFEST_CHARS", "sign_answers"]

MANIFEST_CHARS = 32
"""Hex digits of the manifest's digest that an id keeps."""


def sign_answers(  # noqa: PLR0913 - an id is about all of them
    signer: PredictionSigner,
    card: AdapterCard,
    ruling: Ruling,
    sampling: Sampling,
    rows: tuple[RowScores, ...],
    verdicts: tuple[Verdict, ...],
    *,
    mask_set: str | None = None,
) -> tuple[str, ...]:
    """Return the signed id of every row.

    Args:
        signer: Signs.
        card: The adapter that answered.
        ruling: What decided.
        sampling: What fixed the samples.
        rows: The answers.
        verdicts: Their decisions, in the same order.
        mask_set: Id of the sample set; None when nothing was sampled.
    """
    issued_at = int(time.time())
    claims = (
        PredictionClaim(
            adapter=card.name,
            revision=card.revision,
            label=scores.label,
            confidence=scores.confidence,
            decision=verdict.decision,
            policy=ruling.policy.name if ruling.policy else None,
            target_risk=ruling.target_risk,
            num_samples=sampling.num_samples,
            seed=sampling.seed,
            estimator=sampling.estimator,
            issued_at=issued_at,
            nonce=make_nonce(),
            default_sampling=ruling.default_sampling,
            reproduction=Reproduction(
                manifest=card.manifest_sha256[:MANIFEST_CHARS],
                probs=answer_digest(scores.labels, scores.probs),
                mask_set=mask_set,
                combined_with=_combined_with(ruling),
                truncated="truncated" in verdict.reasons,
                deterministic=card.deterministic,
                threads=card.threads,
                dtype=card.dtype,
                design=sampling.design,
            ),
        )
        for scores, verdict in zip(rows, verdicts, strict=True)
    )
    return tuple(signer.sign(claim) for claim in claims)


def _combined_with(ruling: Ruling) -> str | None:
    if not ruling.combined:
        return None
    return ruling.combined_with.name if ruling.combined_with else ""
