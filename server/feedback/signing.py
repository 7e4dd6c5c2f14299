"""Signed prediction ids: what was answered travels in the id, so feedback needs no lookup.

Any replica that shares the secret file can verify an id of any other. An id is readable by whoever
holds it: it carries the answer, never the question.
"""

import contextlib
import hashlib
import json
import os
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from itsdangerous import BadData, URLSafeSerializer

from server.feedback.errors import BadPredictionIdError, FeedbackSetupError

__all__ = [
    "MIN_SECRET_CHARS",
    "PredictionClaim",
    "PredictionSigner",
    "load_secrets",
    "make_nonce",
]

MIN_SECRET_CHARS = 32
_NONCE_BYTES = 12
# The salt binds a signature to its purpose and to the order of the fields below.
_SALT = b"dalorra.prediction.v1"
_CONFIDENCE_DIGITS = 9


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

    @property
    def digest(self) -> bytes:
        """sha256 of the claim, 32 bytes: its key in the database.

        Made from the claim and not from the id's characters, since base64 has several spellings
        of one signature.
        """
        return hashlib.sha256(json.dumps(_packed(self)).encode()).digest()


_FIELDS = tuple(field.name for field in fields(PredictionClaim))


class PredictionSigner:
    """Signs claims with HMAC-SHA256 and verifies them; safe to share between threads.

    Args:
        keys: Secrets; the first signs, every one verifies, so that a secret can be replaced
            without losing the ids that are out.
    """

    def __init__(self, keys: Sequence[str]) -> None:
        if not keys:
            raise ValueError("a PredictionSigner needs at least one secret, got none")
        # itsdangerous signs with the last of its keys
        self._serializer = URLSafeSerializer(
            list(reversed(keys)),
            salt=_SALT,
            signer_kwargs={"key_derivation": "hmac", "digest_method": hashlib.sha256},
        )

    def sign(self, claim: PredictionClaim) -> str:
        """Return the id of a claim: ASCII, safe in a URL, some 250 characters."""
        signed = self._serializer.dumps(_packed(claim))
        return signed if isinstance(signed, str) else signed.decode("ascii")

    def verify(self, prediction_id: str) -> PredictionClaim:
        """Return the claim of an id.

        Raises:
            BadPredictionIdError: It was not signed with one of the secrets, or not in this form.
        """
        if not prediction_id.isascii():
            raise BadPredictionIdError
        try:
            values = self._serializer.loads(prediction_id)
        except BadData:
            raise BadPredictionIdError from None
        if not isinstance(values, list) or len(values) != len(_FIELDS):
            raise BadPredictionIdError
        return PredictionClaim(*values)


def _packed(claim: PredictionClaim) -> list[object]:
    """Return a claim as the list that is signed: no names, no needless digits."""
    values = [getattr(claim, name) for name in _FIELDS]
    values[_FIELDS.index("confidence")] = round(claim.confidence, _CONFIDENCE_DIGITS)
    return values


def make_nonce() -> str:
    """Return 96 random bits as text."""
    return secrets.token_urlsafe(_NONCE_BYTES)


def load_secrets(path: Path, *, create: bool) -> tuple[str, ...]:
    """Return the secrets in a file, one on each line; the first is the one that signs.

    Args:
        path: The file.
        create: Make it with one random secret when it is not there. Of several processes that
            try at once, one succeeds and the others read what it wrote.

    Raises:
        FeedbackSetupError: It cannot be read or created, or a secret in it is too short.
    """
    try:
        if create and not path.exists():
            _create(path)
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise FeedbackSetupError(
            f"secret_file: {path} cannot be {'created or ' if create else ''}read: {reason}; "
            "set DALORRA_SECRET_FILE or DALORRA_STATE_DIR to a place this user may use"
        ) from None
    found = tuple(line.strip() for line in text.splitlines() if line.strip())
    shortest = min((len(secret) for secret in found), default=0)
    if shortest < MIN_SECRET_CHARS:
        raise FeedbackSetupError(
            f"secret_file: {path} must hold secrets of at least {MIN_SECRET_CHARS} characters, "
            f"one on each line; its shortest has {shortest}"
        )
    return found


def _create(path: Path) -> None:
    """Write a new secret under a name of its own and link it into place: whole or not at all."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(secrets.token_hex(32) + "\n")
            file.flush()
            os.fsync(file.fileno())
        with contextlib.suppress(FileExistsError):  # another process was first
            os.link(draft, path)
    finally:
        draft.unlink()
