"""dalorra_core.artifact.store.update_artifact: whatever happens, a whole artifact is there."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save

from dalorra_core.artifact.manifest import manifest_digest
from dalorra_core.artifact.store import (
    ADAPTER_FILE,
    MANIFEST_FILE,
    Artifact,
    calibration_file_name,
    load_artifact,
    pack_tensors,
    save_artifact,
    update_artifact,
)
from dalorra_core.errors import ArtifactCorruptError, ArtifactError, ArtifactMissingFileError
from tests.support.tiny_manifest import tiny_calibration, tiny_manifest, tiny_params


def scores_of(value: float) -> bytes:
    return save({"confidence": torch.full((4,), value, dtype=torch.float64)})


def calibrate(directory: Path, value: float, **changes: Any) -> None:
    content = scores_of(value)
    calibration = tiny_calibration(calibration_file_name(content), temperature=value)
    update_artifact(directory, tiny_manifest(calibration=calibration, **changes), content)


def stored_value(artifact: Artifact) -> float:
    assert artifact.calibration_scores is not None
    return float(artifact.calibration_scores["confidence"][0])


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    save_artifact(tmp_path / "demo", tiny_manifest(), pack_tensors(tiny_params()))
    return tmp_path / "demo"


@pytest.fixture
def calibrated(plain: Path) -> Path:
    calibrate(plain, 0.5)
    return plain


def test_scores_come_back_and_the_tensors_stay(plain: Path) -> None:
    before = load_artifact(plain)
    assert before.calibration_scores is None
    calibrate(plain, 0.5)
    after = load_artifact(plain)
    assert stored_value(after) == 0.5
    assert (after.sha256, after.revision) == (before.sha256, before.revision)
    assert all(torch.equal(after.tensors[n], before.tensors[n]) for n in before.tensors)
    name = calibration_file_name(scores_of(0.5))
    assert after.manifest.files == {
        ADAPTER_FILE: before.sha256,
        name: hashlib.sha256(scores_of(0.5)).hexdigest(),
    }
    assert names(plain) == [ADAPTER_FILE, name, MANIFEST_FILE]


def test_a_second_calibration_replaces_the_first(calibrated: Path) -> None:
    calibrate(calibrated, 0.25)
    assert stored_value(load_artifact(calibrated)) == 0.25
    name = calibration_file_name(scores_of(0.25))
    assert names(calibrated) == [ADAPTER_FILE, name, MANIFEST_FILE]


def test_a_new_manifest_may_keep_the_scores(calibrated: Path) -> None:
    manifest = load_artifact(calibrated).manifest
    update_artifact(calibrated, manifest.model_copy(update={"description": "other"}))
    loaded = load_artifact(calibrated)
    assert (stored_value(loaded), loaded.manifest.description) == (0.5, "other")


def test_a_manifest_without_calibration_removes_it(calibrated: Path) -> None:
    update_artifact(calibrated, tiny_manifest())
    assert load_artifact(calibrated).calibration_scores is None
    assert names(calibrated) == [ADAPTER_FILE, MANIFEST_FILE]


def test_a_manifest_that_speaks_of_other_scores_is_refused(calibrated: Path) -> None:
    before = {p.name: p.read_bytes() for p in calibrated.iterdir()}
    other = tiny_manifest(calibration=tiny_calibration("calibration-00000000.safetensors"))
    for content in (None, scores_of(0.25)):
        with pytest.raises(ArtifactError, match=r"speaks of calibration-00000000\.safetensors"):
            update_artifact(calibrated, other, content)
    assert {p.name: p.read_bytes() for p in calibrated.iterdir()} == before


def test_an_adapter_that_was_trained_again_meanwhile_is_left_alone(plain: Path) -> None:
    """Calibrating takes minutes; its numbers are about the tensors that it began with."""
    begun = load_artifact(plain).manifest
    others = {name: value + 1 for name, value in tiny_params().items()}
    save_artifact(plain, tiny_manifest(), pack_tensors(others), overwrite=True)
    before = {p.name: p.read_bytes() for p in plain.iterdir()}
    content = scores_of(0.5)
    calibration = tiny_calibration(calibration_file_name(content))
    with pytest.raises(ArtifactError, match="was replaced meanwhile"):
        update_artifact(plain, begun.model_copy(update={"calibration": calibration}), content)
    assert {p.name: p.read_bytes() for p in plain.iterdir()} == before


def test_a_calibrated_manifest_is_not_given_other_tensors(calibrated: Path) -> None:
    manifest = load_artifact(calibrated).manifest
    with pytest.raises(ArtifactError, match="demo is calibrated"):
        save_artifact(calibrated, manifest, pack_tensors(tiny_params()), overwrite=True)


class Killed(BaseException):
    """What a kill does to a program: nothing after it runs."""


def die_at(step: int, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Let the program die instead of its n-th write, sync, rename or removal; return the steps."""
    done: list[str] = []

    def counting(owner: Any, name: str) -> None:
        real = getattr(owner, name)

        def call(*arguments: Any, **options: Any) -> Any:
            if name == "open" and (len(arguments) < 2 or "w" not in arguments[1]):
                return real(*arguments, **options)
            done.append(name)
            if len(done) == step:
                if name == "open":  # a kill inside a write leaves a part of the file
                    arguments[0].write_bytes(b"half")
                raise Killed(name)
            return real(*arguments, **options)

        monkeypatch.setattr(owner, name, call)

    counting(Path, "open")
    counting(os, "fsync")
    counting(Path, "replace")
    counting(Path, "unlink")
    return done


