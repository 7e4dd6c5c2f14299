"""dalorra_core.artifact.signing: only what a trusted key signed, as it is now, is trusted."""

import base64
import builtins
import hashlib
import json
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519

from dalorra_core.artifact.keys import make_key_pair, read_private_key, signed_message
from dalorra_core.artifact.signing import (
    TrustedKeys,
    read_signatures,
    sign_artifact,
    signature_states,
    verify_signature,
)
from dalorra_core.artifact.store import (
    SIGNATURE_FILE,
    calibration_file_name,
    load_artifact,
    pack_tensors,
    save_artifact,
    update_artifact,
)
from dalorra_core.errors import ArtifactUntrustedError, ConfigError
from tests.support.tiny_manifest import tiny_calibration, tiny_manifest, tiny_params

PRIVATE, PUBLIC = make_key_pair()
OTHER_PRIVATE, OTHER_PUBLIC = make_key_pair()
TRUSTED, OTHER = TrustedKeys.parse(PUBLIC), TrustedKeys.parse(OTHER_PUBLIC)
NOW = datetime(2026, 11, 22, 12, 30, tzinfo=UTC)


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    save_artifact(tmp_path / "demo", tiny_manifest(), pack_tensors(tiny_params()))
    return tmp_path / "demo"


@pytest.fixture
def signed(plain: Path) -> Path:
    sign_artifact(plain, PRIVATE, now=NOW)
    return plain


def verify(directory: Path, trusted: TrustedKeys = TRUSTED) -> str:
    return verify_signature(directory, load_artifact(directory).manifest_sha256, trusted)


def change(directory: Path, **changes: Any) -> None:
    """Change entries of the first signature."""
    path = directory / SIGNATURE_FILE
    values = json.loads(path.read_text("utf-8"))
    values["signatures"][0] |= changes
    path.write_text(json.dumps(values), "utf-8")


def test_a_signed_adapter_is_trusted_under_the_id_of_its_key(signed: Path) -> None:
    raw = serialization.load_pem_public_key(PUBLIC)
    assert isinstance(raw, ed25519.Ed25519PublicKey)
    key_id = hashlib.sha256(raw.public_bytes_raw()).hexdigest()[:16]
    assert verify(signed) == key_id
    assert TRUSTED.key_ids == (key_id,)


def test_the_signature_is_plain_ed25519_over_the_documented_message(signed: Path) -> None:
    """What is checked here in five lines can be checked by anybody's tool."""
    (entry,) = json.loads((signed / SIGNATURE_FILE).read_text("utf-8"))["signatures"]
    assert entry["signed_at"] == "2026-11-22T12:30:00Z"
    message = (
        "dalorra adapter signature, version 1\n"
        f"manifest_sha256 {load_artifact(signed).manifest_sha256}\n"
        "signed_at 2026-11-22T12:30:00Z\n"
    ).encode()
    key = serialization.load_pem_public_key(PUBLIC)
    assert isinstance(key, ed25519.Ed25519PublicKey)
    key.verify(base64.b64decode(entry["signature"]), message)


def test_signing_changes_no_other_file(plain: Path) -> None:
    before = {path.name: path.read_bytes() for path in plain.iterdir()}
    sign_artifact(plain, PRIVATE)
    after = {path.name: path.read_bytes() for path in plain.iterdir()}
    after.pop(SIGNATURE_FILE)
    assert after == before


def test_an_unsigned_adapter_is_refused_as_such(plain: Path) -> None:
    with pytest.raises(ArtifactUntrustedError, match="demo is not signed; dalorra sign"):
        verify(plain)
    assert signature_states(plain, load_artifact(plain).manifest_sha256, TRUSTED) == ()


def test_without_trusted_keys_a_signature_is_neither_believed_nor_doubted(signed: Path) -> None:
    (state,) = signature_states(signed, load_artifact(signed).manifest_sha256, None)
    assert state.state == "unverified"
    assert state.text == (
        f"signed by {TRUSTED.key_ids[0]} at 2026-11-22T12:30:00Z: no trusted keys were given"
    )


def test_the_key_of_somebody_else_is_refused(signed: Path) -> None:
    with pytest.raises(ArtifactUntrustedError, match="not among the trusted ones") as caught:
        verify(signed, OTHER)
    for key_id in (*TRUSTED.key_ids, *OTHER.key_ids):
        assert key_id in str(caught.value)


def test_calibrating_again_removes_the_signature(signed: Path) -> None:
    scores = pack_tensors({"confidence": tiny_params()["phi"]})
    record = tiny_calibration(calibration_file_name(scores))
    assert update_artifact(signed, tiny_manifest(calibration=record), scores)
    assert not (signed / SIGNATURE_FILE).exists()
    with pytest.raises(ArtifactUntrustedError, match="is not signed"):
        verify(signed)


