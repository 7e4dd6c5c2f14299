"""How much of a Gaussian divergence falls to each step of a run: BLoB's bursts, or the bound."""

from typing import Literal

from pydantic import Field

from dalorra_core.config import MethodSettings
from dalorra_core.methods.method import TrainingPoint
from dalorra_core.objectives.schedules import cycle_length, cyclic_weight

__all__ = ["KlBurstSettings", "burst_factor"]


class KlBurstSettings(MethodSettings, frozen=True):
    """When the divergence acts."""

    kl_weight: float = Field(default=1.0, ge=0, le=1e6, description="Factor on the KL.")
    kl_schedule: Literal["rescaled", "epoch", "per_example"] = Field(
        default="rescaled",
        description="rescaled: the KL comes in bursts, half of it in the last step of a cycle "
        "whose length gamma and N set; epoch: cycles of one epoch; per_example: 1/N of it in "
        "every step (the ELBO).",
    )
    gamma: float = Field(
        default=8.0,
        ge=1,
        le=64,
        description="A rescaled cycle has about 100 N^(pi / gamma) / batch size steps.",
    )


def burst_factor(config: KlBurstSettings, point: TrainingPoint) -> float:
    """Return the factor of the divergence in the loss of this step.

    Source:
        docs/method.md, eq. (B3).
    """
    if config.kl_schedule == "per_example":
        return config.kl_weight / point.num_examples
    if config.kl_schedule == "epoch":
        cycle = max(1, point.num_examples // point.batch_size)
    else:
        cycle = cycle_length(point.num_examples, point.batch_size, config.gamma)
    return config.kl_weight * cyclic_weight(point.step, cycle)
