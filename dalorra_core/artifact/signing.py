"""Who vouches for an adapter: Ed25519 signatures over the digest of its manifest.

The manifest lists the sha256 of every other file, so a signature over its digest is over every byte
of the adapter. ``signature.json`` lies beside it and is no part of what is signed::

    {"format_version": 1,
     "signatures": [{"algorithm": "ed25519", "key_id": ..., "manifest_sha256": ...,
                     "signed_at": ..., "signature": ...}]}

A key's id is the first 16 hex digits of the sha256 of its 32 bytes. The date is signed too.
"""

import base64
import binascii
import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from dalorra_core.artifact.keys import (
    TrustedKeys,
    read_private_key,
    signature_is_valid,
    signed_message,
)
from dalorra_core.artifact.placing import place_file
from dalorra_core.artifact.store import SIGNATURE_FILE, load_artifact
from dalorra_core.errors import ArtifactUntrustedError

__all__ = [
    "SignatureState",
    "TrustedKeys",
    "read_signatures",
    "sign_artifact",
    "signature_states",
    "verify_signature",
]

_LARGEST_FILE = 65_536
_HEX = r"^[0-9a-f]+$"  # pydantic's $ is the very end

_MOMENT = r"^[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}Z$"

State = Literal["valid", "unverified", "unknown_key", "stale", "invalid"]
"""Of a trusted key; no keys were given; of another key; of other content; not of what it says."""

_WHY: Mapping[State, str] = {
    "unverified": "no trusted keys were given",
    "unknown_key": "this key is not among the trusted ones",
    "stale": "it is of other content: the adapter was changed after it was signed, such as by "
    "dalorra calibrate; sign it again",
    "invalid": "it is not a signature of this key over this content",
}


