"""Intervals for a metric by resampling the evaluated examples."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dalorra_core.errors import ConfigError

__all__ = ["BootstrapInterval", "bootstrap_interval"]

_MIN_RESAMPLES = 2  # one value has no two quantiles


@dataclass(frozen=True)
class BootstrapInterval:
    """A percentile bootstrap interval, in the unit of the statistic.

    Attributes:
        low: Lower end.
        high: Upper end.
        level: Nominal coverage, strictly between 0 and 1.
    """

    low: float
    high: float
    level: float


def bootstrap_interval(
    statistic: Callable[..., float],
    *arrays: Tensor,
    generator: torch.Generator,
    num_resamples: int = 1000,
    level: float = 0.95,
) -> BootstrapInterval:
    """Return a percentile interval for a statistic of n exchangeable examples.

    Draws n examples with replacement, the same ones from every array, and takes quantiles of
    the statistic over the resamples. Says how far a number may move with another test set of
    the same size; it knows nothing of training noise.

    Args:
        statistic: Called with one resample of each array, in order; returns a number.
        *arrays: At least one; each has the n examples along its first axis, n >= 1.
        generator: Source of the resamples, on the CPU.
        num_resamples: At least 2; a 95 % interval wants 1000.
        level: Nominal coverage, strictly between 0 and 1.

    Returns:
        The interval. Both ends are NaN when the statistic is undefined on some resample.

    Raises:
        ConfigError: If ``num_resamples`` or ``level`` is outside its domain.
        ValueError: If there are no arrays, no examples, or the arrays differ in length.

    Source:
        Efron and Tibshirani 1993, An introduction to the bootstrap, chapter 13.
    """
    if num_resamples < _MIN_RESAMPLES:
        raise ConfigError(f"num_resamples must be at least {_MIN_RESAMPLES}, got {num_resamples}")
    if not 0.0 < level < 1.0:
        raise ConfigError(f"level must lie strictly between 0 and 1, got {level}")
    lengths = sorted({len(array) for array in arrays})
    if len(lengths) != 1 or lengths[0] == 0:
        raise ValueError(f"arrays must share one length of at least 1, got lengths {lengths}")
    values = torch.empty(num_resamples, dtype=torch.float64)
    for resample in range(num_resamples):
        chosen = torch.randint(lengths[0], (lengths[0],), generator=generator)  # (n,)
        values[resample] = statistic(*(array[chosen.to(array.device)] for array in arrays))
    tail = (1.0 - level) / 2
    low, high = values.quantile(torch.tensor([tail, 1.0 - tail], dtype=torch.float64)).tolist()
    return BootstrapInterval(low, high, level)
