import base64
import hashlib
import json
import stat
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from server.auth.keys import (
    KeyFile,
    KeyFileError,
    digest_of,
    make_key,
    parse_keys,
    read_keys,
    write_keys,
)
from tests.support.keys import make_entry


def entry(**changes: Any) -> dict[str, Any]:
    plain = {
        "id": "shop",
        "sha256": "0" * 64,
        "scopes": ["infer"],
        "rate_limit": "600/minute",
        "created": "2026-01-01T00:00:00Z",
        "expires": None,
    }
    return plain | changes


def content(*entries: dict[str, Any], **changes: Any) -> bytes:
    return json.dumps({"version": 1, "keys": list(entries)} | changes).encode()


def test_a_key_has_256_random_bits_and_its_file_only_their_hash(tmp_path: Path) -> None:
    key, digest = make_key()
    assert key.startswith("dk_")
    assert len(base64.urlsafe_b64decode(key[3:] + "=")) == 32
    assert digest == digest_of(key) == hashlib.sha256(key.encode()).hexdigest()
    assert key != make_key()[0]

    key, made = make_entry("shop", ("infer",))
    write_keys(tmp_path / "keys.json", (made,))
    text = (tmp_path / "keys.json").read_text()
    assert made.sha256 in text
    assert key not in text


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"id": ""}, "keys.0.id"),
        ({"id": "a b"}, "keys.0.id"),
        ({"id": "a\n"}, "keys.0.id"),
        ({"id": "a" * 65}, "keys.0.id"),
        ({"sha256": "0" * 63}, "keys.0.sha256"),
        ({"sha256": "A" * 64}, "keys.0.sha256"),
        ({"scopes": []}, "keys.0.scopes"),
        ({"scopes": ["root"]}, "keys.0.scopes.0"),
        ({"rate_limit": "often"}, "keys.0.rate_limit"),
        ({"rate_limit": "0/minute"}, "keys.0.rate_limit"),
        ({"created": "2026-01-01T00:00:00"}, "keys.0.created"),
        ({"expires": "soon"}, "keys.0.expires"),
        ({"admin": True}, "keys.0.admin"),
    ],
)
def test_a_wrong_field_is_named(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(KeyFileError, match=f"^{says}"):
        parse_keys(content(entry(**changes)))


@pytest.mark.parametrize(
    "wrong",
    [
        b"{",
        b"[]",
        b"\xff\xfe",
        b'{"keys": [], "more": 1}',
        content(entry(), version=2),
        content(entry(), entry(sha256="1" * 64)),
        content(entry(), entry(id="other")),
    ],
)
def test_what_is_no_file_of_keys_is_refused_without_being_quoted(wrong: bytes) -> None:
    with pytest.raises(KeyFileError) as caught:
        parse_keys(wrong)
    assert "0000" not in str(caught.value)
    assert caught.value.__cause__ is None


@pytest.mark.parametrize("empty", [b"", b" \n", b'{"version": 1, "keys": []}'])
def test_an_empty_file_has_no_keys(empty: bytes) -> None:
    assert parse_keys(empty) == ()


def test_a_missing_directory_or_huge_file_is_a_fault_without_a_path(tmp_path: Path) -> None:
    (tmp_path / "huge").write_bytes(b" " * (2**20 + 1))
    for name in ("none", ".", "huge"):
        with pytest.raises(KeyFileError) as caught:
            read_keys(tmp_path / name)
        assert str(tmp_path) not in str(caught.value)


def test_writing_keeps_every_field_and_the_mode(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    expires = datetime(2026, 5, 1, tzinfo=UTC)
    _, one = make_entry("one", ("infer", "admin"), rate_limit="5/second", expires=expires)
    _, two = make_entry("two", ("metrics",))
    write_keys(path, (one, two))
    assert read_keys(path) == (one, two)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert KeyFile.model_validate_json(path.read_bytes()).version == 1

    path.chmod(0o640)
    first = path.stat().st_ino
    write_keys(path, (two,))
    assert read_keys(path) == (two,)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert path.stat().st_ino != first, "the file was written in place"
    assert [one.name for one in tmp_path.iterdir()] == ["keys.json"]


def test_a_failed_write_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "keys.json"
    _, one = make_entry("one", ("infer",))
    write_keys(path, (one,))

    def full(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_keys(path, ())
    assert read_keys(path) == (one,)
    assert [one.name for one in tmp_path.iterdir()] == ["keys.json"]


def test_a_link_to_the_file_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "keys.json")
    (tmp_path / "keys.json").write_bytes(b"")
    _, one = make_entry("one", ("infer",))
    write_keys(tmp_path / "link", (one,))
    assert (tmp_path / "link").is_symlink()
    assert read_keys(tmp_path / "keys.json") == (one,)


def test_a_key_expires_at_its_time() -> None:
    moment = datetime(2026, 5, 1, tzinfo=UTC)
    _, key = make_entry("one", ("infer",), expires=moment)
    assert not key.has_expired(moment - timedelta(seconds=1))
    assert key.has_expired(moment)
    assert not make_entry("two", ("infer",))[1].has_expired(moment)
