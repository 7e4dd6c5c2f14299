"""Write and read artifact directories. Nothing that could execute is ever opened."""

import hashlib
import json
import os
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

from dalorra_core.artifact.manifest import FORMAT_VERSION, Manifest, manifest_digest
from dalorra_core.errors import (
    ArtifactCorruptError,
    ArtifactError,
    ArtifactMissingFileError,
    ArtifactUnsafeError,
    ArtifactVersionError,
)

__all__ = [
    "ADAPTER_FILE",
    "MANIFEST_FILE",
    "Artifact",
    "load_artifact",
    "pack_tensors",
    "save_artifact",
]

MANIFEST_FILE = "manifest.json"
ADAPTER_FILE = "adapter.safetensors"

_UNSAFE_SUFFIXES = {".bin", ".ckpt", ".joblib", ".npy", ".npz", ".pickle", ".pkl", ".pt", ".pth"}


@dataclass(frozen=True)
class Artifact:
    """One adapter, verified.

    Attributes:
        manifest: Everything but the tensors.
        tensors: Parameters in float32, under the names of ``AdapterState.params``.
        sha256: Of adapter.safetensors; keys the mask streams and names the revision.
        directory: Where it was read from.
    """

    manifest: Manifest
    tensors: Mapping[str, Tensor]
    sha256: str
    directory: Path

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


def save_artifact(
    directory: Path, manifest: Manifest, adapter: bytes, *, overwrite: bool = False
) -> None:
    """Write an artifact beside ``directory`` and move it into place in one step.

    Args:
        directory: Target; must not exist unless ``overwrite``.
        manifest: Its ``files`` entry is replaced by the hash of ``adapter``.
        adapter: Bytes from ``pack_tensors`` (or of an artifact already stored).
        overwrite: Replace an existing artifact.

    Raises:
        ArtifactError: If the target exists and may not be replaced, or is no artifact.
    """
    if directory.exists():
        if not overwrite:
            raise ArtifactError(f"{directory} already exists; pass --overwrite to replace it")
        if any(directory.iterdir()) and not (directory / MANIFEST_FILE).is_file():
            raise ArtifactError(f"{directory} is not an adapter directory; it will not be replaced")
    files = {ADAPTER_FILE: hashlib.sha256(adapter).hexdigest()}
    values = manifest.model_copy(update={"files": files}).model_dump(mode="json")
    values["manifest_sha256"] = manifest_digest(values)
    directory.parent.mkdir(parents=True, exist_ok=True)
    scratch = directory.with_name(f".{directory.name}.writing-{os.getpid()}")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    try:
        for name, content in ((ADAPTER_FILE, adapter), (MANIFEST_FILE, _manifest_bytes(values))):
            with (scratch / name).open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        _move_into_place(scratch, directory)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


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
    content = _read(directory, ADAPTER_FILE)
    sha256 = hashlib.sha256(content).hexdigest()
    expected = manifest.files.get(ADAPTER_FILE)
    if sha256 != expected:
        raise ArtifactCorruptError(
            f"{directory / ADAPTER_FILE} has sha256 {sha256}, the manifest says {expected}"
        )
    try:
        tensors = {name: value.float() for name, value in load_tensors(content).items()}
    except SafetensorError as error:
        raise ArtifactCorruptError(f"{directory / ADAPTER_FILE} cannot be read: {error}") from error
    return Artifact(manifest, tensors, sha256, directory)


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
    if values["format_version"] != FORMAT_VERSION:
        raise ArtifactVersionError(
            f"{path} has format version {values['format_version']}, this program reads version "
            f"{FORMAT_VERSION}; use a newer Dalorra"
        )
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
        return Manifest.model_validate(values)
    except ValidationError as error:
        raise ArtifactCorruptError(f"{path} is not a valid manifest: {error}") from error
