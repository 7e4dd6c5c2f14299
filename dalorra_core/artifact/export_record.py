"""``dalorra-export.json``: what exported adapters were made of, for whoever serves them.

The adapters beside it are plain PEFT directories and know nothing of labels, prompts or masks. Who
wants our answers from them needs what stands here: which adapters together are one posterior, what
is averaged, which tokens are the labels, how a question becomes a prompt, and the temperature.
"""

import hashlib
import json
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from dalorra_core.artifact.manifest import BaseRef, GoldenProbe, LabelsRef, PromptRef
from dalorra_core.artifact.peft_io import PEFT_TENSOR_FILE
from dalorra_core.artifact.reading import read_file
from dalorra_core.config import Design
from dalorra_core.errors import ArtifactCorruptError, ArtifactVersionError

__all__ = [
    "EXPORT_FILE",
    "EXPORT_VERSION",
    "Engine",
    "ExportRecord",
    "ExportedAdapter",
    "ExportedFrom",
    "ExportedGolden",
    "MaskKind",
    "Parity",
    "read_export",
    "record_bytes",
]

EXPORT_FILE = "dalorra-export.json"
EXPORT_VERSION = 1

Engine = Literal["peft", "vllm"]
"""Who is to load the adapters."""

MaskKind = Literal["mean", "ones", "samples"]
"""The posterior mean; all gates open; M samples."""

_LARGEST_RECORD = 1 << 24
_SHA256 = r"^[0-9a-f]{64}$"


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ExportedFrom(_Part):
    """The artifact that was exported, as it was then."""

    name: str
    method: str
    adapter_sha256: str = Field(pattern=_SHA256)
    revision: str
    manifest_sha256: str = Field(pattern=_SHA256)


class ExportedAdapter(_Part):
    """One PEFT directory; ``path`` is beside the record, ``sha256`` that of its tensors."""

    path: str = Field(pattern=r"^(\.|sample-[0-9]{3,})$")
    sha256: str = Field(pattern=_SHA256)


class ExportedGolden(_Part):
    """The artifact's golden probes as the exported functions answer them, by our forward pass.

    Probabilities of the label tokens, before any temperature; ``dtype`` is the precision of the
    base model that gave them.
    """

    dtype: str
    probes: tuple[GoldenProbe, ...]


class Parity(_Part):
    """How far the adapters, loaded by PEFT, are from our own forward pass, at the most.

    Over ``rows`` questions and all adapters: label logits, relative to the largest of ours (or 1,
    if that is larger); label probabilities of each adapter; and of their average. Each is at most
    ``limit``.
    """

    rows: int
    source: str
    dtype: str
    peft: str
    logits: float
    probabilities: float
    mean_probabilities: float
    limit: float


class ExportRecord(_Part):
    """Everything about an export but the tensors.

    ``mask_set`` is the id that the server reports for the same functions; null for ``ones``, which
    it never serves. ``num_samples``, ``design`` and ``seed`` are null where nothing was drawn.
    ``average`` says what an answer averages over the adapters. ``parity`` is null where it was not
    measured, ``golden`` where the artifact has no golden probes and where ``mask_set`` is null.
    """

    format_version: Literal[1] = 1
    format: Literal["peft"] = "peft"
    engine: Engine
    created_at: str
    source: ExportedFrom
    base: BaseRef
    mask: MaskKind
    mask_set: str | None
    num_samples: int | None
    design: Design | None
    seed: int | None
    average: Literal["probabilities", "logits"]
    labels: LabelsRef
    prompt: PromptRef
    temperature: float
    r: int
    adapters: tuple[ExportedAdapter, ...] = ()
    parity: Parity | None = None
    golden: ExportedGolden | None = None
    versions: dict[str, str]


def record_bytes(record: ExportRecord) -> bytes:
    """Return a record as it is written."""
    values = record.model_dump(mode="json")
    return (json.dumps(values, indent=1, ensure_ascii=False) + "\n").encode()


def read_export(directory: Path) -> ExportRecord:
    """Return the record of an export whose tensors are those that were written.

    Args:
        directory: Where the record lies.

    Raises:
        ArtifactMissingFileError: The record or an adapter's tensors are not there.
        ArtifactVersionError: A version this program does not read.
        ArtifactCorruptError: The record is none, names a place elsewhere, or tensors were changed.
    """
    path = directory / EXPORT_FILE
    record = _parsed(path, read_file(path, _LARGEST_RECORD))
    for adapter in record.adapters:
        file = directory / adapter.path / PEFT_TENSOR_FILE
        found = hashlib.sha256(read_file(file)).hexdigest()
        if found != adapter.sha256:
            raise ArtifactCorruptError(
                f"{file} has sha256 {found}, {EXPORT_FILE} says {adapter.sha256}"
            )
    return record


def _parsed(path: Path, content: bytes) -> ExportRecord:
    try:
        values: Any = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ArtifactCorruptError(f"{path} is not valid JSON: {error}") from None
    version = values.get("format_version") if isinstance(values, dict) else None
    if isinstance(version, int) and version > EXPORT_VERSION:
        raise ArtifactVersionError(
            f"{path} has format_version {version}; this program reads up to {EXPORT_VERSION}"
        )
    try:
        return ExportRecord.model_validate(values)
    except ValidationError as error:
        raise ArtifactCorruptError(f"{path} is not the record of an export: {error}") from None
