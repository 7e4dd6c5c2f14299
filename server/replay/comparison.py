"""What an id recorded beside what came out this time."""

from dataclasses import dataclass
from typing import Any, cast

from server.claims import MANIFEST_CHARS
from server.decision import Verdict, decide, strictest
from server.feedback import PredictionClaim, answer_digest
from server.ports import AdapterCard, Design, Estimator, Policy, RowScores, Sampling
from server.ruling import INLINE

__all__ = ["TOLERANCE", "Comparison", "Line", "compare", "sampling_of"]

TOLERANCE = {"float32": 1e-5, "bfloat16": 0.05}
"""How far a confidence may be off when other rows shared the batch, by dtype.

bfloat16 keeps 8 bits, and the order of a sum follows the shape of the batch.
"""


@dataclass(frozen=True, slots=True)
class Line:
    """One thing that is compared.

    Attributes:
        name: What it is.
        recorded: What the id says; None when it does not say.
        recomputed: What came out; None when it cannot be known here.
        same: Whether they agree; None when there is nothing to compare.
        counts: Whether the answer counts as reproduced only if they agree.
    """

    name: str
    recorded: str | float | None
    recomputed: str | float | None
    same: bool | None
    counts: bool = True


@dataclass(frozen=True, slots=True)
class Comparison:
    """All of it.

    Attributes:
        lines: What was compared.
        exact: Whether the probabilities had to be the same to the bit.
        tolerance: How far the confidence may be off.
        difference: How far it is.
        notes: What explains a difference, or weakens an agreement.
    """

    lines: tuple[Line, ...]
    exact: bool
    tolerance: float
    difference: float
    notes: tuple[str, ...]

    @property
    def reproduced(self) -> bool:
        """Whether everything that counts agrees."""
        return all(line.same is not False for line in self.lines if line.counts)

    def as_json(self) -> dict[str, Any]:
        """Return it as plain values."""
        return {
            "reproduced": self.reproduced,
            "mode": "bitwise" if self.exact else "tolerance",
            "tolerance": None if self.exact else self.tolerance,
            "confidence_difference": self.difference,
            "compared": {
                line.name: {
                    "recorded": line.recorded,
                    "recomputed": line.recomputed,
                    "same": line.same,
                }
                for line in self.lines
            },
            "notes": list(self.notes),
        }


def sampling_of(claim: PredictionClaim) -> Sampling:
    """Return what fixed the samples of an answer."""
    return Sampling(
        num_samples=claim.num_samples,
        seed=claim.seed,
        estimator=cast("Estimator", claim.estimator),
        design=cast("Design", claim.reproduction.design) if claim.reproduction else "iid",
    )


def compare(
    claim: PredictionClaim,
    card: AdapterCard,
    scores: RowScores,
    mask_set: str | None,
    *,
    truncated: bool,
    exact: bool | None = None,
) -> Comparison:
    """Compare an answer with its id.

    Args:
        claim: What the id says.
        card: The adapter that was asked now.
        scores: What it answered.
        mask_set: Id of the sample set now.
        truncated: Whether a part of the question was cut away now.
        exact: Demand the same bits, or do not; None: as the id says.
    """
    recorded = claim.reproduction
    if exact is None:
        exact = recorded is not None and recorded.deterministic
    tolerance, difference = TOLERANCE[card.dtype], abs(scores.confidence - claim.confidence)
    decision = _decision(claim, card, scores, truncated=truncated)
    lines = [
        _line("revision", claim.revision, card.revision),
        _line("label", claim.label, scores.label),
        Line("confidence", claim.confidence, scores.confidence, difference <= tolerance),
        _line(f"decision of {claim.policy or 'no policy'}", claim.decision, decision),
    ]
    notes = [] if decision else [_undecided(claim)]
    if recorded is None:
        notes.append("an id of version 1: calibration, precision and probabilities not recorded")
    else:
        manifest = card.manifest_sha256[:MANIFEST_CHARS] or None
        digest = answer_digest(scores.labels, scores.probs)
        lines += [
            _line("mask set", recorded.mask_set, mask_set),
            _line("calibration", recorded.manifest or None, manifest, counts=False),
            _line("dtype", recorded.dtype, card.dtype, counts=exact),
            _line("probabilities", recorded.probs, digest, counts=exact),
        ]
        if lines[-3].same is False:
            notes.append("the adapter was calibrated or changed since; its tensors are the same")
        if exact and lines[-1].same is False and difference <= tolerance:
            notes.append(
                "close, but not the same bits: another kind of processor or version of a library "
                "computes other last digits"
            )
    return Comparison(tuple(lines), exact, tolerance, difference, tuple(notes))


def _line(name: str, recorded: str | None, recomputed: str | None, *, counts: bool = True) -> Line:
    same = None if recorded is None or recomputed is None else recorded == recomputed
    return Line(name, recorded, recomputed, same, counts)


def _decision(
    claim: PredictionClaim, card: AdapterCard, scores: RowScores, *, truncated: bool
) -> str | None:
    """Return the decision now; None when the policy that decided is not known here."""
    try:
        verdict = _ruled(claim.policy, card, scores, truncated=truncated)
        locked = claim.reproduction.combined_with if claim.reproduction else None
        if locked is not None:
            second = _ruled(locked or None, card, scores, truncated=truncated)
            verdict = strictest(second, verdict)
    except LookupError:
        return None
    return verdict.decision


def _ruled(name: str | None, card: AdapterCard, scores: RowScores, *, truncated: bool) -> Verdict:
    policies: dict[str | None, Policy | None] = {p.name: p for p in reversed(card.policies)}
    return decide({None: None, **policies}[name], scores, truncated=truncated)


def _undecided(claim: PredictionClaim) -> str:
    if claim.policy == INLINE:
        return "the limits were written in the request; the id does not keep them"
    return "the adapter no longer has the policy that decided"
