"""The file of API keys: what it holds, how it is read and written.

A key is ``dk_`` and 256 random bits in URL-safe base64. The file holds its plain SHA-256 and never
the key. A slow password hash with a salt is for secrets that people choose, which can be guessed;
nobody guesses 256 random bits, with or without the file, and a fast hash keeps a flood of wrong
keys cheap.
"""

import contextlib
import fcntl
import hashlib
import os
import secrets
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import (
    AfterValidator,
    AwareDatetime,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from server.auth.rate import parse_rate
from server.auth.table import Scope

__all__ = [
    "ApiKey",
    "KeyFile",
    "KeyFileError",
    "digest_of",
    "locked",
    "make_key",
    "parse_checked",
    "parse_keys",
    "read_keys",
    "write_keys",
]

MAX_FILE_BYTES = 2**20
_MAX_FAULTS = 3


class KeyFileError(Exception):
    """The file of API keys cannot be used; the message says why and names no path."""


def _checked_rate(text: str) -> str:
    parse_rate(text)
    return text


class ApiKey(BaseModel):
    """One key as the file holds it.

    Attributes:
        id: Name of the key in logs and in ``dalorra keys revoke``; no secret.
        sha256: Lower-case hexadecimal SHA-256 of the key.
        scopes: What it may do; at least one.
        rate_limit: Such as ``600/minute``; None for no limit.
        created: When it was made.
        expires: From when on it is refused; None for never.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: str = Field(pattern=r"^[A-Za-z0-9._-]{1,64}\z")
    sha256: str = Field(pattern=r"^[0-9a-f]{64}\z")
    scopes: tuple[Scope, ...] = Field(min_length=1)
    rate_limit: Annotated[str, AfterValidator(_checked_rate)] | None = None
    created: AwareDatetime
    expires: AwareDatetime | None = None

    def has_expired(self, now: datetime) -> bool:
        """Return whether the key is refused at a time."""
        return self.expires is not None and now >= self.expires


class KeyFile(BaseModel):
    """The whole file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    version: Literal[1] = 1
    keys: tuple[ApiKey, ...] = ()

    @model_validator(mode="after")
    def _check_unique(self) -> Self:
        for name in ("id", "sha256"):
            counts = Counter(getattr(key, name) for key in self.keys)
            if counts and max(counts.values()) > 1:
                raise ValueError(f"every key must have its own {name}")
        return self


def make_key() -> tuple[str, str]:
    """Return a new key and its SHA-256 in hexadecimal."""
    key = f"dk_{secrets.token_urlsafe(32)}"
    return key, digest_of(key)


def digest_of(key: str) -> str:
    """Return the SHA-256 of a key in hexadecimal, as the file holds it."""
    # a header may hold bytes above ASCII; they make it a wrong key, not an error
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()


def parse_keys(content: bytes) -> tuple[ApiKey, ...]:
    """Return the keys in a file's content; an empty file has none.

    Raises:
        KeyFileError: It is not a file of keys. Neither the message nor its cause quotes it.
    """
    if not content.strip():
        return ()
    try:
        return KeyFile.model_validate_json(content).keys
    except ValidationError as error:
        raise _described(error) from None


def parse_checked(entry: Mapping[str, object]) -> ApiKey:
    """Return a key from its fields.

    Raises:
        KeyFileError: A field is outside its domain.
    """
    try:
        return ApiKey.model_validate(entry)
    except ValidationError as error:
        raise _described(error) from None


def _described(error: ValidationError) -> KeyFileError:
    faults = error.errors(include_url=False, include_input=False, include_context=False)
    text = "; ".join(
        f"{'.'.join(str(part) for part in fault['loc']) or 'file'}: {fault['msg']}"
        for fault in faults[:_MAX_FAULTS]
    )
    return KeyFileError(text)


def read_keys(path: Path) -> tuple[ApiKey, ...]:
    """Return the keys in a file.

    Raises:
        KeyFileError: It cannot be read, is larger than 1 MiB or is not a file of keys.
    """
    try:
        with path.open("rb") as file:
            content = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise KeyFileError(error.strerror or type(error).__name__) from None
    if len(content) > MAX_FILE_BYTES:
        raise KeyFileError(f"larger than {MAX_FILE_BYTES} bytes")
    return parse_keys(content)


def write_keys(path: Path, keys: tuple[ApiKey, ...]) -> None:
    """Replace a file of keys: a reader sees the old one or the new one, also after a crash.

    A new file is readable by its owner only; one that was there keeps its mode, and its owner
    where the system allows that.

    Raises:
        OSError: It cannot be written.
    """
    path = path.resolve()  # replace what a link points to, not the link
    text = KeyFile(keys=keys).model_dump_json(indent=1) + "\n"
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    temporary = Path(name)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            if path.exists():
                was = path.stat()
                os.fchmod(file.fileno(), was.st_mode & 0o777)
                with contextlib.suppress(PermissionError):
                    os.fchown(file.fileno(), was.st_uid, was.st_gid)
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    with _directory(path) as descriptor:
        os.fsync(descriptor)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Keep other ``dalorra keys`` away from a file between reading and writing it."""
    with _directory(path.resolve()) as descriptor:
        fcntl.flock(descriptor, fcntl.LOCK_EX)  # released when it is closed
        yield


@contextlib.contextmanager
def _directory(path: Path) -> Iterator[int]:
    descriptor = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)