def test_an_update_that_changes_nothing_keeps_the_signature(signed: Path) -> None:
    assert not update_artifact(signed, tiny_manifest())
    assert verify(signed) == TRUSTED.key_ids[0]


def test_a_signature_of_other_content_is_called_stale(signed: Path) -> None:
    """As after a crash between the new manifest and the removal of the signature."""
    signature = (signed / SIGNATURE_FILE).read_bytes()
    update_artifact(signed, tiny_manifest(description="another"))
    (signed / SIGNATURE_FILE).write_bytes(signature)
    with pytest.raises(ArtifactUntrustedError, match=r"changed after it was signed.*sign it again"):
        verify(signed)
    (state,) = signature_states(signed, load_artifact(signed).manifest_sha256, None)
    assert state.state == "stale"


def test_replacing_the_adapter_takes_the_signature_with_it(signed: Path) -> None:
    save_artifact(signed, tiny_manifest(), pack_tensors(tiny_params()), overwrite=True)
    assert not (signed / SIGNATURE_FILE).exists()


def test_a_signature_moved_to_another_adapter_is_refused(signed: Path, tmp_path: Path) -> None:
    save_artifact(tmp_path / "evil", tiny_manifest(name="evil"), pack_tensors(tiny_params()))
    (tmp_path / "evil" / SIGNATURE_FILE).write_bytes((signed / SIGNATURE_FILE).read_bytes())
    with pytest.raises(ArtifactUntrustedError, match="other content"):
        verify(tmp_path / "evil")
    # even when it says that it is of this content
    change(tmp_path / "evil", manifest_sha256=load_artifact(tmp_path / "evil").manifest_sha256)
    with pytest.raises(ArtifactUntrustedError, match="not a signature of this key"):
        verify(tmp_path / "evil")


@pytest.mark.parametrize(
    "changes",
    [
        {"signed_at": "2027-11-22T12:30:00Z"},
        {"signature": base64.b64encode(bytes(64)).decode()},
        {"signature": "*" * 88},
    ],
)
def test_a_changed_date_or_signature_is_refused(signed: Path, changes: dict[str, Any]) -> None:
    change(signed, **changes)
    with pytest.raises(ArtifactUntrustedError, match="not a signature of this key"):
        verify(signed)


def test_a_signature_under_the_id_of_a_trusted_key_is_not_believed(plain: Path) -> None:
    sign_artifact(plain, OTHER_PRIVATE)
    change(plain, key_id=TRUSTED.key_ids[0])
    with pytest.raises(ArtifactUntrustedError, match="not a signature of this key"):
        verify(plain)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[]",
        b"{}",
        b"\xff",
        b"[" * 30_000,
        b'{"format_version": 2, "signatures": []}',
        b'{"format_version": 1, "signatures": []}',
        b'{"format_version": 1, "signatures": [{}]}',
        b" " * 70_000,
    ],
)
def test_a_file_that_is_no_signature_is_refused_and_not_taken_for_none(
    signed: Path, content: bytes
) -> None:
    (signed / SIGNATURE_FILE).write_bytes(content)
    with pytest.raises(ArtifactUntrustedError, match=r"signature\.json of adapter demo"):
        verify(signed)


def test_a_signature_that_cannot_be_read_is_not_taken_for_none(plain: Path) -> None:
    (plain / SIGNATURE_FILE).mkdir()
    with pytest.raises(ArtifactUntrustedError, match=r"signature\.json of adapter demo cannot be"):
        verify(plain)


@pytest.mark.parametrize(
    "changes",
    [
        {"algorithm": "none"},
        {"key_id": "A" * 16},
        {"key_id": "a" * 15 + "\n"},
        {"manifest_sha256": "0"},
        {"signed_at": "yesterday"},
        {"extra": 1},
    ],
)
def test_a_signature_in_another_form_is_refused(signed: Path, changes: dict[str, Any]) -> None:
    change(signed, **changes)
    with pytest.raises(ArtifactUntrustedError, match="is not in its form"):
        verify(signed)


def test_several_keys_may_sign_and_each_signs_once(plain: Path) -> None:
    for key in (PRIVATE, OTHER_PRIVATE, PRIVATE):
        sign_artifact(plain, key, now=NOW)
    assert [one.key_id for one in read_signatures(plain)] == [*OTHER.key_ids, *TRUSTED.key_ids]
    assert verify(plain, TRUSTED) == TRUSTED.key_ids[0]
    assert verify(plain, OTHER) == OTHER.key_ids[0]


