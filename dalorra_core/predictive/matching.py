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
    _check_factors(artifact, specs)
    expected = METHODS[manifest.method.name].init(specs, manifest.r, 0, manifest.method)
    if sorted(expected) != sorted(artifact.tensors):
        missing = sorted(set(expected) ^ set(artifact.tensors))[:5]
        raise ArtifactCorruptError(
            f"{artifact.directory}: tensors do not match the manifest's modules: {missing}"
        )
    for name, value in expected.items():
        if value.shape != artifact.tensors[name].shape:
            raise ArtifactCorruptError(
                f"{artifact.directory}: tensor {name} has shape "
                f"{tuple(artifact.tensors[name].shape)}, expected {tuple(value.shape)}"
            )
    return AdapterState(specs, manifest.r, manifest.lora_alpha / manifest.r, artifact.tensors)


def _check_factors(artifact: Artifact, specs: tuple[TargetSpec, ...]) -> None:
    """Refuse sizes that the stored factors do not bear out, before anything is made of that size.

    Whoever can write a manifest could else ask for any amount of memory.
    """
    r = artifact.manifest.r
    for spec in specs:
        for name, shape in (("lora_A", (r, spec.d_in)), ("lora_B", (spec.d_out, r))):
            found = artifact.tensors.get(f"{spec.name}.{name}")
            if r < 1 or found is None or tuple(found.shape) != shape:
                raise ArtifactCorruptError(
                    f"{artifact.directory}: tensor {spec.name}.{name} has shape "
                    f"{None if found is None else tuple(found.shape)}, expected {shape}"
                )


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
