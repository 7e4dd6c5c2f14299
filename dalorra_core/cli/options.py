"""Options that several commands share, so that they read and behave alike everywhere."""

from pathlib import Path
from typing import Annotated

import typer

from dalorra_core.config import Design
from dalorra_core.errors import ConfigError
from dalorra_core.predictive.predictor import Predictor, SamplingPlan
from dalorra_core.sampling.designs import DESIGNS

__all__ = [
    "AdapterArgument",
    "BaseOption",
    "DesignOption",
    "DeviceOption",
    "DtypeOption",
    "EstimatorOption",
    "SamplesOption",
    "SeedOption",
    "plan_from",
]

AdapterArgument = Annotated[
    Path, typer.Argument(metavar="ADAPTER", help="Artifact directory, such as adapters/clinc150.")
]
BaseOption = Annotated[
    str | None,
    typer.Option(
        help="Base model directory, hub id or built-in alias [default: the one the adapter names]."
    ),
]
DeviceOption = Annotated[
    str, typer.Option(help="auto, cpu, cuda or cuda:N; auto takes CUDA when there is one.")
]
DtypeOption = Annotated[
    str,
    typer.Option(
        help="Of the base model: auto, float32 or bfloat16; auto: bfloat16 on CUDA, float32 on CPU."
    ),
]
SamplesOption = Annotated[
    int | None,
    typer.Option("--num-samples", "-M", min=1, help="Posterior samples [default: the adapter's]."),
]
SeedOption = Annotated[
    int | None, typer.Option(min=0, help="Picks the mask set [default: the adapter's].")
]
EstimatorOption = Annotated[
    str,
    typer.Option(
        help="monte_carlo averages the samples' probabilities; mean_mask is one deterministic pass."
    ),
]
DesignOption = Annotated[
    str | None,
    typer.Option(
        help="How the samples are drawn together: iid, stratified or antithetic [default: the "
        "adapter's]."
    ),
]


def plan_from(
    predictor: Predictor,
    num_samples: int | None,
    seed: int | None,
    estimator: str,
    design: str | None = None,
) -> SamplingPlan:
    """Return the adapter's default plan with what the user changed.

    Raises:
        ConfigError: If estimator or design is unknown, or the adapter cannot follow the design.
    """
    default = predictor.default_plan
    if estimator not in ("monte_carlo", "mean_mask"):
        raise ConfigError(f"estimator must be monte_carlo or mean_mask, got {estimator!r}")
    if design is not None and estimator == "mean_mask":
        raise ConfigError(f"design must be left out with mean_mask, got {design!r}")
    found = default.design if design is None else _design(design)
    predictor.method.check_design(predictor.manifest.method, found)
    return SamplingPlan(
        num_samples=default.num_samples if num_samples is None else num_samples,
        seed=default.seed if seed is None else seed,
        estimator="monte_carlo" if estimator == "monte_carlo" else "mean_mask",
        design=found,
    )


def _design(text: str) -> Design:
    for known in DESIGNS:
        if text == known:
            return known
    raise ConfigError(f"design must be {' or '.join(DESIGNS)}, got {text!r}")