def test_signing_anew_drops_signatures_of_older_content(signed: Path) -> None:
    signature = (signed / SIGNATURE_FILE).read_bytes()
    update_artifact(signed, tiny_manifest(description="another"))
    (signed / SIGNATURE_FILE).write_bytes(signature)
    sign_artifact(signed, OTHER_PRIVATE)
    assert [one.key_id for one in read_signatures(signed)] == list(OTHER.key_ids)


def test_an_unsound_adapter_is_not_signed(plain: Path) -> None:
    (plain / "adapter.safetensors").write_bytes(b"")
    with pytest.raises(Exception, match="has sha256"):
        sign_artifact(plain, PRIVATE)
    assert not (plain / SIGNATURE_FILE).exists()


def test_errors_name_no_path_of_the_host(signed: Path) -> None:
    for trusted in (OTHER, TRUSTED):
        (signed / SIGNATURE_FILE).unlink(missing_ok=True)
        with pytest.raises(ArtifactUntrustedError) as caught:
            verify(signed, trusted)
        assert str(signed.parent) not in str(caught.value)


# -- keys ------------------------------------------------------------------------------------


def test_a_file_of_several_keys_with_remarks_is_read(tmp_path: Path) -> None:
    path = tmp_path / "keys.pem"
    content = b"# release team\n" + PUBLIC + b"\n\n  # audit\n" + OTHER_PUBLIC
    path.write_bytes(content.replace(b"\n", b"\r\n"))
    assert TrustedKeys.read(path).key_ids == (*TRUSTED.key_ids, *OTHER.key_ids)


EC = ec.generate_private_key(ec.SECP256R1())
EC_PUBLIC = EC.public_key().public_bytes(
    serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
)
EC_PRIVATE = EC.private_bytes(
    serialization.Encoding.PEM,
    serialization.PrivateFormat.PKCS8,
    serialization.NoEncryption(),
)


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (b"", "at least one PEM public key, got none"),
        (b"# nothing\n", "at least one"),
        (PRIVATE, "must be a PUBLIC KEY, got a PRIVATE KEY; a private key belongs"),
        (PUBLIC + PRIVATE, "key 2 of keys.pem must be a PUBLIC KEY"),
        (EC_PUBLIC, "must be an Ed25519 key"),
        (PUBLIC.replace(b"MCow", b"MCox"), "cannot be read as a public key"),
        (PUBLIC.replace(b"-----END", b"----END"), "must hold PEM public keys, empty lines"),
        (PUBLIC + b"remark", "must hold PEM public keys"),
        (b"\x00\xff", "must hold PEM public keys"),
        (b"#" * (1 << 20) + b"#", "at most"),
    ],
)
def test_a_file_of_keys_with_anything_else_in_it_is_refused(
    tmp_path: Path, content: bytes, fault: str
) -> None:
    (tmp_path / "keys.pem").write_bytes(content)
    with pytest.raises(ConfigError, match=fault) as caught:
        TrustedKeys.read(tmp_path / "keys.pem")
    assert str(tmp_path) not in str(caught.value)


def test_a_missing_file_of_keys_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"trusted_keys: none\.pem cannot be read"):
        TrustedKeys.read(tmp_path / "none.pem")


def test_an_encrypted_key_signs_with_its_passphrase_only(plain: Path) -> None:
    private, public = make_key_pair(b"correct horse")
    with pytest.raises(ConfigError, match="protected by a passphrase and none was given"):
        sign_artifact(plain, private)
    with pytest.raises(ConfigError, match="its passphrase is another one"):
        sign_artifact(plain, private, passphrase=b"wrong")
    sign_artifact(plain, private, passphrase=b"correct horse")
    assert verify(plain, TrustedKeys.parse(public))


@pytest.mark.parametrize("pem", [b"", b"key", PUBLIC, EC_PRIVATE])
def test_what_is_no_private_key_of_ours_is_refused(pem: bytes) -> None:
    with pytest.raises(ConfigError, match="must be an Ed25519 key"):
        read_private_key(pem)


def test_a_message_says_what_it_is_of() -> None:
    assert signed_message("ab", "then").startswith(b"dalorra adapter signature, version 1\n")


def test_without_the_extra_the_error_names_it(plain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    importing = builtins.__import__

    def refuse(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("cryptography"):
            raise ImportError(name)
        return importing(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    attempts: list[Callable[[], object]] = [
        lambda: sign_artifact(plain, PRIVATE),
        lambda: TrustedKeys.parse(PUBLIC),
        make_key_pair,
    ]
    for attempt in attempts:
        with pytest.raises(ConfigError, match=r"extra sign.*pip install 'dalorra\[sign\]'"):
            attempt()
