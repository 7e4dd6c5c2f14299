"""A small manifest with every part filled in, and tensors that fit it."""

from typing import Any

import torch
from torch import Tensor

from dalorra_core.artifact.calibration_record import (
    Calibration,
    CalibrationRows,
    ChosenOn,
    Limit,
    MeasuredWith,
    Policy,
    ReferenceProfile,
    TemperatureFit,
)
from dalorra_core.artifact.manifest import (
    BaseRef,
    GoldenProbe,
    LabelsRef,
    Manifest,
    ModuleRef,
    PromptRef,
)
from dalorra_core.config import PredictiveConfig
from dalorra_core.methods.dalorra import DalorraConfig

__all__ = ["tiny_calibration", "tiny_manifest", "tiny_params"]


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
                accept=Limit(score="confidence", threshold=0.9),
                abstain=Limit(score="predictive_entropy", threshold=1e-06),
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


def tiny_calibration(scores_file: str, temperature: float = 1.5) -> Calibration:
    """Return the record of a calibration of `tiny_manifest` on four rows."""
    return Calibration(
        date="2026-02-01T00:00:00+00:00",
        dalorra="0.1.0",
        rows=CalibrationRows(
            source="rows", digest="d", n=4, n_out_of_scope=1, n_fit=1, n_select=1, n_certify=2
        ),
        measured_with=MeasuredWith(
            adapter_sha256="0",
            num_samples=10,
            design="iid",
            seed=0,
            estimator="monte_carlo",
            temperature=temperature,
            dtype="float32",
        ),
        temperature=TemperatureFit(
            value=temperature,
            fitted=temperature,
            kept=True,
            nll_before=0.5,
            nll_after=0.4,
            n_fit=1,
            n_held_out=1,
        ),
        combined=None,
        prediction_sets=(),
        uncertified=(),
        reference=ReferenceProfile(
            n=4,
            n_out_of_scope=1,
            scores={},
            confidence_bin_edges=(),
            confidence_bin_shares=(1.0,),
            labels={"ham": 0.5, "spam": 0.5},
            decisions={"accept": 0.5, "review": 0.25, "abstain": 0.25},
        ),
        scores_file=scores_file,
    )


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
