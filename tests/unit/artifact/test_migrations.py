"""dalorra_core.artifact.migrations: what older versions wrote is read, and means the same."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from dalorra_core.artifact.calibration_record import Limit
from dalorra_core.artifact.manifest import FORMAT_VERSION, manifest_digest
from dalorra_core.artifact.store import ADAPTER_FILE, MANIFEST_FILE, load_artifact
from dalorra_core.errors import ArtifactCorruptError

STORED = Path(__file__).parents[2] / "golden" / "artifact-v1"
"""Written by Dalorra 0.1.0 in format version 1; never write it again."""


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    return shutil.copytree(STORED, tmp_path / "copy")


def values_of(directory: Path) -> dict[str, Any]:
    return json.loads((directory / MANIFEST_FILE).read_text("utf-8"))


def seal(directory: Path, values: dict[str, Any]) -> None:
    values = {**values}
    values.pop("manifest_sha256", None)
    values["manifest_sha256"] = manifest_digest(values)
    text = json.dumps(values, indent=1, ensure_ascii=False) + "\n"
    (directory / MANIFEST_FILE).write_text(text, "utf-8")


def with_policy(directory: Path, **changes: Any) -> Path:
    values = values_of(directory)
    values["policies"] = [{**values["policies"][0], **changes}]
    seal(directory, values)
    return directory


def test_the_stored_artifact_is_of_version_1_and_loads_for_ever() -> None:
    stored = values_of(STORED)
    assert stored["format_version"] == 1
    loaded = load_artifact(STORED)
    assert loaded.manifest.format_version == FORMAT_VERSION
    assert loaded.revision == "47847b9e0248"
    content = (STORED / ADAPTER_FILE).read_bytes()
    assert loaded.sha256 == hashlib.sha256(content).hexdigest()


def test_nothing_that_version_1_said_is_lost() -> None:
    stored, loaded = values_of(STORED), load_artifact(STORED).manifest.model_dump(mode="json")
    for name in set(stored) - {"manifest_sha256", "format_version", "policies"}:
        kept = loaded[name]
        if isinstance(kept, dict) and name in {
            "labels",
            "prompt",
            "predictive",
        }:  # have new optional fields
            kept = {key: kept[key] for key in stored[name]}
        assert kept == stored[name], name
    assert loaded["predictive"]["estimator"] == "monte_carlo"
    assert (loaded["labels"]["union"], loaded["prompt"]["append_eos"]) == ([], False)
    assert len(stored["policies"]) == len(loaded["policies"]) == 2
    for old, new in zip(stored["policies"], loaded["policies"], strict=True):
        for name in ("name", "target_selective_risk", "chosen_on", "guarantee"):
            assert new[name] == old[name]
        assert new["abstain"] == {
            "score": old["abstain_score"],
            "threshold": old["abstain_threshold"],
        }
    accepts = [policy["accept"] for policy in loaded["policies"]]
    assert accepts == [{"score": "confidence", "threshold": 0.9}, None]  # 2.0 accepted nothing


@pytest.mark.parametrize(
    ("score", "above"),
    [
        ("predictive_entropy", True),
        ("mutual_information", True),
        ("confidence", False),
        ("label_mass", False),
    ],
)
def test_each_abstain_score_keeps_its_side(copy: Path, score: Any, above: bool) -> None:
    with_policy(copy, abstain_score=score, abstain_threshold=0.25, abstain_above=above)
    (policy,) = load_artifact(copy).manifest.policies
    assert policy.abstain == Limit(score=score, threshold=0.25)
    with_policy(copy, abstain_above=not above)
    with pytest.raises(ArtifactCorruptError, match=f"where {score} is (above|below)"):
        load_artifact(copy)


def test_full_confidence_is_a_threshold_and_not_a_refusal(copy: Path) -> None:
    with_policy(copy, min_confidence=1.0)
    (policy,) = load_artifact(copy).manifest.policies
    assert policy.accept == Limit(score="confidence", threshold=1.0)


@pytest.mark.parametrize("policies", [None, 3, [3], [{}], {"name": "x"}])
def test_a_sealed_manifest_with_policies_of_no_version_is_refused(
    copy: Path, policies: object
) -> None:
    seal(copy, {**values_of(copy), "policies": policies})
    with pytest.raises(ArtifactCorruptError, match="not a valid manifest"):
        load_artifact(copy)


def test_a_manifest_without_policies_needs_none(copy: Path) -> None:
    values = values_of(copy)
    del values["policies"]
    seal(copy, values)
    assert load_artifact(copy).manifest.policies == ()


def test_every_shipped_adapter_loads() -> None:
    adapters = Path(__file__).parents[3] / "adapters"
    folders = sorted(p.parent for p in adapters.glob(f"*/{MANIFEST_FILE}"))
    assert folders
    for folder in folders:
        loaded = load_artifact(folder).manifest
        assert loaded.format_version == FORMAT_VERSION
        assert loaded.policies
