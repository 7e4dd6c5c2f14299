"""The manifest of an adapter: everything but the tensors, as validated JSON."""

import hashlib
import json
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationInfo, field_validator

from dalorra_core.artifact.calibration_record import Calibration, PlanEvidence, Policy
from dalorra_core.config import PredictiveConfig
from dalorra_core.methods import MethodConfig

__all__ = [
    "FORMAT_VERSION",
    "BaseRef",
    "GoldenProbe",
    "LabelsRef",
    "Manifest",
    "ModuleRef",
    "PromptRef",
    "manifest_digest",
    "with_plan",
]

FORMAT_VERSION = 2


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class BaseRef(_Part):
    """Which base model the adapter belongs to; ``fingerprint`` decides, ``id`` helps to find it."""

    id: str
    fingerprint: str
    tokenizer_sha256: str


class ModuleRef(_Part):
    """One adapted module; row l of a stacked tensor belongs to modules[l]."""

    name: str
    d_in: int
    d_out: int
    layer: int | None


class LabelsRef(_Part):
    """The label set in the order of every probability vector, and one token for each label.

    A question is scored over its own choices and the labels of ``union``; usually there are none.
    """

    labels: tuple[str, ...]
    token_ids: tuple[int, ...]
    out_of_scope_label: str | None = None
    union: tuple[str, ...] = ()

    @field_validator("union")
    @classmethod
    def _known(cls, value: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
        unknown = sorted(set(value) - set(info.data.get("labels", ())))
        if unknown:
            raise ValueError(f"union must hold labels of the adapter only, got {unknown}")
        return value


class PromptRef(_Part):
    """How a question becomes a prompt."""

    kind: Literal["text", "choice"]
    name: str
    template: str
    sha256: str
    max_tokens: int = Field(ge=2)
    append_eos: bool = False


class GoldenProbe(_Part):
    """A stored question and the probabilities that were given for it in float32.

    By the default predictive, or by ``Manifest.golden_predictive`` where that is set.
    """

    id: str
    row: dict[str, JsonValue]
    probs: tuple[float, ...]


class Manifest(_Part):
    """Everything about an adapter but its tensors.

    ``golden_predictive`` is the predictive that the golden probes were stored under, where a
    sampling plan has changed the default since; null: the default.
    """

    format_version: Literal[2] = 2
    name: str
    description: str = ""
    method: MethodConfig
    base: BaseRef
    modules: tuple[ModuleRef, ...]
    r: int
    lora_alpha: float
    labels: LabelsRef
    prompt: PromptRef
    predictive: PredictiveConfig
    policies: tuple[Policy, ...] = ()
    calibration: Calibration | None = None
    golden: tuple[GoldenProbe, ...] = ()
    golden_predictive: PredictiveConfig | None = None
    provenance: dict[str, JsonValue] = Field(default_factory=dict)
    files: dict[str, str]


def with_plan(manifest: Manifest, plan: PlanEvidence) -> Manifest:
    """Return a manifest whose default predictive is that of a plan, under the same seed.

    Where a plan takes no samples, M and design stay, for who asks for samples.

    Its golden probes stay those of the predictive they were stored under: they were computed in
    float32, which this machine may not have.
    """
    old = manifest.predictive
    new = old.model_copy(update={"estimator": plan.estimator})
    if plan.estimator == "monte_carlo":
        new = new.model_copy(update={"design": plan.design, "num_samples": plan.num_samples})
    golden = manifest.golden_predictive or old
    return manifest.model_copy(
        update={"predictive": new, "golden_predictive": None if golden == new else golden}
    )


def manifest_digest(values: dict[str, Any]) -> str:
    """Return the sha256 of a manifest's canonical JSON, its own digest left out."""
    body = {key: value for key, value in values.items() if key != "manifest_sha256"}
    text = json.dumps(body, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()
