"""Paired differences against scipy, closed forms and simulated truth."""

import math
import time
from itertools import combinations

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from dalorra_core.errors import ConfigError
from dalorra_core.metrics.paired import (
    RowDraw,
    SeedScores,
    holm,
    paired_difference,
    seed_scores,
    standing,
    swap_p_value,
)
from dalorra_core.metrics.resampled import (
    one_by_one,
    resampled_auroc,
    resampled_ece,
    resampled_mean,
)

Runs = dict[int, tuple[Tensor, ...]]


def normals(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def mean_scores(rows: Runs, resamples: int = 2000, seed: int = 0) -> SeedScores:
    length = len(next(iter(rows.values()))[0])
    return seed_scores(resampled_mean, rows, RowDraw(length, resamples, seed))


def zero_like(rows: Runs) -> Runs:
    return {seed: (torch.zeros_like(values),) for seed, (values,) in rows.items()}


def constant(per_seed: list[float]) -> SeedScores:
    """A method whose score does not depend on the rows."""
    return mean_scores({s: (torch.full((4,), v).double(),) for s, v in enumerate(per_seed)})


def test_without_row_noise_it_is_the_paired_t_test() -> None:
    first, second = [0.71, 0.74, 0.69, 0.75], [0.70, 0.71, 0.70, 0.71]
    found = paired_difference(constant(first), constant(second))
    expected = stats.ttest_rel(first, second)
    low, high = expected.confidence_interval(0.95)
    resolution = 2 / 2000  # of evenly spaced quantiles; the density there is below 0.05 / width
    assert found.value == pytest.approx(0.0175)
    assert found.p_value == pytest.approx(float(expected.pvalue), abs=2 * resolution)
    width = high - low
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.01 * width)
    assert found.seed_std == pytest.approx(np.std(np.subtract(first, second), ddof=1))
    assert (found.num_seeds, found.num_rows) == (4, 4)


def test_without_seed_noise_it_is_the_normal_interval_of_the_rows() -> None:
    rows, resamples = 400, 4000
    values = normals(torch.Generator().manual_seed(1), rows)
    runs = dict.fromkeys(range(3), (values,))
    found = paired_difference(mean_scores(runs, resamples), mean_scores(zero_like(runs), resamples))
    mean, error = float(values.mean()), float(values.std(correction=0)) / math.sqrt(rows)
    # Standard error of an empirical quantile at 2.5 %: sqrt(a (1 - a) / R) / density.
    density = float(stats.norm.pdf(1.96)) / error
    noise = math.sqrt(0.025 * 0.975 / resamples) / density
    # The bootstrap distribution of a mean of 400 normal values is normal but for terms of 1 / n.
    assert found.low == pytest.approx(mean - 1.96 * error, abs=5 * noise)
    assert found.high == pytest.approx(mean + 1.96 * error, abs=5 * noise)
    z = abs(mean) / error
    p = 2 * float(stats.norm.sf(z))
    assert found.p_value == pytest.approx(p, abs=5 * 2 * math.sqrt(p / 2 / resamples) + 2e-3)


def test_rows_and_seeds_are_paired() -> None:
    """What both methods share, hard rows and lucky seeds, cancels to nothing."""
    generator = torch.Generator().manual_seed(2)
    hard = normals(generator, 50)
    first = {s: (hard + luck,) for s, luck in enumerate(normals(generator, 3))}
    second = {s: (values + 0.1,) for s, (values,) in reversed(first.items())}
    found = paired_difference(mean_scores(first), mean_scores(second))
    assert (found.low, found.value, found.high) == pytest.approx((-0.1, -0.1, -0.1))
    assert found.p_value == pytest.approx(2 / 2001)


def test_equal_methods_do_not_differ() -> None:
    found = paired_difference(constant([0.5, 0.6, 0.4]), constant([0.5, 0.6, 0.4]))
    assert (found.value, found.low, found.high, found.p_value) == (0, 0, 0, 1)


@pytest.mark.parametrize(("seeds", "trusted"), [(1, False), (2, False), (3, True)])
def test_fewer_than_three_seeds_are_not_trusted(seeds: int, trusted: bool) -> None:
    values = normals(torch.Generator().manual_seed(3), seeds, 40)
    runs: Runs = {seed: (row + 5.0,) for seed, row in enumerate(values)}
    found = paired_difference(mean_scores(runs), mean_scores(zero_like(runs)))
    assert found.trusted is trusted
    assert math.isnan(found.seed_std) is (seeds == 1)
    assert found.low > 0 or seeds == 2  # t with one degree of freedom allows nearly anything


