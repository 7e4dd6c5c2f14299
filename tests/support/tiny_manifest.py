"""A small manifest with every part filled in, and tensors that fit it."""

from typing import Any

import torch
from torch import Tensor

from dalorra_core.artifact.manifest import (
    BaseRef,
    ChosenOn,
    GoldenProbe,
    LabelsRef,
    Manifest,
    ModuleRef,
    Policy,
    PromptRef,
)
from dalorra_core.config import DalorraConfig, PredictiveConfig

__all__ = ["tiny_manifest", "tiny_params"]


def tiny_manifest(**changes: Any) -> Manifest:
    """Return a manifest of two modules, two labels, one policy and one golden probe."""
    values: dict[str, Any] = {
        "name": "demo",
        "description": "Größe: ünïcode",
        "method": DalorraConfig(),
        "base": BaseRef(id="tiny", fingerprint="sha256:0", tokenizer_sha256="1"),
        "modules": (
            ModuleRef(name="layers.0.q", d_in=6, d_out=4, layer=0),
            ModuleRef(name="lm_head", d_in=6, d_out=2, layer=None),
        ),
        "r": 3,
        "lora_alpha": 6.0,
        "labels": LabelsRef(labels=("ham", "spam"), token_ids=(10, 11)),
        "prompt": PromptRef(
            kind="text", name="intent", template="{text}\nIntent:", sha256="2", max_tokens=300
        ),
        "predictive": PredictiveConfig(),
        "policies": (
            Policy(
                name="default",
                min_confidence=0.9,
                abstain_score="predictive_entropy",
                abstain_threshold=1e-06,
                abstain_above=True,
                target_selective_risk=0.02,
                chosen_on=ChosenOn(
                    split="validation",
                    n=4,
                    n_out_of_scope=1,
                    num_samples=10,
                    seed=0,
                    estimator="monte_carlo",
                    dtype="float32",
                    date="2026-01-01",
                    selective_risk=None,
                    coverage=0.5,
                ),
            ),
        ),
        "golden": (GoldenProbe(id="g", row={"text": "hi"}, probs=(0.25, 0.75)),),
        "provenance": {"seconds": 1.5, "config": {"eps": 1e-06, "steps": 3}},
        "files": {},
    }
    return Manifest(**{**values, **changes})


def tiny_params() -> dict[str, Tensor]:
    """Return random tensors of `tiny_manifest`'s modules."""
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "layers.0.q.lora_A": (3, 6),
        "layers.0.q.lora_B": (4, 3),
        "lm_head.lora_A": (3, 6),
        "lm_head.lora_B": (2, 3),
        "phi": (2, 3),
    }
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
