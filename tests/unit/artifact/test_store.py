"""dalorra_core.artifact: what is written comes back; what was touched is refused."""

import hashlib
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load, load_file, save

from dalorra_core.artifact import placing
from dalorra_core.artifact.manifest import manifest_digest
from dalorra_core.artifact.reading import read_manifest
from dalorra_core.artifact.store import (
    ADAPTER_FILE,
    MANIFEST_FILE,
    as_stored,
    load_artifact,
    pack_tensors,
    save_artifact,
)
from dalorra_core.errors import (
    ArtifactCorruptError,
    ArtifactError,
    ArtifactMissingFileError,
    ArtifactUnsafeError,
    ArtifactVersionError,
)
from tests.support.tiny_manifest import tiny_manifest, tiny_params


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    save_artifact(tmp_path / "demo", tiny_manifest(), pack_tensors(tiny_params()))
    return tmp_path / "demo"


def sha256_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def reseal(directory: Path, **changes: Any) -> None:
    """Change the manifest as a careful forger would: with a digest that fits."""
    path = directory / MANIFEST_FILE
    values = {**json.loads(path.read_text("utf-8")), **changes}
    del values["manifest_sha256"]
    values["manifest_sha256"] = manifest_digest(values)  # the last entry, as it is written
    path.write_text(json.dumps(values, indent=1, ensure_ascii=False) + "\n", "utf-8")


def test_what_is_saved_comes_back(artifact: Path) -> None:
    loaded, params = load_artifact(artifact), tiny_params()
    saved = tiny_manifest(files={ADAPTER_FILE: sha256_of(artifact / ADAPTER_FILE)})
    assert loaded.manifest == saved
    assert loaded.sha256 == sha256_of(artifact / ADAPTER_FILE)
    assert loaded.revision == loaded.sha256[:12]
    assert sorted(loaded.tensors) == sorted(params)
    for name, value in loaded.tensors.items():
        assert value.dtype == torch.float32
        exact = params[name] if name == "phi" else params[name].bfloat16().float()
        assert torch.equal(value, exact)


def test_factors_are_stored_in_bfloat16_and_gate_logits_in_float32(artifact: Path) -> None:
    stored = load_file(artifact / ADAPTER_FILE)
    assert stored.pop("phi").dtype == torch.float32
    assert {value.dtype for value in stored.values()} == {torch.bfloat16}


def test_exact_factors_are_kept_in_float32_where_bfloat16_would_change_them() -> None:
    params = tiny_params()
    name, other = [name for name in params if name.endswith("lora_B")][:2]
    params[name] = params[name].bfloat16().float()
    params[other] = params[other] + 1e-5
    stored = load(pack_tensors(params, exact=True))
    assert (stored[name].dtype, stored[other].dtype) == (torch.bfloat16, torch.float32)
    for kept in (stored, as_stored(params, exact=True)):
        for key, value in params.items():
            assert torch.equal(kept[key].float(), value)
    assert not torch.equal(as_stored(params)[other], params[other])


def test_saving_again_changes_no_byte(artifact: Path, tmp_path: Path) -> None:
    loaded = load_artifact(artifact)
    save_artifact(tmp_path / "again", loaded.manifest, pack_tensors(loaded.tensors))
    for name in (ADAPTER_FILE, MANIFEST_FILE):
        assert (tmp_path / "again" / name).read_bytes() == (artifact / name).read_bytes()


@pytest.mark.parametrize("name", [ADAPTER_FILE, MANIFEST_FILE])
@pytest.mark.parametrize("flip", [0x01, 0x20, 0x80, 0xFF])
def test_one_flipped_byte_anywhere_is_refused(artifact: Path, name: str, flip: int) -> None:
    path = artifact / name
    content = path.read_bytes()
    for position in range(flip % 7, len(content), 7):
        changed = bytearray(content)
        changed[position] ^= flip
        path.write_bytes(changed)
        with pytest.raises((ArtifactCorruptError, ArtifactVersionError)) as caught:
            load_artifact(artifact)
        assert str(artifact) in str(caught.value)
    path.write_bytes(content)
    load_artifact(artifact)


@pytest.mark.parametrize(
    ("before", "after"),
    [(b'"r": 3', b'"r":\t3'), (b"1e-06", b"1E-06"), (b"\n}", b"\n\n}"), (b"0.75", b"0.750")],
)
def test_a_change_that_json_does_not_see_is_refused_too(
    artifact: Path, before: bytes, after: bytes
) -> None:
    path = artifact / MANIFEST_FILE
    content = path.read_bytes()
    assert before in content
    path.write_bytes(content.replace(before, after, 1))
    with pytest.raises(ArtifactCorruptError, match="was changed"):
        load_artifact(artifact)