def test_the_interval_is_reflected() -> None:
    """Resamples run from 1 below the value to 3 above it, so the truth may be 3 below it."""
    draw = RowDraw(10, 4001)
    resampled = torch.linspace(4.0, 8.0, 4001, dtype=torch.float64).unsqueeze(1)
    first = SeedScores((0,), torch.tensor([5.0], dtype=torch.float64), resampled, draw)
    second = SeedScores((0,), first.observed * 0, resampled * 0, draw)
    found = paired_difference(first, second)
    assert (found.low, found.high) == pytest.approx((5 - 2.9, 5 + 0.9))


def test_only_common_seeds_count() -> None:
    first, second = constant([0.9, 0.5, 0.6]), constant([0.9, 0.4, 0.4])
    some = SeedScores((7, 1, 2), second.observed, second.resampled, second.draw)
    found = paired_difference(first, some)
    assert (found.value, found.num_seeds) == (pytest.approx(0.15), 2)
    other = SeedScores((7, 8, 9), second.observed, second.resampled, second.draw)
    with pytest.raises(ValueError, match="share no seed"):
        paired_difference(first, other)


def test_an_undefined_score_gives_an_undefined_difference() -> None:
    """One error in ten rows: many resamples hold none, and an AUROC is not defined there."""
    wrong = torch.arange(10) == 0
    runs: Runs = {s: (torch.rand(10), wrong) for s in range(3)}
    scores = seed_scores(resampled_auroc, runs, RowDraw(10, 50))
    found = paired_difference(scores, scores)
    assert found.value == 0.0
    assert math.isnan(found.low)
    assert math.isnan(found.p_value)
    assert not found.trusted


def test_strata_keep_their_sizes() -> None:
    outside = torch.tensor([0, 0, 0, 0, 1])
    runs: Runs = {0: (outside.double(),)}
    kept = seed_scores(resampled_mean, runs, RowDraw(5, 50), outside)
    free = seed_scores(resampled_mean, runs, RowDraw(5, 50))
    assert kept.resampled.unique().tolist() == pytest.approx([0.2])
    assert len(free.resampled.unique()) > 2


def test_repeats_of_a_question_are_resampled_together() -> None:
    """Every row is there twice: the deviation is that of half as many rows, not of all of them."""
    generator = torch.Generator().manual_seed(8)
    once = normals(generator, 100)
    draw, groups = RowDraw(200, 4000), torch.arange(100).repeat(2)
    twice = seed_scores(resampled_mean, {0: (once.repeat(2),)}, draw, groups=groups)
    expected = float(once.std(correction=0)) / 10  # of a mean of 100 draws with replacement
    # The standard error of a standard deviation of R draws is 1 / sqrt(2 R) of it: 1.1 %.
    assert float(twice.resampled.std()) == pytest.approx(expected, rel=0.05)
    apart = seed_scores(resampled_mean, {0: (once.repeat(2),)}, draw)
    assert float(apart.resampled.std()) == pytest.approx(expected / math.sqrt(2), rel=0.05)


def test_groups_of_each_size_and_kind_keep_their_number() -> None:
    groups = torch.tensor([7, 3, 7, 5, 3, 9, 2, 5, 5])
    strata = torch.tensor([0, 0, 0, 1, 0, 1, 0, 1, 1])
    seen: list[Tensor] = []

    def watched(counts: Tensor, values: Tensor) -> Tensor:
        seen.append(counts)
        return counts @ values

    runs: Runs = {0: (torch.ones(9, dtype=torch.float64),)}
    found = seed_scores(watched, runs, RowDraw(9, 60), strata, groups)
    counts = torch.cat(seen[1:])
    assert found.resampled.unique().tolist() == [9.0]
    for rows in ([0, 2], [1, 4], [3, 7, 8]):  # of one group
        assert bool((counts[:, rows] == counts[:, rows[:1]]).all())
    assert set(counts[:, [0, 1]].sum(dim=1).tolist()) == {2.0}  # two pairs are drawn
    for alone in (3, 5, 6):  # the only group of its size and kind
        assert set(counts[:, alone].tolist()) == {1.0}


