"""Signed prediction ids: what was answered travels in the id, so feedback needs no lookup.

Any replica that shares the secret file can verify an id of any other. An id is readable by whoever
holds it: it carries the answer, never the question.
"""

import contextlib
import hashlib
import os
import secrets
from collections.abc import Sequence
from pathlib import Path

from itsdangerous import BadData, URLSafeSerializer

from server.feedback.claim import PredictionClaim, packed, unpacked
from server.feedback.errors import BadPredictionIdError, FeedbackSetupError

__all__ = [
    "MIN_SECRET_CHARS",
    "PredictionSigner",
    "claim_unverified",
    "load_secrets",
    "make_nonce",
]

MIN_SECRET_CHARS = 32
_NONCE_BYTES = 12
# A salt binds a signature to its purpose and to the order of a claim's fields.
_SALTS = {2: b"dalorra.prediction.v2", 1: b"dalorra.prediction.v1"}


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
        self._serializers = {
            version: URLSafeSerializer(
                list(reversed(keys)),
                salt=salt,
                signer_kwargs={"key_derivation": "hmac", "digest_method": hashlib.sha256},
            )
            for version, salt in _SALTS.items()
        }

    def sign(self, claim: PredictionClaim) -> str:
        """Return the id of a claim: ASCII, safe in a URL, some 400 characters."""
        signed = self._serializers[_version(claim)].dumps(packed(claim))
        return signed if isinstance(signed, str) else signed.decode("ascii")

    def verify(self, prediction_id: str) -> PredictionClaim:
        """Return the claim of an id, of any version.

        Raises:
            BadPredictionIdError: It was not signed with one of the secrets, or not in this form.
        """
        if prediction_id.isascii():
            for version, serializer in self._serializers.items():
                with contextlib.suppress(BadData):
                    claim = unpacked(serializer.loads(prediction_id))
                    if claim is not None and _version(claim) == version:
                        return claim
        raise BadPredictionIdError


def claim_unverified(prediction_id: str) -> PredictionClaim:
    """Return what an id says, whoever made it; for a person who has no secret at hand.

    Raises:
        BadPredictionIdError: It is not in the form of an id.
    """
    if prediction_id.isascii():
        # any key would do: the signature is not looked at
        _, values = URLSafeSerializer("-").loads_unsafe(prediction_id)
        claim = unpacked(values)
        if claim is not None:
            return claim
    raise BadPredictionIdError


def _version(claim: PredictionClaim) -> int:
    return 1 if claim.reproduction is None else 2


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
