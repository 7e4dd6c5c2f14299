"""Options that several commands share, so that they read and behave alike everywhere."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, TypeVar, get_args

import typer

from dalorra_core.config import Estimator
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

ESTIMATORS: tuple[Estimator, ...] = get_args(Estimator)

_Name = TypeVar("_Name", bound=str)

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
    str | None,
    typer.Option(
        help="monte_carlo averages the samples' probabilities; mean_mask is one deterministic "
        "pass; linearised averages draws of the network linearised in its gates (method dalorra, "
        "few labels) [default: the adapter's]."
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
    estimator: str | None = None,
    design: str | None = None,
) -> SamplingPlan:
    """Return the adapter's default plan with what the user changed.

    Who names a number of samples or a design and no estimator asks for samples.

    Raises:
        ConfigError: If estimator or design is unknown, has no effect, or the adapter cannot follow
            it.
    """
    stored = predictor.sampled_plan
    samples_asked = num_samples is not None or design is not None
    asked = (
        ("monte_carlo" if samples_asked else predictor.default_plan.estimator)
        if estimator is None
        else estimator
    )
    chosen = _one_of(ESTIMATORS, "estimator", asked)
    if design is not None and chosen != "monte_carlo":
        raise ConfigError(f"design must be left out with {chosen}, got {design!r}")
    if num_samples is not None and chosen == "linearised":
        raise ConfigError(f"num_samples must be left out with linearised, got {num_samples}")
    found = stored.design if design is None else _one_of(DESIGNS, "design", design)
    predictor.method.check_design(predictor.manifest.method, found)
    plan = SamplingPlan(
        num_samples=stored.num_samples if num_samples is None else num_samples,
        seed=stored.seed if seed is None else seed,
        estimator=chosen,
        design=found,
    )
    predictor.num_functions(plan)  # says now what the adapter has not
    return plan


def _one_of(names: Sequence[_Name], setting: str, text: str) -> _Name:
    for known in names:
        if text == known:
            return known
    raise ConfigError(f"{setting} must be {' or '.join(names)}, got {text!r}")