def test_any_function_of_rows_is_a_statistic() -> None:
    generator = torch.Generator().manual_seed(4)
    runs: Runs = {s: (normals(generator, 30),) for s in range(2)}
    slow = one_by_one(lambda values: float(values.mean()))
    draw = RowDraw(30, 40, 5)
    expected = seed_scores(resampled_mean, runs, draw)
    found = seed_scores(slow, runs, draw)
    torch.testing.assert_close(found.resampled, expected.resampled)
    torch.testing.assert_close(found.observed, expected.observed)


def test_many_rows_are_resampled_block_by_block() -> None:
    """More counts than one block: every block has its own rows, and the spread is that of n."""
    rows = 40_000
    values = (torch.arange(rows) % 2).double()
    found = seed_scores(resampled_mean, {0: (values,)}, RowDraw(rows, 25))
    assert found.resampled.shape == (25, 1)
    assert len(found.resampled.unique()) > 15
    # A sample variance of 25 draws is within five standard errors, 5 sqrt(2 / 24) = 1.45, of it.
    assert float(found.resampled.var()) < 2.45 * 0.25 / rows


# Coverage --------------------------------------------------------------------------------------

SIMULATIONS, RESAMPLES = 300, 400
NOISE = 4 * math.sqrt(0.95 * 0.05 / SIMULATIONS)  # four standard errors of a coverage


def simulated(
    generator: torch.Generator, seeds: int, spread: tuple[float, float, float], mean: float
) -> Runs:
    """A method's values of 150 rows: its mean + a seed's luck + a row's difficulty + noise."""
    of_seed, of_row, of_both = spread
    difficulty = of_row * normals(generator, 150)
    return {
        seed: (
            mean + of_seed * normals(generator, 1) + difficulty + of_both * normals(generator, 150),
        )
        for seed in range(seeds)
    }


def coverage(seeds: int, spread: tuple[float, float, float]) -> tuple[float, float]:
    """How often the truth lies in the interval, and in one that looks at rows alone."""
    generator = torch.Generator().manual_seed(10 * seeds)
    inside = rows_alone = 0
    for k in range(SIMULATIONS):
        first, second = (
            mean_scores(simulated(generator, seeds, spread, mean), RESAMPLES, k)
            for mean in (0.3, 0.0)
        )
        found = paired_difference(first, second)
        inside += found.low <= 0.3 <= found.high
        low, high = np.quantile((first.resampled - second.resampled).mean(dim=1), [0.025, 0.975])
        rows_alone += low <= 0.3 <= high
    return inside / SIMULATIONS, rows_alone / SIMULATIONS


@pytest.mark.parametrize("seeds", [3, 5])
@pytest.mark.parametrize(
    "spread", [(0.2, 0.3, 0.3), (0.1, 1.0, 0.3), (0.0, 1.0, 0.3)], ids=["seeds", "both", "rows"]
)
def test_the_interval_covers_the_truth(seeds: int, spread: tuple[float, float, float]) -> None:
    covered, rows_alone = coverage(seeds, spread)
    assert covered > 0.95 - NOISE
    # Noise of single rows is counted twice: the interval may be too wide, but not by much.
    assert covered < 0.995
    if spread[0] == 0.2:
        assert rows_alone < 0.6  # what a bootstrap over rows makes of training noise


def calibration_runs(
    generator: torch.Generator, logit: Tensor, right: Tensor, sharpness: float
) -> Runs:
    """Three runs that state sigmoid(sharpness * logit), nearly; 1 is calibrated."""
    runs: Runs = {}
    for seed in range(3):
        heat = sharpness * float((0.03 * normals(generator, 1)).exp())
        prob = torch.sigmoid(heat * logit + 0.1 * normals(generator, len(logit)))
        runs[seed] = (torch.maximum(prob, 1 - prob), (prob > 0.5) == right)
    return runs


def test_a_difference_in_ece_is_not_claimed_where_there_is_none() -> None:
    """Two calibrated methods differ in their noise only; a miscalibrated one is found out."""
    generator = torch.Generator().manual_seed(20)
    claimed = found_out = 0
    simulations = 120
    for k in range(simulations):
        logit = 1.5 * normals(generator, 300)
        right = torch.rand(300, generator=generator, dtype=torch.float64) < torch.sigmoid(logit)
        first, second, wild = (
            seed_scores(
                resampled_ece,
                calibration_runs(generator, logit, right, sharpness),
                RowDraw(300, RESAMPLES, k),
            )
            for sharpness in (1.0, 1.0, 2.5)
        )
        claimed += paired_difference(first, second).p_value < 0.05
        worse = paired_difference(wild, first)
        found_out += worse.p_value < 0.05 and worse.value > 0
    assert claimed / simulations < 0.05 + 4 * math.sqrt(0.05 * 0.95 / simulations)
    assert found_out / simulations > 0.7


