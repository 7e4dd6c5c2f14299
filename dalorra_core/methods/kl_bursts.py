"""How much of a Gaussian divergence falls to each step of a run: BLoB's bursts, or the bound."""

from typing import Literal

from pydantic import Field

from dalorra_core.config import MethodSettings
from dalorra_core.methods.method import TrainingPoint
from dalorra_core.objectives.schedules import cycle_length, cyclic_weight

__all__ = ["KlBurstSettings", "KlCycleSettings", "burst_factor", "cycle_factor"]


class KlCycleSettings(MethodSettings, frozen=True):
    """How heavy the divergence is, and how long BLoB's cycle."""

    kl_weight: float = Field(default=1.0, ge=0, le=1e6, description="Factor on the KL.")
    gamma: float = Field(
        default=8.0,
        ge=1,
        le=64,
        description="A rescaled cycle has about 100 N^(pi / gamma) / batch size steps.",
    )


class KlBurstSettings(KlCycleSettings, frozen=True):
    """When the divergence acts."""

    kl_schedule: Literal["rescaled", "epoch", "per_example"] = Field(
        default="rescaled",
        description="rescaled: the KL comes in bursts, half of it in the last step of a cycle "
        "whose length gamma and N set; epoch: cycles of one epoch; per_example: 1/N of it in "
        "every step (the ELBO).",
    )


def cycle_factor(config: KlCycleSettings, point: TrainingPoint) -> float:
    """Return the share of the divergence that falls to this step of a rescaled cycle.

    Source:
        docs/method.md, eq. (B3).
    """
    cycle = cycle_length(point.num_examples, point.batch_size, config.gamma)
    return config.kl_weight * cyclic_weight(point.step, cycle)


def burst_factor(config: KlBurstSettings, point: TrainingPoint) -> float:
    """Return the factor of the divergence in the loss of this step.

    Source:
        docs/method.md, eq. (B3).
    """
    if config.kl_schedule == "per_example":
        return config.kl_weight / point.num_examples
    if config.kl_schedule == "epoch":
        cycle = max(1, point.num_examples // point.batch_size)
        return config.kl_weight * cyclic_weight(point.step, cycle)
    return cycle_factor(config, point)
