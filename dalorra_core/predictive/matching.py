"""Does an artifact fit the base model, and do its tensors fit its manifest?"""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from dalorra_core.adapters.inject import TargetSpec
from dalorra_core.adapters.state import AdapterState
from dalorra_core.artifact.store import Artifact
from dalorra_core.errors import ArtifactCorruptError, BaseMismatchError
from dalorra_core.methods import METHODS

__all__ = ["BaseIdentity", "check_base", "state_of", "tokenizer_sha256"]


@dataclass(frozen=True)
class BaseIdentity:
    """Who a base model is.

    Attributes:
        directory: Where its files lie.
        fingerprint: sha256 over its tensors.
        tokenizer_sha256: sha256 of its tokenizer.
    """

    directory: Path
    fingerprint: str
    tokenizer_sha256: str


def tokenizer_sha256(directory: Path) -> str:
    """Return the sha256 of a model directory's tokenizer.json, or of its vocabulary files."""
    names = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt")
    found = [directory / n for n in names if (directory / n).is_file()]
    digest = hashlib.sha256()
    for path in found[:1] if found and found[0].name == "tokenizer.json" else found:
        digest.update(path.read_bytes())
    return digest.hexdigest()


def state_of(artifact: Artifact) -> AdapterState:
    """Return the adapter's explicit state; refuse tensors that do not fit the manifest.

    Raises:
        ArtifactCorruptError: Naming the tensor, its shape and the expected one.
    """
    manifest = artifact.manifest
    specs = tuple(TargetSpec(m.name, m.d_in, m.d_out, m.layer) for m in manifest.modules)
    method = METHODS[manifest.method.name]
    if manifest.r < 1:
        raise ArtifactCorruptError(f"{artifact.directory}: r must be at least 1, got {manifest.r}")
    expected = method.shapes(specs, manifest.r, manifest.method)
    if sorted(expected) != sorted(artifact.tensors):
        missing = sorted(set(expected) ^ set(artifact.tensors))[:5]
        raise ArtifactCorruptError(
            f"{artifact.directory}: tensors do not match the manifest's modules: {missing}"
        )
    for name, shape in expected.items():
        found = tuple(artifact.tensors[name].shape)
        if found != shape:
            raise ArtifactCorruptError(
                f"{artifact.directory}: tensor {name} has shape {found}, expected {shape}"
            )
    return AdapterState(specs, manifest.r, manifest.lora_alpha / manifest.r, artifact.tensors)


def check_base(artifact: Artifact, base: BaseIdentity) -> None:
    """Refuse a base model or a tokenizer that the adapter was not trained with.

    Raises:
        BaseMismatchError: Naming both fingerprints.
    """
    expected, found = artifact.manifest.base.fingerprint, base.fingerprint
    if found != expected:
        raise BaseMismatchError(
            f"{artifact.directory} was trained on {artifact.manifest.base.id} with fingerprint "
            f"{expected}; the base model in {base.directory} has {found}",
            expected=expected,
            found=found,
        )
    expected, found = artifact.manifest.base.tokenizer_sha256, base.tokenizer_sha256
    if found != expected:
        raise BaseMismatchError(
            f"{artifact.directory} was trained with the tokenizer {expected}; the one in "
            f"{base.directory} is {found}",
            expected=expected,
            found=found,
        )
