"""dalorra sign and dalorra verify, as a person at a terminal or a script uses them."""

import json
import shutil
import stat
import subprocess
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from dalorra_core.artifact.keys import TrustedKeys
from dalorra_core.artifact.store import SIGNATURE_FILE, pack_tensors, save_artifact
from dalorra_core.cli import app
from tests.support.tiny_manifest import tiny_manifest, tiny_params


def call(*arguments: object, typed: str | None = None) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments], input=typed)


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    save_artifact(tmp_path / "demo", tiny_manifest(), pack_tensors(tiny_params()))
    return tmp_path / "demo"


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    """Make a key pair by the command and return its prefix."""
    prefix = tmp_path / "keys" / "release"
    assert call("sign", "--new-key", prefix).exit_code == 0
    return prefix


def public(prefix: Path) -> Path:
    return prefix.with_name(f"{prefix.name}.pub.pem")


def private(prefix: Path) -> Path:
    return prefix.with_name(f"{prefix.name}.pem")


@pytest.mark.parametrize("command", ["sign", "verify"])
def test_both_commands_explain_themselves(command: str) -> None:
    result = call(command, "--help")
    assert result.exit_code == 0
    assert "Example" in result.output
    assert "Exit status" in result.output


def test_a_new_private_key_is_for_its_owner_only(keys: Path) -> None:
    assert stat.S_IMODE(private(keys).stat().st_mode) == 0o600
    assert stat.S_IMODE(private(keys).parent.stat().st_mode) == 0o700
    assert b"PRIVATE KEY" in private(keys).read_bytes()
    assert len(TrustedKeys.read(public(keys)).key_ids) == 1


def test_a_key_is_never_written_over(keys: Path) -> None:
    before = private(keys).read_bytes()
    result = call("sign", "--new-key", keys)
    assert result.exit_code == 1
    assert "a key is never written over" in result.output
    assert private(keys).read_bytes() == before


def test_an_adapter_is_signed_and_verified(adapter: Path, keys: Path) -> None:
    (key_id,) = TrustedKeys.read(public(keys)).key_ids
    signed = call("sign", adapter, "--key", private(keys))
    assert signed.exit_code == 0, signed.output
    assert key_id in signed.output
    verified = call("verify", adapter, "--trusted-keys", public(keys))
    assert verified.exit_code == 0, verified.output
    assert f"sound, signed by trusted key {key_id}" in verified.output


def test_an_unsigned_adapter_is_sound_but_not_trusted(adapter: Path, keys: Path) -> None:
    plain = call("verify", adapter)
    assert plain.exit_code == 0
    assert "none: anyone may have made this adapter" in plain.output
    refused = call("verify", adapter, "--trusted-keys", public(keys))
    assert refused.exit_code == 1
    assert "ArtifactUntrustedError" in refused.output
    assert "is not signed" in refused.output


def test_without_keys_a_signature_is_shown_and_not_believed(adapter: Path, keys: Path) -> None:
    call("sign", adapter, "--key", private(keys))
    result = call("verify", adapter)
    assert result.exit_code == 0
    assert "no trusted keys were given" in result.output


def test_the_json_form_says_it_all(adapter: Path, keys: Path) -> None:
    call("sign", adapter, "--key", private(keys))
    (adapter / "notes.txt").write_text("words", "utf-8")
    values: dict[str, Any] = json.loads(call("verify", adapter, "--json").stdout)
    assert values["sound"] is True
    assert values["signed_by"] is None
    assert values["not_listed"] == ["notes.txt"]
    assert [one["state"] for one in values["signatures"]] == ["unverified"]
    values = json.loads(call("verify", adapter, "--json", "--trusted-keys", public(keys)).stdout)
    assert [values["signed_by"]] == [one["key_id"] for one in values["signatures"]]


@pytest.mark.parametrize("name", ["adapter.safetensors", "manifest.json", SIGNATURE_FILE])
def test_a_changed_byte_in_any_file_is_found(adapter: Path, keys: Path, name: str) -> None:
    call("sign", adapter, "--key", private(keys))
    content = bytearray((adapter / name).read_bytes())
    content[len(content) // 2] ^= 1
    (adapter / name).write_bytes(content)
    result = call("verify", adapter, "--trusted-keys", public(keys), "--json")
    assert result.exit_code == 1
    values = json.loads(result.stdout)
    assert values["sound"] is False
    untrusted = name == SIGNATURE_FILE
    assert values["error"].startswith("ArtifactUntrusted" if untrusted else "ArtifactCorrupt")


def test_a_passphrase_protects_a_key_and_is_asked_for(adapter: Path, tmp_path: Path) -> None:
    (tmp_path / "phrase").write_text("correct horse\n", "utf-8")
    prefix = tmp_path / "locked"
    made = call("sign", "--new-key", prefix, "--passphrase-file", tmp_path / "phrase")
    assert made.exit_code == 0
    assert b"ENCRYPTED" in private(prefix).read_bytes()
    wrong = call("sign", adapter, "--key", private(prefix), typed="battery staple\n")
    assert wrong.exit_code == 1
    assert "its passphrase is another one" in wrong.output
    right = call("sign", adapter, "--key", private(prefix), typed="correct horse\n")
    assert right.exit_code == 0, right.output
    assert "correct horse" not in right.output
    (adapter / SIGNATURE_FILE).unlink()
    options = ("--key", private(prefix), "--passphrase-file", tmp_path / "phrase")
    assert call("sign", adapter, *options).exit_code == 0
    assert call("verify", adapter, "--trusted-keys", public(prefix)).exit_code == 0


def test_a_key_that_others_may_read_is_remarked_on(adapter: Path, keys: Path) -> None:
    private(keys).chmod(0o644)
    result = call("sign", adapter, "--key", private(keys))
    assert result.exit_code == 0
    assert "may be read by others" in result.output


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("demo",),
        ("--key", "k"),
        ("demo", "--key", "k", "--new-key", "n"),
        ("demo", "--new-key", "n"),
    ],
)
def test_half_a_command_is_wrong_usage(arguments: tuple[str, ...]) -> None:
    result = call("sign", *arguments)
    assert result.exit_code == 2
    assert "give ADAPTER and --key KEY.pem, or --new-key PREFIX" in result.output


@pytest.mark.parametrize("missing", ["key", "passphrase_file"])
def test_a_missing_file_is_named(adapter: Path, keys: Path, missing: str) -> None:
    files = {"key": private(keys), "passphrase_file": private(keys)}
    files[missing] = adapter / "none"
    options = ("--key", files["key"], "--passphrase-file", files["passphrase_file"])
    result = call("sign", adapter, *options)
    assert result.exit_code == 1
    assert f"{missing}: " in result.output
    assert "cannot be read" in result.output


@pytest.mark.skipif(shutil.which("openssl") is None, reason="no openssl here")
def test_a_pair_made_by_openssl_as_the_documentation_says_does_as_well(
    adapter: Path, tmp_path: Path
) -> None:
    pages = (Path(__file__).parents[2] / "docs").glob("*.md")
    text = "".join(page.read_text("utf-8") for page in pages)
    for command in (
        "openssl genpkey -algorithm ed25519 -out key.pem",
        "openssl pkey -in key.pem -pubout -out key.pub.pem",
    ):
        assert command in text
        subprocess.run(command.split(), cwd=tmp_path, check=True, timeout=60)
    assert call("sign", adapter, "--key", tmp_path / "key.pem").exit_code == 0
    assert call("verify", adapter, "--trusted-keys", tmp_path / "key.pub.pem").exit_code == 0