def test_two_thousand_resamples_take_about_a_second() -> None:
    generator = torch.Generator().manual_seed(5)
    runs: Runs = {
        s: (torch.rand(1000, generator=generator), torch.rand(1000, generator=generator) < 0.7)
        for s in range(5)
    }
    started = time.process_time()
    for statistic in (resampled_ece, resampled_auroc):
        scores = seed_scores(statistic, runs, RowDraw(1000))
        paired_difference(scores, scores)
    assert time.process_time() - started < 10  # 0.2 s on one idle core


# Swaps -----------------------------------------------------------------------------------------


def test_swapping_rows_is_the_exact_sign_flip_test() -> None:
    generator = torch.Generator().manual_seed(6)
    first: Runs = {s: (normals(generator, 11) + 0.6,) for s in range(2)}
    second: Runs = {s: (normals(generator, 11),) for s in range(2)}
    rows = [
        np.mean([values.numpy() for (values,) in runs.values()], axis=0) for runs in (first, second)
    ]
    exact = stats.permutation_test(
        rows,
        lambda a, b, axis: np.mean(a - b, axis=axis),
        permutation_type="samples",
        n_resamples=10_000,
    )
    draws = 20_000
    found = swap_p_value(resampled_mean, first, second, RowDraw(11, draws))
    p = float(exact.pvalue)
    assert found == pytest.approx(p, abs=5 * math.sqrt(p * (1 - p) / draws) + 1 / draws)


def test_swaps_take_any_statistic() -> None:
    right = torch.tensor([True, False] * 30)
    good: Runs = {0: (right.double() + 0.4 * torch.arange(60) / 60, right)}
    bad: Runs = {0: (torch.arange(60) / 60, right)}
    assert swap_p_value(resampled_auroc, good, bad, RowDraw(60, 199)) == 1 / 200
    assert swap_p_value(resampled_auroc, good, good, RowDraw(60, 199)) == 1.0
    undefined: Runs = {0: (torch.arange(60) / 60, torch.ones(60, dtype=torch.bool))}
    assert math.isnan(swap_p_value(resampled_auroc, undefined, undefined, RowDraw(60, 9)))
    with pytest.raises(ValueError, match="share their seeds"):
        swap_p_value(resampled_auroc, good, {1: bad[0]}, RowDraw(60, 9))


# Several methods -------------------------------------------------------------------------------


def test_holm_is_the_closed_bonferroni_test() -> None:
    """A hypothesis is rejected when every set that holds it is, by Bonferroni."""
    p_values = [0.011, 0.02, 0.022, 0.09, 0.01, 0.7]
    expected = [
        max(
            min(1.0, size * min(p_values[j] for j in chosen))
            for size in range(1, len(p_values) + 1)
            for chosen in combinations(range(len(p_values)), size)
            if i in chosen
        )
        for i in range(len(p_values))
    ]
    assert holm(p_values) == pytest.approx(expected)
    assert holm([math.nan, 0.01]) == pytest.approx((1.0, 0.02))
    assert holm([]) == ()


def test_best_and_second_need_to_beat_all_that_follow() -> None:
    a, b, c = constant([0.1, 0.11, 0.12]), constant([0.2, 0.21, 0.22]), constant([0.3, 0.31, 0.32])
    found = standing({"c": c, "a": a, "b": b}, higher_is_better=False)
    assert (found.order, found.best, found.second) == (("a", "b", "c"), ("a",), ("b",))
    assert found.p_best == pytest.approx(2 * 2 / 2001)  # two claims
    turned = standing({"c": c, "a": a, "b": b}, higher_is_better=True)
    assert (turned.order, turned.best, turned.second) == (("c", "b", "a"), ("c",), ("b",))
    # The first beats the second, but not the third, whose seeds are all over the place.
    wild = constant([0.0, 0.4, 0.8])
    found = standing({"a": a, "b": b, "wild": wild}, higher_is_better=False)
    assert (found.order, found.best, found.second) == (("a", "b", "wild"), (), ())


