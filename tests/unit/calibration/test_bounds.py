"""Exact bounds against scipy's own, against enumeration, and the joined bound against sampling."""

import numpy as np
import pytest
from scipy.stats import binom, binomtest

from dalorra_core.calibration.bounds import (
    Counts,
    clopper_pearson_lower,
    clopper_pearson_upper,
    risk_upper_bound,
    selective_risk_at,
)
from dalorra_core.errors import ConfigError


def counts(accepted: float, wrong: float, n: float, outside: float, n_outside: float) -> Counts:
    return Counts(np.asarray(accepted), np.asarray(wrong), n, np.asarray(outside), n_outside)


@pytest.mark.parametrize(("k", "n"), [(0, 10), (1, 10), (7, 31), (30, 31), (31, 31), (12, 1500)])
@pytest.mark.parametrize("delta", [0.01, 0.1, 0.4])
def test_bounds_equal_scipys_exact_interval(k: int, n: int, delta: float) -> None:
    upper = binomtest(k, n, alternative="less").proportion_ci(1 - delta, "exact").high
    lower = binomtest(k, n, alternative="greater").proportion_ci(1 - delta, "exact").low
    assert clopper_pearson_upper(k, n, delta) == pytest.approx(upper, abs=1e-9)
    assert clopper_pearson_lower(k, n, delta) == pytest.approx(lower, abs=1e-9)


def test_without_trials_nothing_is_known() -> None:
    assert clopper_pearson_upper(0, 0, 0.1) == 1.0
    assert clopper_pearson_lower(0, 0, 0.1) == 0.0


@pytest.mark.parametrize("p", [0.02, 0.3, 0.9])
def test_upper_bound_is_too_low_with_probability_delta_at_most(p: float) -> None:
    k = np.arange(41)
    too_low = clopper_pearson_upper(k, 40, 0.1) < p
    assert float(binom.pmf(k, 40, p)[too_low].sum()) <= 0.1


def test_risk_is_the_mixture_of_both_parts() -> None:
    # by hand: accepted 0.8 * 90/100 + 0.2 * 5/50 = 0.74; errors 0.8 * 9/100 + 0.02 = 0.092
    assert selective_risk_at(counts(90, 9, 100, 5, 50), 0.2) == pytest.approx(0.092 / 0.74)
    assert selective_risk_at(counts(90, 9, 100, 0, 0), 0.0) == pytest.approx(0.1)
    assert np.isnan(selective_risk_at(counts(0, 0, 100, 0, 50), 0.2))


def test_without_out_of_scope_rows_the_bound_is_clopper_pearson() -> None:
    assert risk_upper_bound(counts(90, 4, 100, 0, 0), 0.0, 0.1) == clopper_pearson_upper(4, 90, 0.1)


def test_bound_covers_every_smaller_share() -> None:
    seen = counts(900, 20, 1000, 6, 100)
    bounds = [float(risk_upper_bound(seen, pi, 0.1)) for pi in (0.01, 0.05, 0.1, 0.2, 0.4)]
    assert bounds == sorted(bounds)
    risks = [float(selective_risk_at(seen, pi)) for pi in (0.01, 0.05, 0.1, 0.2, 0.4)]
    assert all(bound > risk for bound, risk in zip(bounds, risks, strict=True))


@pytest.mark.parametrize("split", [0.2, 0.5, 0.8])
def test_joined_bound_is_too_low_with_probability_delta_at_most(split: float) -> None:
    n, n_out, covered, wrong, leaked, pi = 300, 60, 0.8, 0.03, 0.08, 0.2
    true = ((1 - pi) * covered * wrong + pi * leaked) / ((1 - pi) * covered + pi * leaked)
    rng = np.random.default_rng(7)
    accepted = rng.binomial(n, covered, size=20_000).astype(float)
    errors = rng.binomial(accepted.astype(int), wrong).astype(float)
    outside = rng.binomial(n_out, leaked, size=20_000).astype(float)
    bound = risk_upper_bound(Counts(accepted, errors, n, outside, n_out), pi, 0.1, split)
    assert float((bound < true).mean()) <= 0.1


def test_scaling_keeps_the_rates() -> None:
    grown = counts(90, 9, 100, 5, 50).scaled(200, 10)
    assert (float(grown.accepted), float(grown.wrong), grown.n) == (180.0, 18.0, 200)
    assert (float(grown.accepted_outside), grown.n_outside) == (1.0, 10)


@pytest.mark.parametrize("delta", [0.0, 1.0, -0.1, float("nan")])
def test_delta_outside_its_domain_is_refused(delta: float) -> None:
    with pytest.raises(ConfigError, match="delta must lie strictly between 0 and 1, got"):
        clopper_pearson_upper(1, 10, delta)


def test_a_share_needs_out_of_scope_rows() -> None:
    with pytest.raises(ConfigError, match="needs out-of-scope rows"):
        risk_upper_bound(counts(90, 9, 100, 0, 0), 0.2, 0.1)
    with pytest.raises(ConfigError, match=r"out_of_scope_share must be in \[0, 1\), got 1"):
        selective_risk_at(counts(90, 9, 100, 1, 10), 1.0)
