import re
import threading
from pathlib import Path

import pytest
from typer.testing import CliRunner

from server.auth.keys import digest_of, locked, read_keys
from server.cli import app

RUN = CliRunner()
WAIT_S = 20.0


def keys(*arguments: str) -> tuple[int, str, str]:
    result = RUN.invoke(app, ["keys", *arguments], env={"COLUMNS": "200", "TERM": "dumb"})
    return result.exit_code, result.stdout, result.stderr


@pytest.fixture
def file(tmp_path: Path) -> str:
    return str(tmp_path / "keys.json")


def test_create_prints_the_key_alone_and_stores_its_hash(file: str) -> None:
    code, out, err = keys("create", "shop", "--file", file, "--scope", "infer", "--scope", "admin")
    assert code == 0
    assert re.fullmatch(r"dk_[A-Za-z0-9_-]{43}\n", out)
    assert "infer, admin" in err
    assert out.strip() not in err
    (key,) = read_keys(Path(file))
    assert (key.id, key.scopes, key.rate_limit, key.expires) == (
        "shop",
        ("infer", "admin"),
        None,
        None,
    )
    assert key.sha256 == digest_of(out.strip())


def test_limits_and_expiry_are_stored_and_listed(file: str) -> None:
    arguments = ("--scope", "infer", "--rate-limit", "5/second", "--expires-in-days", "30")
    assert keys("create", "ci", "--file", file, *arguments)[0] == 0
    assert (
        keys("create", "old", "--file", file, "--scope", "infer", "--expires-in-days", "0")[0] == 0
    )
    ci, _ = read_keys(Path(file))
    assert ci.expires is not None
    assert (ci.expires - ci.created).days == 30
    code, out, _ = keys("list", "--file", file)
    assert code == 0
    header, first, second = out.splitlines()
    assert header.split() == ["ID", "SCOPES", "RATE", "LIMIT", "CREATED", "EXPIRES"]
    assert first.split()[:3] == ["ci", "infer", "5/second"]
    assert second.endswith("(expired)")
    assert ci.sha256[:8] not in out


def test_revoke_takes_one_key_away(file: str) -> None:
    for name in ("a", "b"):
        keys("create", name, "--file", file, "--scope", "infer")
    assert keys("revoke", "a", "--file", file) == (0, "", "revoked a\n")
    assert [key.id for key in read_keys(Path(file))] == ["b"]
    code, _, err = keys("revoke", "a", "--file", file)
    assert code == 2
    assert "there is no key a; there are: b" in err
    assert "nobody may come in" in keys("revoke", "b", "--file", file)[2]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("a b", "--scope", "infer"), "id: "),
        (("a", "--scope", "root"), "scopes.0: "),
        (("a", "--scope", "infer", "--rate-limit", "often"), "rate_limit: "),
        (("there", "--scope", "infer"), "there is a key there already"),
    ],
)
def test_what_cannot_be_is_said_and_changes_nothing(
    file: str, arguments: tuple[str, ...], says: str
) -> None:
    keys("create", "there", "--file", file, "--scope", "infer")
    before = Path(file).read_bytes()
    code, out, err = keys("create", arguments[0], "--file", file, *arguments[1:])
    assert (code, out) == (2, "")
    assert err.startswith("dalorra keys create: ")
    assert says in err
    assert Path(file).read_bytes() == before


def test_a_broken_or_missing_file_is_never_overwritten(tmp_path: Path) -> None:
    broken = tmp_path / "keys.json"
    broken.write_text("{}x")
    assert keys("create", "a", "--file", str(broken), "--scope", "infer")[0] == 2
    assert broken.read_text() == "{}x"
    for command in (("list",), ("revoke", "a")):
        assert keys(*command, "--file", str(tmp_path / "none"))[0] == 2
    assert keys("create", "a", "--file", str(tmp_path / "no" / "x"), "--scope", "infer")[0] == 2


def test_two_at_a_time_lose_no_key(file: str) -> None:
    done = threading.Event()

    def create() -> None:
        keys("create", "b", "--file", file, "--scope", "infer")
        done.set()

    with locked(Path(file)):
        other = threading.Thread(target=create)
        other.start()
        assert not done.wait(0.2), "it did not wait for its turn"
    other.join(WAIT_S)
    assert [key.id for key in read_keys(Path(file))] == ["b"]


def test_help_says_how_to_rotate() -> None:
    _, out, _ = keys("create", "--help")
    for text in ("needs no restart", "revoke the old one", "--expires-in-days", "$(dalorra keys"):
        assert text in out
