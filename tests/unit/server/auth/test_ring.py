import logging
import os
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from server.auth.keys import KeyFileError, write_keys
from server.auth.ring import KeyRing
from tests.support.keys import CREATED, make_entry, write_key_file


class Ring:
    """A key ring on a clock that stands still until it is told otherwise."""

    def __init__(self, path: Path) -> None:
        self.now_s = 0.0
        self.today = CREATED
        self.failures = 0
        self.keys = KeyRing(
            path, on_failure=self.fail, clock=lambda: self.now_s, now=lambda: self.today
        )

    def fail(self) -> None:
        self.failures += 1

    def knows(self, key: str, *, after_s: float = 2.0) -> bool:
        self.now_s += after_s
        return self.keys.find(key) is not None


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "keys.json"


def test_the_key_that_was_presented_is_found(path: Path) -> None:
    keys = write_key_file(path, a=("infer",), b=("metrics",))
    ring = Ring(path).keys
    for name, key in keys.items():
        found = ring.find(key)
        assert found is not None
        assert found.id == name
    for wrong in ("", "dk_", keys["a"][:-1], keys["a"] + "x", "\xff\x00", "x" * 10_000, "\udcff"):
        assert ring.find(wrong) is None
    assert len(ring) == 2


def test_every_stored_digest_is_compared(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = write_key_file(path, a=("infer",), b=("infer",), c=("infer",))
    ring = Ring(path).keys
    compared: list[bytes] = []

    def compare(stored: bytes, presented: bytes) -> bool:
        compared.append(stored)
        return stored == presented

    monkeypatch.setattr("hmac.compare_digest", compare)
    for presented in (keys["a"], keys["c"], "dk_wrong"):
        compared.clear()
        ring.find(presented)
        assert len(compared) == 3


def test_a_replaced_file_is_taken_up_within_a_second(path: Path) -> None:
    old = write_key_file(path, a=("infer",))["a"]
    ring = Ring(path)
    new = write_key_file(path, a=("infer",))["a"]
    assert not ring.knows(new, after_s=0.9)
    assert ring.knows(old, after_s=0)
    assert ring.knows(new, after_s=0.2)
    assert not ring.knows(old, after_s=0)
    assert ring.failures == 0


def test_a_file_changed_in_place_is_taken_up(path: Path) -> None:
    write_key_file(path, a=("infer",))
    ring = Ring(path)
    other = path.with_name("other.json")
    key = write_key_file(other, b=("infer",))["b"]
    path.write_bytes(other.read_bytes())
    assert ring.knows(key)


def _delete(path: Path) -> None:
    path.unlink()


def _break(path: Path) -> None:
    path.write_text('{"version": 1, "keys": [{"id": "SECRET"}]}')


def _directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("spoil", [_delete, _break, _directory])
def test_a_spoilt_file_keeps_the_last_good_keys(
    path: Path, spoil: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    key = write_key_file(path, a=("infer",))["a"]
    ring = Ring(path)
    spoil(path)
    with caplog.at_level(logging.INFO):
        assert all(ring.knows(key) for _ in range(3))
        assert not ring.knows("dk_other")
    errors = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert len(errors) == 1
    assert vars(errors[0])["setting"] == "api_keys_file"
    assert "SECRET" not in str(vars(errors[0]))
    assert str(path) not in str(vars(errors[0]))
    assert ring.failures == 4

    if path.is_dir():
        path.rmdir()
    new = write_key_file(path, b=("infer",))["b"]
    assert ring.knows(new)
    assert not ring.knows(key, after_s=0)
    assert ring.failures == 4


def test_a_file_that_comes_back_as_it_was_is_good_again(path: Path) -> None:
    key = write_key_file(path, a=("infer",))["a"]
    ring = Ring(path)
    away = path.rename(path.with_name("away"))
    assert ring.knows(key)
    away.rename(path)
    assert ring.knows(key)
    assert ring.knows(key)
    assert ring.failures == 1


@pytest.mark.parametrize("empty", [b"", b'{"version": 1, "keys": []}'])
def test_an_emptied_file_locks_everyone_out(path: Path, empty: bytes) -> None:
    key = write_key_file(path, a=("infer",))["a"]
    ring = Ring(path)
    path.write_bytes(empty)
    assert not ring.knows(key)
    assert not ring.knows("")
    assert ring.failures == 0


def test_a_file_that_cannot_be_used_at_the_start_is_an_error(path: Path) -> None:
    with pytest.raises(KeyFileError, match="No such file"):
        Ring(path)
    path.write_text("{}x")
    with pytest.raises(KeyFileError):
        Ring(path)


def test_the_file_is_not_read_again_while_it_stays_the_same(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = write_key_file(path, a=("infer",))["a"]
    ring = Ring(path)

    def never(_path: Path) -> None:
        raise AssertionError("read again")

    monkeypatch.setattr("server.auth.ring.read_keys", never)
    assert all(ring.knows(key) for _ in range(3))
    os.utime(path, ns=(1, 1))
    with pytest.raises(AssertionError, match="read again"):
        ring.knows(key)


def test_expiry_and_rates_are_those_of_the_key(path: Path) -> None:
    ends = CREATED + timedelta(days=1)
    key, entry = make_entry("a", ("infer",), expires=ends, rate_limit="1/minute")
    _, free = make_entry("b", ("infer",))
    write_keys(path, (entry, free))
    ring = Ring(path)
    found = ring.keys.find(key)
    assert found is not None
    assert not ring.keys.has_expired(found)
    taken = [ring.keys.take(found) for _ in range(2)]
    assert [one.allowed for one in taken if one] == [True, False]
    assert ring.keys.take(free) is None
    ring.today = datetime(2027, 1, 1, tzinfo=UTC)
    assert ring.keys.has_expired(found)


def test_a_revoked_key_goes_though_the_file_keeps_size_inode_and_mtime(path: Path) -> None:
    first = write_key_file(path, a=("infer",))
    ring, was = Ring(path), path.stat()
    other = path.with_name("other.json")
    second = write_key_file(other, a=("infer",))
    path.write_bytes(other.read_bytes())  # in place, as `cp` does
    os.utime(path, ns=(was.st_atime_ns, was.st_mtime_ns))
    now = path.stat()
    assert (now.st_mtime_ns, now.st_ino, now.st_size) == (was.st_mtime_ns, was.st_ino, was.st_size)
    assert not ring.knows(first["a"])
    assert ring.knows(second["a"])
