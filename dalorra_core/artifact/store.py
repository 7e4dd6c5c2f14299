"""Write and read artifact directories. Nothing that could execute is ever opened."""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as dump_tensors
from torch import Tensor

from dalorra_core.artifact.manifest import Manifest, manifest_digest
from dalorra_core.artifact.migrations import check_version, migrated
from dalorra_core.errors import (
    ArtifactCorruptError,
    ArtifactError,
    ArtifactMissingFileError,
    ArtifactUnsafeError,
)

__all__ = [
    "ADAPTER_FILE",
    "MANIFEST_FILE",
    "Artifact",
    "calibration_file_name",
    "load_artifact",
    "pack_tensors",
    "save_artifact",
    "update_artifact",
]

MANIFEST_FILE = "manifest.json"
ADAPTER_FILE = "adapter.safetensors"

_CALIBRATION_FILES = "calibration-*.safetensors"
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")

_UNSAFE_SUFFIXES = {".bin", ".ckpt", ".joblib", ".npy", ".npz", ".pickle", ".pkl", ".pt", ".pth"}


@dataclass(frozen=True)
class Artifact:
    """One adapter, verified.

    Attributes:
        manifest: Everything but the tensors.
        tensors: Parameters in float32, under the names of ``AdapterState.params``.
        sha256: Of adapter.safetensors; keys the mask streams and names the revision.
        directory: Where it was read from.
        calibration_scores: What was measured on each calibration row; None before calibration.
    """

    manifest: Manifest
    tensors: Mapping[str, Tensor]
    sha256: str
    directory: Path
    calibration_scores: Mapping[str, Tensor] | None = None

    @property
    def revision(self) -> str:
        """First 12 hex digits of the tensors' sha256."""
        return self.sha256[:12]


def pack_tensors(params: Mapping[str, Tensor]) -> bytes:
    """Return parameters as safetensors bytes: factors in bfloat16, everything else in float32.

    The factors are most of the size and tolerate rounding; gate logits are a few hundred numbers
    whose rounding would move keep probabilities.
    """
    is_factor = {name: name.endswith((".lora_A", ".lora_B")) for name in params}
    return dump_tensors(
        {
            name: value.detach()
            .cpu()
            .to(torch.bfloat16 if is_factor[name] else torch.float32)
            .contiguous()
            for name, value in sorted(params.items())
        }
    )


def calibration_file_name(content: bytes) -> str:
    """Return the name of a file of calibration scores; it says what is in it."""
    return f"calibration-{hashlib.sha256(content).hexdigest()[:8]}.safetensors"


def save_artifact(
    directory: Path, manifest: Manifest, adapter: bytes, *, overwrite: bool = False
) -> None:
    """Write an artifact beside ``directory`` and move it into place in one step.

    Args:
        directory: Target; must not exist unless ``overwrite``.
        manifest: Not calibrated; its ``files`` entry is replaced by the hash of ``adapter``.
        adapter: Bytes from ``pack_tensors`` (or of an artifact already stored).
        overwrite: Replace an existing artifact.

    Raises:
        ArtifactError: If the target exists and may not be replaced, or is no artifact, or the
            manifest is calibrated (other tensors need another calibration).
    """
    if manifest.calibration is not None:
        raise ArtifactError(
            f"{manifest.name} is calibrated; write it without its calibration, then calibrate it"
        )
    if directory.exists():
        if not overwrite:
            raise ArtifactError(f"{directory} already exists; pass --overwrite to replace it")
        if any(directory.iterdir()) and not (directory / MANIFEST_FILE).is_file():
            raise ArtifactError(f"{directory} is not an adapter directory; it will not be replaced")
    directory.parent.mkdir(parents=True, exist_ok=True)
    scratch = directory.with_name(f".{directory.name}.writing-{os.getpid()}")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    try:
        _write(scratch / ADAPTER_FILE, adapter)
        files = {ADAPTER_FILE: hashlib.sha256(adapter).hexdigest()}
        _write(scratch / MANIFEST_FILE, _sealed(manifest, files))
        _move_into_place(scratch, directory)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def update_artifact(directory: Path, manifest: Manifest, calibration: bytes | None = None) -> None:
    """Replace an artifact's manifest and calibration scores, never its tensors.

    The scores are written first, under a name made of their content; then the manifest that speaks
    of them takes the old one's place; then older scores go. Whenever this ends, be it by a power
    cut, the directory is a whole artifact: the old one or the new one.

    Args:
        directory: An artifact.
        manifest: Its new manifest; ``files`` is filled in here, and what it already says of the
            tensors must be true.
        calibration: Scores that ``manifest.calibration`` speaks of; None keeps those in place.

    Raises:
        ArtifactError: If the directory is no sound artifact, or the manifest speaks of other
            tensors, or of scores that are neither given nor there.
    """
    current = load_artifact(directory)
    if manifest.files.get(ADAPTER_FILE, current.sha256) != current.sha256:
        raise ArtifactError(f"{directory} was replaced meanwhile: its tensors are other ones now")
    files = {ADAPTER_FILE: current.sha256}
    if manifest.calibration is not None:
        name = manifest.calibration.scores_file
        if calibration is None:
            there = current.manifest.files
        else:
            there = {calibration_file_name(calibration): hashlib.sha256(calibration).hexdigest()}
        if name not in there:
            raise ArtifactError(f"the manifest speaks of {name}, got {', '.join(there)}")
        files[name] = there[name]
        if calibration is not None and current.manifest.files.get(name) != files[name]:
            _replace(directory / name, calibration)
    _replace(directory / MANIFEST_FILE, _sealed(manifest, files))
    for file in (*directory.glob(_CALIBRATION_FILES), *directory.glob(".*.writing")):
        if file.name not in files:
            file.unlink()


