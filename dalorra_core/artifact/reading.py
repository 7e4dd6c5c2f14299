"""Read artifact directories. Nothing that could execute is ever opened."""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from torch import Tensor

from dalorra_core.artifact.manifest import Manifest, manifest_digest
from dalorra_core.artifact.migrations import check_version, migrated
from dalorra_core.artifact.placing import put_back
from dalorra_core.errors import (
    ArtifactCorruptError,
    ArtifactMissingFileError,
    ArtifactUnsafeError,
)

__all__ = [
    "ADAPTER_FILE",
    "MANIFEST_FILE",
    "Artifact",
    "load_artifact",
    "manifest_bytes",
    "read_file",
    "read_manifest",
]

MANIFEST_FILE = "manifest.json"
ADAPTER_FILE = "adapter.safetensors"

_PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")
_UNSAFE_SUFFIXES = {".bin", ".ckpt", ".joblib", ".npy", ".npz", ".pickle", ".pkl", ".pt", ".pth"}
# One would do for one recalibration; a directory that changes at each of five reads is no adapter.
_ATTEMPTS = 5


@dataclass(frozen=True)
class Artifact:
    """One adapter, verified.

    Attributes:
        manifest: Everything but the tensors.
        tensors: Parameters in float32, under the names of ``AdapterState.params``.
        sha256: Of adapter.safetensors; keys the mask streams and names the revision.
        directory: Where it was read from.
        manifest_sha256: Digest of the manifest that was read, in hex. The manifest lists the sha256
            of every file, so it stands for every byte; a signature is over it.
        calibration_scores: What was measured on each calibration row; None before calibration.
    """

    manifest: Manifest
    tensors: Mapping[str, Tensor]
    sha256: str
    directory: Path
    manifest_sha256: str
    calibration_scores: Mapping[str, Tensor] | None = None

    @property
    def revision(self) -> str:
        """First 12 hex digits of the tensors' sha256."""
        return self.sha256[:12]


def load_artifact(directory: Path) -> Artifact:
    """Read an artifact and check every byte of it.

    An artifact may be recalibrated or replaced at any time: when something does not fit and the
    manifest is another one by then, it is read again.

    Raises:
        ArtifactMissingFileError: The directory, the manifest or a listed file is not there.
        ArtifactUnsafeError: A file type that can execute code lies in the directory.
        ArtifactVersionError: A format version this program does not read.
        ArtifactCorruptError: A hash differs, or a file cannot be parsed.
    """
    for _ in range(_ATTEMPTS - 1):
        before = _peek(directory)
        try:
            return _load(directory)
        except (ArtifactMissingFileError, ArtifactCorruptError):
            if _peek(directory) == before:
                raise
    return _load(directory)


def read_manifest(directory: Path) -> Manifest:
    """Return an artifact's manifest, checked against its own digest; no other file is read.

    Raises:
        ArtifactMissingFileError: There is no manifest.
        ArtifactVersionError: A format version this program does not read.
        ArtifactCorruptError: It was changed, or is none.
    """
    return _read_manifest(directory)[0]


def read_file(path: Path, largest: int | None = None) -> bytes:
    """Return the content of a file that may come from anywhere.

    Args:
        path: The file.
        largest: Most bytes that it may have; None for any number.

    Raises:
        ArtifactMissingFileError: It cannot be read.
        ArtifactCorruptError: It is larger.
    """
    try:
        with path.open("rb") as file:
            content = file.read() if largest is None else file.read(largest + 1)
    except OSError as error:
        raise ArtifactMissingFileError(f"{path} cannot be read: {error.strerror}") from None
    if largest is not None and len(content) > largest:
        raise ArtifactCorruptError(f"{path} must have at most {largest} bytes")
    return content


def manifest_bytes(values: Mapping[str, Any]) -> bytes:
    """Return the one way a manifest is written; any other byte is a change."""
    return (json.dumps(values, indent=1, ensure_ascii=False) + "\n").encode()


def _peek(directory: Path) -> bytes | None:
    """Return the manifest's bytes as they are now; None when there is none to read."""
    try:
        return (directory / MANIFEST_FILE).read_bytes()
    except OSError:
        return None


def _load(directory: Path) -> Artifact:
    if not directory.is_dir() and not put_back(directory):
        raise ArtifactMissingFileError(f"adapter directory {directory} does not exist")
    for file in _listed(directory):
        if file.suffix.lower() in _UNSAFE_SUFFIXES:
            raise ArtifactUnsafeError(
                f"{directory} holds {file.name}: pickle-based formats can execute code and are "
                "never read. An artifact consists of JSON and safetensors only"
            )
    manifest, digest = _read_manifest(directory)
    contents = _read_files(directory, manifest.files)
    tensors = {n: v.float() for n, v in _parsed(directory, ADAPTER_FILE, contents).items()}
    scores = None
    if manifest.calibration is not None:
        scores = _parsed(directory, manifest.calibration.scores_file, contents)
    return Artifact(manifest, tensors, manifest.files[ADAPTER_FILE], directory, digest, scores)


def _listed(directory: Path) -> list[Path]:
    try:
        return sorted(directory.iterdir())
    except FileNotFoundError:  # just replaced, or deleted
        raise ArtifactMissingFileError(f"adapter directory {directory} does not exist") from None


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


def _read_manifest(directory: Path) -> tuple[Manifest, str]:
    """Return the manifest and its digest, both of the same bytes."""
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
    try:
        found = manifest_digest(values)
        written = manifest_bytes({**values, "manifest_sha256": digest})
    except (ValueError, RecursionError) as error:  # half a surrogate pair has no UTF-8 form
        raise ArtifactCorruptError(f"{path} cannot be what was written: {error}") from error
    if digest != found:
        raise ArtifactCorruptError(
            f"{path} was changed: its content has sha256 {found}, it says {digest}"
        )
    if content != written:
        raise ArtifactCorruptError(
            f"{path} was changed: it says the same, but not byte for byte as it was written"
        )
    try:
        return Manifest.model_validate(migrated(values)), found
    except ValidationError as error:
        raise ArtifactCorruptError(f"{path} is not a valid manifest: {error}") from error