class _Signature(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    algorithm: Literal["ed25519"] = "ed25519"
    key_id: str = Field(pattern=_HEX, min_length=16, max_length=16)
    manifest_sha256: str = Field(pattern=_HEX, min_length=64, max_length=64)
    signed_at: str = Field(pattern=_MOMENT)
    signature: str = Field(min_length=88, max_length=88)


class _SignatureFile(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    format_version: Literal[1] = 1
    signatures: tuple[_Signature, ...] = Field(min_length=1, max_length=64)


@dataclass(frozen=True, slots=True)
class SignatureState:
    """One signature and what it is worth.

    Attributes:
        key_id: Key that is said to have made it.
        signed_at: When, as the signature says, UTC.
        state: Whether to believe it.
    """

    key_id: str
    signed_at: str
    state: State

    @property
    def text(self) -> str:
        """Return the state as a sentence's part."""
        why = _WHY.get(self.state)
        return f"signed by {self.key_id} at {self.signed_at}" + (f": {why}" if why else "")


def sign_artifact(
    directory: Path,
    private_key_pem: bytes,
    *,
    passphrase: bytes | None = None,
    now: datetime | None = None,
) -> str:
    """Sign an adapter as it is now and return the key's id; its files do not change.

    The signatures of other keys over the same content stay; one of this key is replaced, and those
    of other content go.

    Args:
        directory: An artifact; every byte is checked first.
        private_key_pem: An Ed25519 private key, PKCS #8 in PEM.
        passphrase: Of the PEM when it is encrypted.
        now: Date of the signature; None for the present.

    Raises:
        ArtifactError: It is no sound artifact, or its ``signature.json`` is none.
        ConfigError: The key cannot be used, or the extra ``sign`` is not installed.
    """
    key = read_private_key(private_key_pem, passphrase)
    digest = load_artifact(directory).manifest_sha256
    signed_at = (now or datetime.now(UTC)).astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    made = _Signature(
        key_id=key.key_id,
        manifest_sha256=digest,
        signed_at=signed_at,
        signature=base64.b64encode(key.sign(signed_message(digest, signed_at))).decode("ascii"),
    )
    kept = tuple(
        one
        for one in read_signatures(directory)
        if one.manifest_sha256 == digest and one.key_id != made.key_id
    )
    values = _SignatureFile(signatures=(*kept, made)).model_dump(mode="json")
    place_file(directory / SIGNATURE_FILE, (json.dumps(values, indent=1) + "\n").encode())
    return made.key_id


def verify_signature(directory: Path, manifest_sha256: str, trusted: TrustedKeys) -> str:
    """Return the id of the trusted key that signed an artifact.

    Nothing of the artifact is read again: the digest is of the bytes that were parsed.

    Args:
        directory: Where its ``signature.json`` lies.
        manifest_sha256: ``Artifact.manifest_sha256`` of what was loaded.
        trusted: Keys to believe; one valid signature of any of them is enough.

    Raises:
        ArtifactUntrustedError: It is not signed, not by one of these keys, or was changed since.
            The text names no path but the directory's name.
    """
    states = signature_states(directory, manifest_sha256, trusted)
    for one in states:
        if one.state == "valid":
            return one.key_id
    if not states:
        raise ArtifactUntrustedError(
            f"adapter {directory.name} is not signed; dalorra sign signs it, and one of the "
            f"trusted keys must: {', '.join(trusted.key_ids)}"
        )
    # what is nearest to being trusted says best what to do
    nearest = min(states, key=lambda one: ("invalid", "stale", "unknown_key").index(one.state))
    raise ArtifactUntrustedError(
        f"adapter {directory.name} is not signed by a trusted key "
        f"({', '.join(trusted.key_ids)}); it is {nearest.text}"
    )


def signature_states(
    directory: Path, manifest_sha256: str, trusted: TrustedKeys | None
) -> tuple[SignatureState, ...]:
    """Return what every signature of an artifact is worth; empty when it is not signed.

    Args:
        directory: Where its ``signature.json`` lies.
        manifest_sha256: Digest of the manifest that was read.
        trusted: Keys to believe; None: nothing is verified but what a signature says it is of.

    Raises:
        ArtifactUntrustedError: ``signature.json`` is not in its form.
    """
    return tuple(
        SignatureState(one.key_id, one.signed_at, _state(one, manifest_sha256, trusted))
        for one in read_signatures(directory)
    )


def _state(one: _Signature, manifest_sha256: str, trusted: TrustedKeys | None) -> State:
    if one.manifest_sha256 != manifest_sha256:
        return "stale"
    if trusted is None:
        return "unverified"
    key = trusted.keys.get(one.key_id)
    if key is None:
        return "unknown_key"
    try:
        signature = base64.b64decode(one.signature, validate=True)
    except (binascii.Error, ValueError):
        return "invalid"
    message = signed_message(manifest_sha256, one.signed_at)
    return "valid" if signature_is_valid(key, signature, message) else "invalid"


def read_signatures(directory: Path) -> tuple[_Signature, ...]:
    """Return the signatures beside a manifest, unverified; empty when there is no file of them.

    Raises:
        ArtifactUntrustedError: The file cannot be read, or is not in its form.
    """
    try:
        with (directory / SIGNATURE_FILE).open("rb") as file:
            content = file.read(_LARGEST_FILE + 1)
    except FileNotFoundError:
        return ()
    except OSError as error:
        raise ArtifactUntrustedError(
            f"{SIGNATURE_FILE} of adapter {directory.name} cannot be read: {error.strerror}"
        ) from None
    if len(content) > _LARGEST_FILE:
        raise ArtifactUntrustedError(
            f"{SIGNATURE_FILE} of adapter {directory.name} must have at most {_LARGEST_FILE} bytes"
        )
    try:
        return _SignatureFile.model_validate_json(content).signatures
    except (ValidationError, RecursionError):
        raise ArtifactUntrustedError(
            f"{SIGNATURE_FILE} of adapter {directory.name} is not in its form; dalorra sign makes "
            "it anew once the file is removed"
        ) from None
