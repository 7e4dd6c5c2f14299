"""Bootstrap intervals against a closed form, and the settings they refuse."""

import math

import pytest
import torch

from dalorra_core import metrics
from dalorra_core.errors import ConfigError


def _mean(values: torch.Tensor) -> float:
    return float(values.mean())


def test_interval_of_a_mean_matches_the_binomial() -> None:
    # Resampled means of 0/1 data are Binomial(n, share) / n, whose quantiles are a finite sum.
    n, ones, draws = 200, 140, 4000
    data = (torch.arange(n) < ones).double()
    interval = metrics.bootstrap_interval(
        _mean, data, generator=torch.Generator().manual_seed(2), num_resamples=draws
    )
    share = ones / n
    std = math.sqrt(share * (1 - share) / n)
    # Standard error of an empirical quantile: sqrt(a (1 - a) / draws) / density.
    density = math.exp(-(1.96**2) / 2) / math.sqrt(2 * math.pi) / std
    error = math.sqrt(0.025 * 0.975 / draws) / density
    grid = 1 / n  # the statistic moves in steps of 1/n
    assert interval.low == pytest.approx(share - 1.96 * std, abs=5 * error + grid)
    assert interval.high == pytest.approx(share + 1.96 * std, abs=5 * error + grid)
    assert interval.level == 0.95


def test_arrays_are_resampled_together() -> None:
    left = torch.arange(30)

    def disagreement(a: torch.Tensor, b: torch.Tensor) -> float:
        return float((a != b - 100).sum())

    interval = metrics.bootstrap_interval(
        disagreement,
        left,
        left + 100,
        generator=torch.Generator().manual_seed(0),
        num_resamples=20,
    )
    assert (interval.low, interval.high) == (0.0, 0.0)


def test_a_constant_has_no_width() -> None:
    interval = metrics.bootstrap_interval(
        _mean, torch.ones(5), generator=torch.Generator().manual_seed(0), num_resamples=2
    )
    assert (interval.low, interval.high) == (1.0, 1.0)


def test_an_undefined_statistic_gives_an_undefined_interval() -> None:
    interval = metrics.bootstrap_interval(
        lambda _: math.nan,
        torch.ones(3),
        generator=torch.Generator().manual_seed(0),
        num_resamples=4,
    )
    assert math.isnan(interval.low)
    assert math.isnan(interval.high)


@pytest.mark.parametrize("level", [0.0, 1.0, -0.5, 95.0])
def test_level_outside_its_domain_is_refused(level: float) -> None:
    with pytest.raises(ConfigError, match="level must lie strictly between 0 and 1"):
        metrics.bootstrap_interval(_mean, torch.ones(3), generator=torch.Generator(), level=level)


def test_too_few_resamples_are_refused() -> None:
    with pytest.raises(ConfigError, match="num_resamples must be at least 2, got 1"):
        metrics.bootstrap_interval(
            _mean, torch.ones(3), generator=torch.Generator(), num_resamples=1
        )


@pytest.mark.parametrize(
    "arrays", [(), (torch.empty(0),), (torch.ones(2), torch.ones(3))], ids=["none", "empty", "odd"]
)
def test_arrays_without_one_common_length_are_refused(arrays: tuple[torch.Tensor, ...]) -> None:
    with pytest.raises(ValueError, match="arrays must share one length of at least 1"):
        metrics.bootstrap_interval(_mean, *arrays, generator=torch.Generator())