def test_equal_methods_share_their_place() -> None:
    """As a method and its tempered answers do, whose accuracy is the same."""
    a, b, c = (constant([v, v + 0.01, v - 0.01]) for v in (0.3, 0.5, 0.9))
    twin = constant([0.3, 0.31, 0.29])
    found = standing({"c": c, "a": a, "b": b, "twin": twin}, higher_is_better=False)
    assert (found.order, found.best, found.second) == (
        ("a", "twin", "b", "c"),
        ("a", "twin"),
        ("b",),
    )
    last = standing({"a": a, "b": b, "c": c, "b2": b}, higher_is_better=False)
    assert (last.best, last.second) == (("a",), ("b", "b2"))
    alike = standing({"a": a, "twin": twin}, higher_is_better=False)
    assert (alike.best, alike.second) == ((), ())
    other = SeedScores((4, 5, 6), a.observed, a.resampled, a.draw)  # not the same seeds
    assert standing({"a": a, "other": other}, higher_is_better=False).best == ()


def test_two_methods_have_a_best_and_no_second_and_one_has_neither() -> None:
    a, b = constant([0.1, 0.11, 0.12]), constant([0.2, 0.21, 0.22])
    two = standing({"a": a, "b": b}, higher_is_better=False)
    assert (two.best, two.second) == (("a",), ())
    assert math.isnan(two.p_second)
    one = standing({"a": a}, higher_is_better=False)
    assert (one.order, one.best, one.second) == (("a",), (), ())
    assert math.isnan(one.p_best)


def test_few_seeds_or_none_in_common_support_nothing() -> None:
    a, b = constant([0.1, 0.11]), constant([0.9, 0.91])
    assert standing({"a": a, "b": b}, higher_is_better=False).best == ()
    c = constant([0.1, 0.11, 0.12])
    d = SeedScores((7, 8, 9), c.observed + 1, c.resampled + 1, c.draw)
    assert standing({"c": c, "d": d}, higher_is_better=False).best == ()


def test_the_order_over_common_seeds_decides() -> None:
    """Over all its seeds a leads; over the seeds that both have it is beaten: no claim."""
    a = constant([0.5, 0.5, 0.5, 0.0, 0.0, 0.0, 0.0])
    b = constant([0.4, 0.4, 0.4])
    found = standing({"a": a, "b": b}, higher_is_better=False)
    assert (found.order[0], found.best, found.p_best) == ("a", (), 1.0)


def test_an_undefined_method_is_left_out() -> None:
    a, b = constant([0.1, 0.11, 0.12]), constant([0.2, 0.21, 0.22])
    undefined = constant([math.nan] * 3)
    found = standing({"a": a, "n": undefined, "b": b}, higher_is_better=False)
    assert (found.order, found.best) == (("a", "b"), ("a",))


@pytest.mark.parametrize("methods", [2, 4])
def test_equal_methods_are_seldom_told_apart(methods: int) -> None:
    generator = torch.Generator().manual_seed(30 + methods)
    claimed, simulations = 0, 150
    for k in range(simulations):
        columns = {
            str(m): mean_scores(simulated(generator, 4, (0.1, 0.5, 0.3), 0.0), RESAMPLES, k)
            for m in range(methods)
        }
        found = standing(columns, higher_is_better=True)
        claimed += bool(found.best or found.second)
    assert claimed / simulations < 0.05 + 4 * math.sqrt(0.05 * 0.95 / simulations)


# Refusals --------------------------------------------------------------------------------------


def test_what_cannot_be_compared_is_refused() -> None:
    a, b = constant([0.1, 0.2]), mean_scores({0: (torch.ones(4),)}, seed=1)
    with pytest.raises(ValueError, match="share their rows"):
        paired_difference(a, b)
    with pytest.raises(ConfigError, match="num_resamples must be at least 2, got 1"):
        mean_scores({0: (torch.ones(4),)}, resamples=1)
    for runs in ({}, {0: (torch.ones(4), torch.ones(5))}, {0: (torch.ones(3),)}):
        with pytest.raises(ValueError, match="same 4 > 0 rows"):
            seed_scores(resampled_mean, runs, RowDraw(4))
    with pytest.raises(ValueError, match="same 0 > 0 rows"):
        seed_scores(resampled_mean, {0: (torch.ones(0),)}, RowDraw(0))
