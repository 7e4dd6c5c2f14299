"""dalorra_core.artifact.export_record: a record that is believed only as it was written."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dalorra_core.artifact.export_record import (
    EXPORT_FILE,
    ExportedAdapter,
    ExportedFrom,
    ExportRecord,
    read_export,
    record_bytes,
)
from dalorra_core.errors import (
    ArtifactCorruptError,
    ArtifactMissingFileError,
    ArtifactVersionError,
)
from tests.support.tiny_manifest import tiny_manifest

TENSORS = b"any bytes"
SHA256 = hashlib.sha256(TENSORS).hexdigest()


@pytest.fixture
def export(tmp_path: Path) -> Path:
    """Return an export of two samples."""
    manifest = tiny_manifest()
    names = ("sample-000", "sample-001")
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_model.safetensors").write_bytes(TENSORS)
    record = ExportRecord(
        engine="vllm",
        created_at="2026-11-30T10:00:00+00:00",
        source=ExportedFrom(
            name=manifest.name,
            method="dalorra",
            adapter_sha256="0" * 64,
            revision="0" * 12,
            manifest_sha256="1" * 64,
        ),
        base=manifest.base,
        mask="samples",
        mask_set="ms_012345678901",
        num_samples=2,
        design="iid",
        seed=0,
        average="probabilities",
        labels=manifest.labels,
        prompt=manifest.prompt,
        temperature=1.5,
        r=8,
        adapters=tuple(ExportedAdapter(path=name, sha256=SHA256) for name in names),
        versions={"dalorra": "0.1.0"},
    )
    (tmp_path / EXPORT_FILE).write_bytes(record_bytes(record))
    return tmp_path


def changed(export: Path, change: Callable[[dict[str, Any]], object]) -> None:
    values = json.loads((export / EXPORT_FILE).read_text("utf-8"))
    change(values)
    (export / EXPORT_FILE).write_text(json.dumps(values), encoding="utf-8")


def test_what_was_written_comes_back(export: Path) -> None:
    record = read_export(export)
    assert record_bytes(record) == (export / EXPORT_FILE).read_bytes()
    assert [adapter.path for adapter in record.adapters] == ["sample-000", "sample-001"]
    assert record.labels == tiny_manifest().labels


@pytest.mark.parametrize(
    "place", ["..", "../elsewhere", "/etc", "sample-000/../..", "sample-000\n", "", "sample-1"]
)
def test_a_path_that_leads_elsewhere_is_refused(export: Path, place: str) -> None:
    changed(export, lambda values: values["adapters"][0].update(path=place))
    with pytest.raises(ArtifactCorruptError, match=r"adapters\.0\.path"):
        read_export(export)


def test_changed_tensors_are_refused(export: Path) -> None:
    (export / "sample-001" / "adapter_model.safetensors").write_bytes(TENSORS[:-1])
    with pytest.raises(ArtifactCorruptError, match=f"sample-001.*says {SHA256}"):
        read_export(export)


def test_a_missing_adapter_or_record_is_named(export: Path) -> None:
    (export / "sample-001" / "adapter_model.safetensors").unlink()
    with pytest.raises(ArtifactMissingFileError, match="sample-001"):
        read_export(export)
    (export / EXPORT_FILE).unlink()
    with pytest.raises(ArtifactMissingFileError, match=EXPORT_FILE):
        read_export(export)


def test_a_newer_version_is_no_damage(export: Path) -> None:
    changed(export, lambda values: values.update(format_version=2))
    with pytest.raises(ArtifactVersionError, match=r"format_version 2.*up to 1"):
        read_export(export)


@pytest.mark.parametrize("text", ["{", "[]", "null", '{"format_version": 1}', "[" * 100_000])
def test_what_is_no_record_is_refused(export: Path, text: str) -> None:
    (export / EXPORT_FILE).write_text(text, encoding="utf-8")
    with pytest.raises(ArtifactCorruptError):
        read_export(export)


def test_a_record_of_unlikely_size_is_not_parsed(export: Path) -> None:
    with (export / EXPORT_FILE).open("ab") as file:
        file.truncate((1 << 24) + 1)
    with pytest.raises(ArtifactCorruptError, match="at most"):
        read_export(export)
