"""Write artifact directories, whole or not at all; ``reading`` reads them."""

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save as dump_tensors
from torch import Tensor

from dalorra_core.artifact.manifest import Manifest, manifest_digest
from dalorra_core.artifact.placing import (
    place_directory,
    place_file,
    put_back,
    scratch_directory,
    write_synced,
)
from dalorra_core.artifact.reading import (
    ADAPTER_FILE,
    MANIFEST_FILE,
    Artifact,
    load_artifact,
    manifest_bytes,
)
from dalorra_core.errors import ArtifactError

__all__ = [
    "ADAPTER_FILE",
    "MANIFEST_FILE",
    "SIGNATURE_FILE",
    "Artifact",
    "as_stored",
    "calibration_file_name",
    "load_artifact",
    "pack_tensors",
    "save_artifact",
    "update_artifact",
]

SIGNATURE_FILE = "signature.json"

_CALIBRATION_FILES = "calibration-*.safetensors"


def pack_tensors(params: Mapping[str, Tensor], *, exact: bool = False) -> bytes:
    """Return parameters as safetensors bytes: factors in bfloat16, everything else in float32.

    The factors are most of the size and tolerate rounding; gate logits are a few hundred numbers
    whose rounding would move keep probabilities.

    Args:
        params: Parameters by their artifact names.
        exact: Keep a factor in float32 where bfloat16 would change it: for an adapter that has
            answered in float32 before and is to answer the same.
    """
    return dump_tensors(
        {
            name: value.detach().cpu().to(_stored_dtype(name, value, exact=exact)).contiguous()
            for name, value in sorted(params.items())
        }
    )


def as_stored(params: Mapping[str, Tensor], *, exact: bool = False) -> dict[str, Tensor]:
    """Return parameters in float32 with the values that they have once stored and read again."""
    return {
        name: value.detach().to(_stored_dtype(name, value, exact=exact)).float()
        for name, value in params.items()
    }


def _stored_dtype(name: str, value: Tensor, *, exact: bool) -> torch.dtype:
    if not name.endswith((".lora_A", ".lora_B")):
        return torch.float32
    whole = value.detach().float()
    if exact and not torch.equal(whole.bfloat16().float(), whole):
        return torch.float32
    return torch.bfloat16


def calibration_file_name(content: bytes) -> str:
    """Return the name of a file of calibration scores; it says what is in it."""
    return f"calibration-{hashlib.sha256(content).hexdigest()[:8]}.safetensors"


def save_artifact(
    directory: Path, manifest: Manifest, adapter: bytes, *, overwrite: bool = False
) -> None:
    """Write an artifact beside ``directory`` and move it into place in one step.

    A signature of what was there goes with it: it was of other content.

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
    if put_back(directory):
        if not overwrite:
            raise ArtifactError(f"{directory} already exists; pass --overwrite to replace it")
        if any(directory.iterdir()) and not (directory / MANIFEST_FILE).is_file():
            raise ArtifactError(f"{directory} is not an adapter directory; it will not be replaced")
    with scratch_directory(directory) as scratch:
        write_synced(scratch / ADAPTER_FILE, adapter)
        files = {ADAPTER_FILE: hashlib.sha256(adapter).hexdigest()}
        write_synced(scratch / MANIFEST_FILE, _sealed(manifest, files)[0])
        place_directory(scratch, directory)


def update_artifact(directory: Path, manifest: Manifest, calibration: bytes | None = None) -> bool:
    """Replace an artifact's manifest and calibration scores, never its tensors.

    A signature is over the manifest: when that changes, the signature is void and is removed, so
    that the artifact reads as unsigned. (Killed before that, it reads as signed for other content.)

    The scores are written first, under a name made of their content; then the manifest that speaks
    of them takes the old one's place; then older scores go. Whenever this ends, be it by a power
    cut, the directory is a whole artifact: the old one or the new one.

    Args:
        directory: An artifact.
        manifest: Its new manifest; ``files`` is filled in here, and what it already says of the
            tensors must be true.
        calibration: Scores that ``manifest.calibration`` speaks of; None keeps those in place.

    Returns:
        Whether a signature was void and is gone.

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
            place_file(directory / name, calibration)
    content, digest = _sealed(manifest, files)
    place_file(directory / MANIFEST_FILE, content)
    void = digest != current.manifest_sha256 and (directory / SIGNATURE_FILE).exists()
    if void:
        (directory / SIGNATURE_FILE).unlink(missing_ok=True)
    for file in (*directory.glob(_CALIBRATION_FILES), *directory.glob(".*.writing")):
        if file.name not in files:
            file.unlink()
    return void


def _sealed(manifest: Manifest, files: dict[str, str]) -> tuple[bytes, str]:
    """Return the bytes of a manifest of these files, and its digest."""
    values = manifest.model_copy(update={"files": files}).model_dump(mode="json")
    values["manifest_sha256"] = manifest_digest(values)
    return manifest_bytes(values), values["manifest_sha256"]
