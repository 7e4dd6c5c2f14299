"""Artifacts for a tiny base model, written in a moment: random factors, no training."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dalorra_core.adapters.inject import TargetSpec, find_targets
from dalorra_core.adapters.state import AdapterState, label_rows_only
from dalorra_core.artifact.manifest import (
    BaseRef,
    GoldenProbe,
    LabelsRef,
    Manifest,
    ModuleRef,
    PromptRef,
)
from dalorra_core.artifact.store import load_artifact, pack_tensors, save_artifact, update_artifact
from dalorra_core.base_models.fingerprint import fingerprint
from dalorra_core.base_models.loading import load_model
from dalorra_core.config import MethodSettings, PredictiveConfig
from dalorra_core.data.examples import TextExample
from dalorra_core.data.prompts import TEXT_TEMPLATES
from dalorra_core.methods import METHODS
from dalorra_core.predictive.matching import tokenizer_sha256
from dalorra_core.predictive.predictor import Predictor
from tests.support.tiny_models import LABEL_TOKENS

__all__ = ["TEXTS", "save_tiny_adapter", "with_manifest"]

TEXTS = ("transfer to my account", "book a flight", "set an alarm to five please", "hotel")


def save_tiny_adapter(  # noqa: PLR0913  all by name, each with a default
    directory: Path,
    base: Path,
    *,
    r: int = 3,
    targets: Sequence[str] = ("q_proj", "v_proj", "lm_head"),
    layers: tuple[int, int] | None = None,
    num_labels: int = 4,
    seed: int = 0,
    method: str = "dalorra",
    config: MethodSettings | None = None,
    params: Mapping[str, Tensor] | None = None,
    **manifest: Any,
) -> Path:
    """Write an adapter of random factors with two golden probes, and return its directory.

    Args:
        directory: To be written; its name is the adapter's.
        base: From `save_tiny_base`.
        r: Rank.
        targets: Adapted modules.
        layers: First and last adapted layer; None for all.
        num_labels: C, at most six.
        seed: Of the factors.
        method: Its method, with its defaults.
        config: Settings of its method instead.
        params: Its tensors instead of random ones.
        manifest: Entries of the manifest to change.
    """
    model = load_model(base, torch.device("cpu"), torch.float32)
    specs = label_rows_only(find_targets(model, targets, layers), num_labels)
    settings = (
        METHODS[method].settings.model_validate({"name": method}) if config is None else config
    )
    if params is None:
        params = _random_params(specs, r, seed, settings)
    template = TEXT_TEMPLATES["intent"]
    values = Manifest(
        name=directory.name,
        method=settings,
        base=BaseRef(
            id=str(base),
            fingerprint=fingerprint(base),
            tokenizer_sha256=tokenizer_sha256(base),
        ),
        modules=tuple(
            ModuleRef(name=s.name, d_in=s.d_in, d_out=s.d_out, layer=s.layer) for s in specs
        ),
        r=r,
        lora_alpha=2.0 * r,
        labels=LabelsRef(
            labels=tuple(f"{directory.name}-{c}" for c in range(num_labels)),
            token_ids=LABEL_TOKENS[:num_labels],
        ),
        prompt=PromptRef(
            kind="text",
            name=template.name,
            template=template.template,
            sha256=template.sha256,
            max_tokens=64,
        ),
        predictive=PredictiveConfig(num_samples=3),
        files={},
    )
    save_artifact(directory, values, pack_tensors(params))
    return with_manifest(directory, **{"golden": _golden(directory, base), **manifest})


def _random_params(
    specs: tuple[TargetSpec, ...], r: int, seed: int, config: MethodSettings
) -> dict[str, Tensor]:
    method = METHODS[config.name]
    trained_as = method.trained_as(config)
    states = []
    for member in range(method.members(config)):
        params = METHODS[trained_as.name].init(specs, r, seed + member, trained_as)
        generator = torch.Generator().manual_seed(seed + member)
        for name, value in params.items():
            if not name.endswith("lora_A"):
                params[name] = 0.3 * torch.randn(value.shape, generator=generator)
        states.append(AdapterState(specs, r, 2.0, params))
    return method.join(states)


def with_manifest(directory: Path, **changes: Any) -> Path:
    """Change entries of an artifact's manifest, and return its directory."""
    update_artifact(directory, load_artifact(directory).manifest.model_copy(update=changes))
    return directory


def _golden(directory: Path, base: Path) -> tuple[GoldenProbe, ...]:
    predictor = Predictor.load(directory, base=str(base), device="cpu", verify_golden=False)
    probes = []
    for text in TEXTS[:2]:
        found = predictor.predict([predictor.encode(TextExample(text, text))]).log_probs
        probs = tuple(round(float(p), 7) for p in found.double().exp().mean(0)[0])
        probes.append(GoldenProbe(id=text, row={"text": text}, probs=probs))
    return tuple(probes)
