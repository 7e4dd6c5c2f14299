"""Bring manifests of older format versions to the present one; nothing they said is lost.

A migration gets the values of a manifest whose bytes were already verified, and returns those of
the next version. It checks what it reads: a manifest can be sealed and still be wrong.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, TypeAdapter

from dalorra_core.artifact.calibration_record import (
    HIGHER_IS_SURER,
    ChosenOn,
    Limit,
    Policy,
)
from dalorra_core.artifact.manifest import FORMAT_VERSION
from dalorra_core.errors import ArtifactCorruptError, ArtifactVersionError

__all__ = ["check_version", "migrated"]

Values = dict[str, Any]

_LARGEST_CONFIDENCE = 1.0


def check_version(version: object, path: Path) -> None:
    """Refuse a format version that this program does not know.

    Raises:
        ArtifactVersionError: Naming both sides.
    """
    if type(version) is not int or not 1 <= version <= FORMAT_VERSION:
        raise ArtifactVersionError(
            f"{path} has format version {version}, this program reads versions 1 to "
            f"{FORMAT_VERSION}; use a newer Dalorra"
        )


def migrated(values: Values) -> Values:
    """Return a manifest's values, of a known version, in the present one.

    Raises:
        ArtifactCorruptError: If a value contradicts another.
        pydantic.ValidationError: If a part is not what its version says.
    """
    for step in range(values["format_version"], FORMAT_VERSION):
        values = _MIGRATIONS[step](values)
    return values


class _PolicyV1(BaseModel):
    """A policy as format version 1 wrote it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    min_confidence: float
    abstain_score: Literal["predictive_entropy", "mutual_information", "confidence", "label_mass"]
    abstain_threshold: float
    abstain_above: bool
    target_selective_risk: float
    chosen_on: ChosenOn
    guarantee: None = None


def _policy_from_version_1(old: _PolicyV1) -> Policy:
    if old.abstain_above == HIGHER_IS_SURER[old.abstain_score]:
        side = "above" if old.abstain_above else "below"
        raise ArtifactCorruptError(
            f"policy {old.name} abstains where {old.abstain_score} is {side} its threshold, "
            "which is where answers are surer"
        )
    # Version 1 wrote a threshold above every possible confidence for "nothing may be accepted".
    accepts = old.min_confidence <= _LARGEST_CONFIDENCE
    return Policy(
        name=old.name,
        accept=Limit(score="confidence", threshold=old.min_confidence) if accepts else None,
        abstain=Limit(score=old.abstain_score, threshold=old.abstain_threshold),
        target_selective_risk=old.target_selective_risk,
        chosen_on=old.chosen_on,
    )


def _to_version_2(values: Values) -> Values:
    policies = TypeAdapter(tuple[_PolicyV1, ...]).validate_python(values.get("policies", ()))
    return {
        **values,
        "format_version": 2,
        "policies": [_policy_from_version_1(p).model_dump(mode="json") for p in policies],
    }


_MIGRATIONS: dict[int, Callable[[Values], Values]] = {1: _to_version_2}
"""Version -> the step from it to the next one."""
