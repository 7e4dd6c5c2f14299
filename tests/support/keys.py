"""Files of API keys for tests."""

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from server.auth.keys import ApiKey, make_key, write_keys

__all__ = ["bearer", "make_entry", "write_key_file"]

CREATED = datetime(2026, 1, 1, tzinfo=UTC)


def make_entry(name: str, scopes: tuple[str, ...], **fields: Any) -> tuple[str, ApiKey]:
    """Return a new key and its entry."""
    key, digest = make_key()
    entry = {"id": name, "sha256": digest, "scopes": scopes, "created": CREATED} | fields
    return key, ApiKey.model_validate(entry)


def write_key_file(path: Path, **scopes: tuple[str, ...]) -> dict[str, str]:
    """Write a file with one key for each name; return name -> key."""
    made = {name: make_entry(name, wanted) for name, wanted in scopes.items()}
    write_keys(path, tuple(entry for _, entry in made.values()))
    return {name: key for name, (key, _) in made.items()}


def bearer(key: str) -> dict[str, str]:
    """Return the header that presents a key."""
    return {"Authorization": f"Bearer {key}"}