def test_a_kill_at_any_step_leaves_a_whole_artifact(
    calibrated: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Old or new, never a mixture; and the next calibration clears up what was left."""
    seen: set[float] = set()
    step, steps = 0, []
    while True:
        step += 1
        calibrate(calibrated, 0.5, name="old")
        with monkeypatch.context() as patch:
            steps = die_at(step, patch)
            try:
                calibrate(calibrated, 0.25, name="new")
                break
            except Killed:
                pass
        loaded = load_artifact(calibrated)
        assert (loaded.manifest.name, stored_value(loaded)) in (("old", 0.5), ("new", 0.25))
        seen.add(stored_value(loaded))
    assert steps == ["open", "fsync", "replace", "fsync"] * 2 + ["unlink"]
    assert seen == {0.5, 0.25}
    assert names(calibrated) == [
        ADAPTER_FILE,
        calibration_file_name(scores_of(0.25)),
        MANIFEST_FILE,
    ]


def test_the_same_scores_again_are_not_written_over(
    calibrated: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The manifest in place speaks of that very file: half of it would spoil the artifact."""
    with monkeypatch.context() as patch:
        steps = die_at(99, patch)
        calibrate(calibrated, 0.5, name="again")
    assert steps == ["open", "fsync", "replace", "fsync"]
    assert load_artifact(calibrated).manifest.name == "again"


def test_a_changed_or_missing_score_file_is_refused(calibrated: Path) -> None:
    path = calibrated / calibration_file_name(scores_of(0.5))
    content = path.read_bytes()
    path.write_bytes(content[:-1] + b"\x01")
    with pytest.raises(ArtifactCorruptError, match=f"{path.name} has sha256"):
        load_artifact(calibrated)
    path.unlink()
    with pytest.raises(ArtifactMissingFileError, match=f"has no {path.name}"):
        load_artifact(calibrated)


def reseal(directory: Path, files: dict[str, str]) -> None:
    values = json.loads((directory / MANIFEST_FILE).read_text("utf-8"))
    del values["manifest_sha256"]
    values["files"] = values["files"] | files
    values["manifest_sha256"] = manifest_digest(values)
    text = json.dumps(values, indent=1, ensure_ascii=False) + "\n"
    (directory / MANIFEST_FILE).write_text(text, "utf-8")


def test_every_listed_file_is_checked(plain: Path) -> None:
    (plain / "NOTICE").write_bytes(b"words")
    reseal(plain, {"NOTICE": hashlib.sha256(b"words").hexdigest()})
    load_artifact(plain)
    (plain / "NOTICE").write_bytes(b"other words")
    with pytest.raises(ArtifactCorruptError, match="NOTICE has sha256"):
        load_artifact(plain)


@pytest.mark.parametrize("name", ["../secret", "/etc/hostname", "a/b", "", ".hidden", "..", "a\n"])
def test_a_listed_name_that_leaves_the_directory_is_refused(plain: Path, name: str) -> None:
    reseal(plain, {name: "0"})
    with pytest.raises(ArtifactCorruptError, match="no plain file name"):
        load_artifact(plain)