def _sealed(manifest: Manifest, files: dict[str, str]) -> bytes:
    values = manifest.model_copy(update={"files": files}).model_dump(mode="json")
    values["manifest_sha256"] = manifest_digest(values)
    return _manifest_bytes(values)


def _write(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _replace(path: Path, content: bytes) -> None:
    """Put a file in place whole or not at all, even if the power fails."""
    scratch = path.with_name(f".{path.name}.writing")
    _write(scratch, content)
    scratch.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _move_into_place(scratch: Path, directory: Path) -> None:
    """Rename ``scratch`` to ``directory``; what was there comes back when that fails."""
    old = directory.with_name(f".{directory.name}.old-{os.getpid()}")
    if directory.exists():
        directory.replace(old)
    try:
        scratch.replace(directory)
    except OSError:
        if old.exists():
            old.replace(directory)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _manifest_bytes(values: Mapping[str, Any]) -> bytes:
    """Return the one way a manifest is written; any other byte is a change."""
    return (json.dumps(values, indent=1, ensure_ascii=False) + "\n").encode()


def load_artifact(directory: Path) -> Artifact:
    """Read an artifact and check every byte of it.

    Raises:
        ArtifactMissingFileError: The directory, the manifest or a listed file is not there.
        ArtifactUnsafeError: A file type that can execute code lies in the directory.
        ArtifactVersionError: A format version this program does not read.
        ArtifactCorruptError: A hash differs, or a file cannot be parsed.
    """
    if not directory.is_dir():
        raise ArtifactMissingFileError(f"adapter directory {directory} does not exist")
    for file in sorted(directory.iterdir()):
        if file.suffix.lower() in _UNSAFE_SUFFIXES:
            raise ArtifactUnsafeError(
                f"{directory} holds {file.name}: pickle-based formats can execute code and are "
                "never read. An artifact consists of JSON and safetensors only"
            )
    manifest = _read_manifest(directory)
    contents = _read_files(directory, manifest.files)
    tensors = {n: v.float() for n, v in _parsed(directory, ADAPTER_FILE, contents).items()}
    scores = None
    if manifest.calibration is not None:
        scores = _parsed(directory, manifest.calibration.scores_file, contents)
    return Artifact(manifest, tensors, manifest.files[ADAPTER_FILE], directory, scores)


def _read_files(directory: Path, files: Mapping[str, str]) -> dict[str, bytes]:
    """Return the content of every listed file; each must have the sha256 that is listed."""
    contents = {}
    for name, expected in files.items():
        if not _PLAIN_NAME.fullmatch(name):
            raise ArtifactCorruptError(
                f"{directory / MANIFEST_FILE} lists {name!r}, which is no plain file name"
            )
        contents[name] = _read(directory, name)
        found = hashlib.sha256(contents[name]).hexdigest()
        if found != expected:
            raise ArtifactCorruptError(
                f"{directory / name} has sha256 {found}, the manifest says {expected}"
            )
    return contents


def _parsed(directory: Path, name: str, contents: Mapping[str, bytes]) -> dict[str, Tensor]:
    if name not in contents:
        raise ArtifactCorruptError(
            f"{directory / MANIFEST_FILE} needs {name} and does not list it under files"
        )
    try:
        return load_tensors(contents[name])
    except SafetensorError as error:
        raise ArtifactCorruptError(f"{directory / name} cannot be read: {error}") from error


def _read(directory: Path, name: str) -> bytes:
    try:
        return (directory / name).read_bytes()
    except FileNotFoundError:
        raise ArtifactMissingFileError(f"{directory} has no {name}") from None
    except OSError as error:
        raise ArtifactMissingFileError(f"{directory / name} cannot be read: {error}") from error


def _read_manifest(directory: Path) -> Manifest:
    path = directory / MANIFEST_FILE
    content = _read(directory, MANIFEST_FILE)
    try:
        values: Any = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ArtifactCorruptError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(values, dict) or "format_version" not in values:
        raise ArtifactCorruptError(f"{path} is not a manifest: it has no format_version")
    check_version(values["format_version"], path)
    digest = values.pop("manifest_sha256", None)
    found = manifest_digest(values)
    if digest != found:
        raise ArtifactCorruptError(
            f"{path} was changed: its content has sha256 {found}, it says {digest}"
        )
    if content != _manifest_bytes({**values, "manifest_sha256": digest}):
        raise ArtifactCorruptError(
            f"{path} was changed: it says the same, but not byte for byte as it was written"
        )
    try:
        return Manifest.model_validate(migrated(values))
    except ValidationError as error:
        raise ArtifactCorruptError(f"{path} is not a valid manifest: {error}") from error