@pytest.mark.parametrize("name", [ADAPTER_FILE, MANIFEST_FILE])
def test_a_truncated_file_is_refused(artifact: Path, name: str) -> None:
    path = artifact / name
    content = path.read_bytes()
    for size in (0, 1, 7, 8, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:size])
        with pytest.raises(ArtifactCorruptError, match=name):
            load_artifact(artifact)


def test_a_changed_tensor_file_is_refused_with_both_hashes(artifact: Path) -> None:
    expected = sha256_of(artifact / ADAPTER_FILE)
    (artifact / ADAPTER_FILE).write_bytes(pack_tensors({"phi": torch.zeros(2, 3)}))
    found = sha256_of(artifact / ADAPTER_FILE)
    with pytest.raises(ArtifactCorruptError, match=f"{found}, the manifest says {expected}"):
        load_artifact(artifact)


def test_a_changed_manifest_is_refused_with_both_hashes(artifact: Path) -> None:
    path = artifact / MANIFEST_FILE
    values = json.loads(path.read_text("utf-8"))
    expected = values["manifest_sha256"]
    values["policies"][0]["accept"]["threshold"] = 0.1
    path.write_text(json.dumps(values, indent=1, ensure_ascii=False) + "\n", "utf-8")
    with pytest.raises(ArtifactCorruptError) as caught:
        load_artifact(artifact)
    assert expected in str(caught.value)
    assert manifest_digest(values) in str(caught.value)


@pytest.mark.parametrize("version", [3, 0, "2", None, True, [1]])
def test_another_format_version_is_refused_with_both(artifact: Path, version: object) -> None:
    reseal(artifact, format_version=version)
    with pytest.raises(ArtifactVersionError) as caught:
        load_artifact(artifact)
    assert f"format version {version}, this program reads versions 1 to 2" in str(caught.value)


@pytest.mark.parametrize("name", [ADAPTER_FILE, MANIFEST_FILE])
def test_a_missing_file_is_named(artifact: Path, name: str) -> None:
    (artifact / name).unlink()
    with pytest.raises(ArtifactMissingFileError, match=f"demo has no {name}"):
        load_artifact(artifact)


def test_a_directory_in_the_place_of_a_file_is_named(artifact: Path) -> None:
    (artifact / ADAPTER_FILE).unlink()
    (artifact / ADAPTER_FILE).mkdir()
    with pytest.raises(ArtifactMissingFileError, match=f"{ADAPTER_FILE} cannot be read"):
        load_artifact(artifact)


def test_a_missing_directory_is_named(tmp_path: Path) -> None:
    with pytest.raises(ArtifactMissingFileError, match="none does not exist"):
        load_artifact(tmp_path / "none")


@pytest.mark.parametrize("suffix", [".bin", ".pt", ".pth", ".pkl", ".PICKLE", ".ckpt", ".npy"])
def test_a_pickle_beside_the_tensors_is_refused_and_never_opened(
    artifact: Path, suffix: str
) -> None:
    trap = artifact / f"extra{suffix}"
    trap.write_bytes(pickle.dumps(_Explodes()))
    with pytest.raises(ArtifactUnsafeError, match=f"holds {trap.name}.*never read"):
        load_artifact(artifact)


class _Explodes:
    def __reduce__(self) -> tuple[Callable[..., None], tuple[()]]:
        return _explode, ()


def _explode() -> None:
    pytest.fail("a pickle was opened")


def test_a_pickle_under_the_name_of_the_tensors_is_not_opened(artifact: Path) -> None:
    content = pickle.dumps(_Explodes())
    (artifact / ADAPTER_FILE).write_bytes(content)
    reseal(artifact, files={ADAPTER_FILE: hashlib.sha256(content).hexdigest()})
    with pytest.raises(ArtifactCorruptError, match=f"{ADAPTER_FILE} cannot be read"):
        load_artifact(artifact)


@pytest.mark.parametrize(
    "content", [b"[]", b"3", b'{"a": 1}', b"\x00\x01", b"{'a'}", b"\xff", b"[" * 10**5]
)
def test_a_file_that_is_no_manifest_is_refused(artifact: Path, content: bytes) -> None:
    (artifact / MANIFEST_FILE).write_bytes(content)
    with pytest.raises(ArtifactCorruptError, match=r"is not (valid JSON|a manifest)"):
        load_artifact(artifact)


def test_half_a_character_in_a_manifest_is_refused(artifact: Path) -> None:
    """JSON can write it, UTF-8 cannot: no digest can be made of it."""
    path = artifact / MANIFEST_FILE
    path.write_bytes(path.read_bytes().replace(b'"name": "demo"', b'"name": "\\ud800"'))
    with pytest.raises(ArtifactCorruptError, match="cannot be what was written"):
        load_artifact(artifact)


