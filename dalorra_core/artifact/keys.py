"""Ed25519 keys in PEM: those that sign adapters and those that are trusted.

``cryptography`` (the extra ``sign``) is imported only where a key is at hand.
"""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from dalorra_core.errors import ConfigError

__all__ = [
    "PrivateKey",
    "TrustedKeys",
    "is_encrypted",
    "make_key_pair",
    "read_private_key",
    "signature_is_valid",
    "signed_message",
]

# Says what a signature is of, so that it can never be taken for one of something else.
_DOMAIN = "dalorra adapter signature, version 1"
_LARGEST_FILE = 1 << 20
_BLOCK = re.compile(
    rb"-----BEGIN ([A-Z0-9 ]+)-----\s*\n([A-Za-z0-9+/=\s]+?)-----END \1-----", re.ASCII
)


def signed_message(manifest_sha256: str, signed_at: str) -> bytes:
    """Return the bytes that a key signs: what for, of which content, when."""
    return f"{_DOMAIN}\nmanifest_sha256 {manifest_sha256}\nsigned_at {signed_at}\n".encode("ascii")


@dataclass(frozen=True)
class PrivateKey:
    """A key that signs.

    Attributes:
        key_id: First 16 hex digits of the sha256 of the raw public key.
        key: The key as ``cryptography`` holds it.
    """

    key_id: str
    key: Any

    def sign(self, message: bytes) -> bytes:
        """Return the signature of a message, 64 bytes; the same for the same message."""
        signature: bytes = self.key.sign(message)
        return signature


@dataclass(frozen=True)
class TrustedKeys:
    """Public keys whose signatures are believed.

    Attributes:
        keys: Key id -> the key as ``cryptography`` holds it.
    """

    keys: Mapping[str, Any]

    @property
    def key_ids(self) -> tuple[str, ...]:
        """Ids of the keys, in the order of the file."""
        return tuple(self.keys)

    @classmethod
    def read(cls, path: Path) -> Self:
        """Return the keys in a file of PEM public keys; between them, empty lines and # comments.

        Raises:
            ConfigError: It cannot be read, holds no key, or anything that is no Ed25519 public key;
                or the extra ``sign`` is not installed.
        """
        try:
            with path.open("rb") as file:
                content = file.read(_LARGEST_FILE + 1)
        except OSError as error:
            raise ConfigError(
                f"trusted_keys: {path.name} cannot be read: {error.strerror}"
            ) from None
        if len(content) > _LARGEST_FILE:
            raise ConfigError(f"trusted_keys: {path.name} must have at most {_LARGEST_FILE} bytes")
        return cls.parse(content, path.name)

    @classmethod
    def parse(cls, content: bytes, name: str = "trusted keys") -> Self:
        """Return the keys in the content of such a file; ``name`` is for errors."""
        content = content.replace(b"\r\n", b"\n")
        for line in _BLOCK.sub(b"", content).splitlines():
            if line.strip() and not line.lstrip().startswith(b"#"):
                # A damaged block must not pass as a remark, or a key would be missing silently.
                raise ConfigError(
                    f"trusted_keys: {name} must hold PEM public keys, empty lines and lines that "
                    f"begin with #, got {line[:40].decode('ascii', 'replace')!r}"
                )
        blocks = list(_BLOCK.finditer(content))
        if not blocks:
            raise ConfigError(
                f"trusted_keys: {name} must hold at least one PEM public key, got none"
            )
        keys: dict[str, Any] = {}
        for number, block in enumerate(blocks, start=1):
            key = _public_key(block, f"trusted_keys: key {number} of {name}")
            keys[_key_id(key)] = key
        return cls(keys)


def read_private_key(pem: bytes, passphrase: bytes | None = None) -> PrivateKey:
    """Return the private key in a PEM.

    Raises:
        ConfigError: It is none of Ed25519, the passphrase is wrong, missing or needless, or the
            extra ``sign`` is not installed.
    """
    serialization, ed25519 = _cryptography()
    from cryptography.exceptions import UnsupportedAlgorithm  # noqa: PLC0415

    if is_encrypted(pem) and not passphrase:
        raise ConfigError("the private key is protected by a passphrase and none was given")
    try:
        key = serialization.load_pem_private_key(pem, passphrase if is_encrypted(pem) else None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise ConfigError(
            "the private key must be an Ed25519 key in PEM (PKCS #8)"
            + (", or its passphrase is another one" if is_encrypted(pem) else "")
        ) from None
    if not isinstance(key, ed25519.Ed25519PrivateKey):
        raise ConfigError(f"the private key must be an Ed25519 key, got {type(key).__name__}")
    return PrivateKey(_key_id(key.public_key()), key)


def is_encrypted(pem: bytes) -> bool:
    """Return whether a PEM private key is protected by a passphrase."""
    return b"-----BEGIN ENCRYPTED PRIVATE KEY-----" in pem


def make_key_pair(passphrase: bytes | None = None) -> tuple[bytes, bytes]:
    """Return a new private and public key, both in PEM; a passphrase encrypts the private one."""
    serialization, ed25519 = _cryptography()
    key = ed25519.Ed25519PrivateKey.generate()
    private = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.BestAvailableEncryption(passphrase)
        if passphrase
        else serialization.NoEncryption(),
    )
    public = key.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    return private, public


def signature_is_valid(key: Any, signature: bytes, message: bytes) -> bool:
    """Return whether a public key's owner signed this message."""
    from cryptography.exceptions import InvalidSignature  # noqa: PLC0415

    try:
        key.verify(signature, message)
    except InvalidSignature:
        return False
    return True


def _public_key(block: re.Match[bytes], where: str) -> Any:
    serialization, ed25519 = _cryptography()
    from cryptography.exceptions import UnsupportedAlgorithm  # noqa: PLC0415

    kind = block[1].decode("ascii")
    if kind != "PUBLIC KEY":
        raise ConfigError(
            f"{where} must be a PUBLIC KEY, got a {kind}"
            + (
                "; a private key belongs to those who sign, nowhere else"
                if "PRIVATE" in kind
                else ""
            )
        )
    try:
        key = serialization.load_pem_public_key(block[0])
    except (ValueError, UnsupportedAlgorithm):
        raise ConfigError(f"{where} cannot be read as a public key") from None
    if not isinstance(key, ed25519.Ed25519PublicKey):
        raise ConfigError(f"{where} must be an Ed25519 key, got {type(key).__name__}")
    return key


def _key_id(public_key: Any) -> str:
    return hashlib.sha256(public_key.public_bytes_raw()).hexdigest()[:16]


def _cryptography() -> tuple[Any, Any]:
    """Return the two modules of ``cryptography`` that are used here.

    Raises:
        ConfigError: It is not installed.
    """
    try:
        from cryptography.hazmat.primitives import serialization  # noqa: PLC0415
        from cryptography.hazmat.primitives.asymmetric import ed25519  # noqa: PLC0415
    except ImportError:
        raise ConfigError(
            "signatures need the extra sign, which is not installed: pip install 'dalorra[sign]'"
        ) from None
    return serialization, ed25519
