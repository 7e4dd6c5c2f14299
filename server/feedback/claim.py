"""What a prediction id says: the answer, and since version 2 what is needed to compute it again."""

import hashlib
import json
import struct
from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields

__all__ = ["PredictionClaim", "Reproduction", "answer_digest", "packed", "unpacked"]

_CONFIDENCE_DIGITS = 9
_DIGEST_CHARS = 32


@dataclass(frozen=True, slots=True)
class Reproduction:
    """What a version 2 id adds, so that the answer can be computed again and compared.

    Attributes:
        manifest: First 32 hex digits of the digest of the adapter's manifest: which calibration
            and which policies answered. Empty when the engine does not say.
        probs: First 32 hex digits of ``answer_digest``.
        mask_set: Id of the sample set; None when nothing was sampled.
        combined_with: Name of the locked policy that decided as well; empty when the server locks
            one and the adapter has none; None when no other policy had a say.
        truncated: Whether a part of the question was cut away.
        deterministic: Whether rows were run alone, so that the probabilities are the same to the
            bit whenever they are computed on such a machine.
        threads: Threads of one forward pass on a CPU; 0 when the engine does not say.
        dtype: Precision of the base model.
        design: How the samples were drawn together.
    """

    manifest: str
    probs: str
    mask_set: str | None
    combined_with: str | None
    truncated: bool
    deterministic: bool
    threads: int
    dtype: str
    design: str


@dataclass(frozen=True, slots=True)
class PredictionClaim:
    """What a prediction id says about one answered row.

    Attributes:
        adapter: Name of the adapter that answered.
        revision: Its revision.
        label: The answer.
        confidence: In [0, 1]; an id keeps nine decimal places.
        decision: ``accept``, ``review`` or ``abstain``.
        policy: Name of the policy that decided; None without one.
        target_risk: Target of the certificate that held for this answer; None when none did.
        num_samples: M of the answer.
        seed: Seed of the mask set.
        estimator: ``monte_carlo`` or ``mean_mask``.
        issued_at: Seconds since 1970.
        nonce: Makes the id unique; see ``make_nonce``.
        default_sampling: Whether the adapter's own sampling answered.
        reproduction: What replay needs; None in ids of version 1.
    """

    adapter: str
    revision: str
    label: str
    confidence: float
    decision: str
    policy: str | None
    target_risk: float | None
    num_samples: int
    seed: int
    estimator: str
    issued_at: int
    nonce: str
    default_sampling: bool
    reproduction: Reproduction | None = None

    @property
    def digest(self) -> bytes:
        """sha256 of the claim, 32 bytes: its key in the database.

        Made from the claim and not from the id's characters, since base64 has several spellings
        of one signature.
        """
        return hashlib.sha256(json.dumps(packed(self)).encode()).digest()


_ANSWER = tuple(f.name for f in fields(PredictionClaim) if f.name != "reproduction")
_REPRODUCTION = tuple(f.name for f in fields(Reproduction))


def packed(claim: PredictionClaim) -> list[object]:
    """Return a claim as the list that is signed: no names, no needless digits."""
    values = [getattr(claim, name) for name in _ANSWER]
    values[_ANSWER.index("confidence")] = round(claim.confidence, _CONFIDENCE_DIGITS)
    return values if claim.reproduction is None else [*values, *astuple(claim.reproduction)]


def unpacked(values: object) -> PredictionClaim | None:
    """Return the claim of such a list; None when it is none."""
    if not isinstance(values, list):
        return None
    if len(values) == len(_ANSWER):
        return PredictionClaim(*values)
    if len(values) == len(_ANSWER) + len(_REPRODUCTION):
        answer, rest = values[: len(_ANSWER)], values[len(_ANSWER) :]
        return PredictionClaim(*answer, reproduction=Reproduction(*rest))
    return None


def answer_digest(labels: Sequence[str], probs: Sequence[float]) -> str:
    """Return 32 hex digits of the sha256 of the labels and the exact float64 probabilities."""
    digest = hashlib.sha256(json.dumps(list(labels)).encode())
    digest.update(struct.pack(f"<{len(probs)}d", *probs))
    return digest.hexdigest()[:_DIGEST_CHARS]