def test_a_manifest_can_be_read_without_the_other_files(artifact: Path) -> None:
    manifest = load_artifact(artifact).manifest
    (artifact / ADAPTER_FILE).unlink()
    assert read_manifest(artifact) == manifest


@pytest.mark.parametrize(
    "changes", [{"r": "many"}, {"surprise": 1}, {"method": {"name": "unknown"}}, {"labels": None}]
)
def test_a_sealed_manifest_with_wrong_fields_is_refused(
    artifact: Path, changes: dict[str, Any]
) -> None:
    reseal(artifact, **changes)
    with pytest.raises(
        ArtifactCorruptError, match=f"not a valid manifest.*\n{next(iter(changes))}"
    ):
        load_artifact(artifact)


def test_tensors_that_the_manifest_does_not_list_are_refused(artifact: Path) -> None:
    reseal(artifact, files={})
    with pytest.raises(ArtifactCorruptError, match=f"needs {ADAPTER_FILE} and does not list it"):
        load_artifact(artifact)


def test_an_existing_artifact_is_replaced_only_on_request(artifact: Path) -> None:
    before = (artifact / MANIFEST_FILE).read_bytes()
    other = pack_tensors({**tiny_params(), "phi": torch.zeros(2, 3)})
    with pytest.raises(ArtifactError, match="already exists; pass --overwrite"):
        save_artifact(artifact, tiny_manifest(), other)
    assert (artifact / MANIFEST_FILE).read_bytes() == before
    save_artifact(artifact, tiny_manifest(), other, overwrite=True)
    assert torch.equal(load_artifact(artifact).tensors["phi"], torch.zeros(2, 3))
    assert [p.name for p in artifact.parent.iterdir()] == ["demo"]  # nothing is left behind


def test_a_directory_that_is_no_artifact_is_never_replaced(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (home / "thesis.txt").write_text("years of work", "utf-8")
    with pytest.raises(ArtifactError, match="is not an adapter directory"):
        save_artifact(home, tiny_manifest(), b"", overwrite=True)
    assert (home / "thesis.txt").read_text("utf-8") == "years of work"
    empty = tmp_path / "empty"
    empty.mkdir()
    save_artifact(empty, tiny_manifest(), pack_tensors(tiny_params()), overwrite=True)
    load_artifact(empty)


@pytest.mark.parametrize("crash", ["first file", "second file", "exchange", "rename"])
def test_a_crash_while_writing_leaves_the_old_artifact(
    artifact: Path, monkeypatch: pytest.MonkeyPatch, crash: str
) -> None:
    old = load_artifact(artifact)
    synced = 0
    sync, rename = os.fsync, Path.rename

    def failing_sync(fd: int) -> None:
        nonlocal synced
        synced += 1
        if (synced, crash) in ((1, "first file"), (2, "second file")):
            raise OSError(28, "No space left on device")
        sync(fd)

    def failing_rename(self: Path, target: Path) -> Path:
        if ".writing-" in self.name:
            raise OSError(28, "No space left on device")
        return rename(self, target)

    def failing_exchange(one: Path, other: Path) -> bool:
        raise OSError(28, "No space left on device", str(other), None, str(one))

    monkeypatch.setattr(os, "fsync", failing_sync)
    if crash == "exchange":
        monkeypatch.setattr(placing, "_exchanged", failing_exchange)
    if crash == "rename":
        monkeypatch.setattr(placing, "_exchanged", lambda _one, _other: False)
        monkeypatch.setattr(Path, "rename", failing_rename)
    other = pack_tensors({**tiny_params(), "phi": torch.zeros(2, 3)})
    with pytest.raises(OSError, match="No space left"):
        save_artifact(artifact, tiny_manifest(name="new"), other, overwrite=True)
    monkeypatch.undo()
    assert load_artifact(artifact).sha256 == old.sha256
    assert load_artifact(artifact).manifest.name == "demo"
    assert [p.name for p in artifact.parent.iterdir()] == ["demo"]
    save_artifact(artifact, tiny_manifest(name="new"), other, overwrite=True)
    assert load_artifact(artifact).manifest.name == "new"
    assert [p.name for p in artifact.parent.iterdir()] == ["demo"]


def test_safetensors_bytes_do_not_depend_on_the_order_of_the_tensors() -> None:
    params = tiny_params()
    backwards = {name: params[name] for name in reversed(params)}
    assert pack_tensors(params) == pack_tensors(backwards)
    assert pack_tensors(params) != save(params)


def test_a_failing_first_write_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing_replace(self: Path, target: Path) -> Path:
        raise OSError(28, f"No space left for {self} at {target}")

    monkeypatch.setattr(Path, "replace", failing_replace)
    with pytest.raises(OSError, match="No space left"):
        save_artifact(tmp_path / "demo", tiny_manifest(), pack_tensors(tiny_params()))
    assert list(tmp_path.iterdir()) == []
