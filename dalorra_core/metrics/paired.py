"""Is one method better than another? Differences over the same rows and the same seeds.

Two things are random in a comparison: which rows the test set holds, and how training went with
each seed. S is the number of seeds, n of rows, R of resamples. A method's score is the mean over
its seeds of the score on all rows. Rows and seeds are paired: both methods answered the same rows,
and runs of one seed saw the data in the same order.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from scipy.special import stdtrit
from torch import Tensor

from dalorra_core.errors import ConfigError
from dalorra_core.metrics.resampled import Statistic

__all__ = [
    "MIN_SEEDS",
    "PairedDifference",
    "RowDraw",
    "SeedScores",
    "Standing",
    "holm",
    "paired_difference",
    "seed_scores",
    "standing",
    "swap_p_value",
]

MIN_SEEDS = 3
"""With fewer seeds nothing is said about a method, only about the runs at hand."""

_LEVEL = 0.95
_MIN_RESAMPLES = 2
# Numbers in one block of counts, 0.8 MB: what fits the cache is five times as fast as 16 MB.
_BLOCK = 100_000


@dataclass(frozen=True)
class RowDraw:
    """Which resamples of the rows: equal draws of equally many rows are the same rows.

    Attributes:
        num_rows: n.
        num_resamples: R, at least 2; a 95 % interval and small p-values want 2000.
        seed: Of the draws.
    """

    num_rows: int
    num_resamples: int = 2000
    seed: int = 0


@dataclass(frozen=True, eq=False)
class SeedScores:
    """The scores of one method's runs, on all rows and on resampled rows.

    Attributes:
        seeds: The training seeds, S of them, at least one.
        observed: Score of each run on all rows, shape (S,).
        resampled: The same on R resamples of the rows, shape (R, S).
        draw: Which resamples those are.
    """

    seeds: tuple[int, ...]
    observed: Float[Tensor, " S"]
    resampled: Float[Tensor, "R S"]
    draw: RowDraw


@dataclass(frozen=True)
class PairedDifference:
    """First method minus second, in the unit of the score.

    Attributes:
        value: Mean over seeds of the difference of the scores on all rows.
        low: Lower end of the 95 % interval.
        high: Upper end.
        p_value: Two-sided, from the same draws as the interval: below 0.05 exactly when 0 lies
            outside of it (but for one draw). At least 2 / (R + 1).
        seed_std: Sample standard deviation over seeds of the difference; NaN for one seed.
        num_seeds: Seeds that both methods have.
        num_rows: n.
    """

    value: float
    low: float
    high: float
    p_value: float
    seed_std: float
    num_seeds: int
    num_rows: int

    @property
    def trusted(self) -> bool:
        """Whether there are enough seeds, and the numbers are defined, to speak of methods.

        With one seed the interval holds no training noise at all and is too narrow. With two it
        rests on the normal assumption alone: a t quantile with one degree of freedom.
        """
        return self.num_seeds >= MIN_SEEDS and not math.isnan(self.p_value)


@dataclass(frozen=True)
class Standing:
    """Which method is best and which second, as far as the numbers support it.

    Attributes:
        order: Methods with a defined score, best mean first.
        best: The first and those equal to it, if they beat every other; else none.
        second: The next and those equal to it, if they beat every one after them; else none, also
            where none is after them.
        p_best: Holm-adjusted p-value of the first claim; NaN where there is no such claim.
        p_second: The same of the second claim.
    """

    order: tuple[str, ...]
    best: tuple[str, ...]
    second: tuple[str, ...]
    p_best: float
    p_second: float


def seed_scores(
    statistic: Statistic,
    runs: Mapping[int, Sequence[Tensor]],
    draw: RowDraw,
    strata: Int[Tensor, " n"] | None = None,
    groups: Int[Tensor, " n"] | None = None,
) -> SeedScores:
    """Return the scores of one method's runs on all rows and on resampled rows.

    Args:
        statistic: See ``dalorra_core.metrics.resampled``; ``one_by_one`` makes any function one.
        runs: Seed to that run's arrays, each with the n rows along its first axis, in one order.
        draw: Which resamples; give the same to methods that are to be compared.
        strata: Kind of each row, shape (n,), at least 0: as many rows of each kind are drawn as
            there are, for test sets that were put together of known parts. None: one kind.
        groups: Number of each row's group, shape (n,): repeats of one question are drawn together,
            since they are one piece of evidence. As many groups of each size are drawn as there
            are, so that every resample has n rows. None: every row is a group.

    Returns:
        The scores; NaN where the statistic is undefined.

    Raises:
        ConfigError: If fewer than 2 resamples are asked for.
        ValueError: If there are no runs, no rows, or an array has not n rows.
    """
    if draw.num_resamples < _MIN_RESAMPLES:
        raise ConfigError(
            f"num_resamples must be at least {_MIN_RESAMPLES}, got {draw.num_resamples}"
        )
    _check_rows(runs, draw.num_rows)
    whole = torch.ones(1, draw.num_rows, dtype=torch.float64)
    observed = torch.cat([statistic(whole, *arrays) for arrays in runs.values()])  # (S,)
    generator = torch.Generator().manual_seed(draw.seed)
    kinds = _kinds(draw.num_rows, strata, groups)
    blocks: list[Tensor] = []
    for size in _blocks(draw.num_resamples, draw.num_rows):
        counts = _row_counts(size, draw.num_rows, kinds, generator)  # (size, n)
        scores = [statistic(counts, *arrays) for arrays in runs.values()]
        blocks.append(torch.stack(scores, dim=1))  # (size, S)
    return SeedScores(tuple(runs), observed, torch.cat(blocks), draw)


def paired_difference(first: SeedScores, second: SeedScores) -> PairedDifference:
    """Return the difference of two methods with a 95 % interval over rows and seeds.

    Rows are resampled, the same ones for all runs of both methods. To the deviation that this
    gives, each resample adds one of the seeds: s / sqrt(S) times a quantile of Student's t with
    S - 1 degrees of freedom, s being the standard deviation over seeds of the paired difference.
    Drawing seeds with replacement instead would take S = 3 for ten possible samples, with 2/3 of
    the variance and no allowance for s being an estimate. Noise of single rows within a run is in
    both parts, which makes the interval a little too wide, by a factor of sqrt(2) at most.

    Assumes: rows are exchangeable; seeds are independent, and the runs' differences near
    enough to normal for t. The interval is reflected (value + value - quantile): a resample's
    ECE is biased upwards, and this takes out a part of the bias instead of doubling it. For an ECE
    the level stays approximate all the same, since noise raises a small ECE more than a large one:
    in simulations 1 to 10 % of p-values of equally calibrated methods lay below 0.05, and the
    interval around two methods' true difference held it in 76 to 98 %.

    Args:
        first: Of ``seed_scores``.
        second: The same draw; seeds that only one of the two has are left out.

    Returns:
        The difference; interval and p-value are NaN where a score is undefined.

    Raises:
        ValueError: If the draws differ or no seed is common.

    Source:
        Davison and Hinkley 1997, Bootstrap methods and their application, section 5.2 (reflected
        interval); the sum of the two deviations follows Behrens and Fisher.
    """
    if first.draw != second.draw:
        raise ValueError(f"methods must share their rows, got {first.draw} and {second.draw}")
    common = [seed for seed in first.seeds if seed in second.seeds]
    if not common:
        raise ValueError(f"methods share no seed: {first.seeds} and {second.seeds}")
    mine, theirs = (
        torch.tensor([scores.seeds.index(seed) for seed in common]) for scores in (first, second)
    )
    per_seed = first.observed[mine] - second.observed[theirs]  # (S,)
    by_rows = (first.resampled[:, mine] - second.resampled[:, theirs]).mean(dim=1)  # (R,)
    value, num_seeds = float(per_seed.mean()), len(common)
    spread = float(per_seed.std()) if num_seeds > 1 else math.nan
    deviation = by_rows - value  # (R,)
    if num_seeds > 1:
        deviation += spread / math.sqrt(num_seeds) * _t_draws(num_seeds - 1, first.draw)
    low, high, p_value = _reflected(value, deviation)
    return PairedDifference(value, low, high, p_value, spread, num_seeds, first.draw.num_rows)


def swap_p_value(
    statistic: Statistic,
    first: Mapping[int, Sequence[Tensor]],
    second: Mapping[int, Sequence[Tensor]],
    draw: RowDraw,
) -> float:
    """Return the permutation p-value of swapping the two methods' answers row by row.

    Asks of the runs at hand, not of the methods: would answers this different come about if each
    row's two sets of answers (all seeds together) were dealt to the methods by a coin? For a mean
    this is the sign-flip test of the rows' mean differences. It knows nothing of training noise;
    flipping the signs of whole seeds instead cannot give less than 2 / 2^S.

    Args:
        statistic: As for ``seed_scores``; scores of the two methods must be on one scale.
        first: Seed to that run's arrays.
        second: The same seeds.
        draw: Number of rows, of swaps, and their seed.

    Returns:
        Two-sided p-value, at least 1 / (R + 1); NaN where the observed difference is undefined. A
        swap with an undefined difference counts as extreme.

    Raises:
        ValueError: If the seeds differ, or an array has not n rows.
    """
    if set(first) != set(second):
        raise ValueError(f"methods must share their seeds, got {[*first]} and {[*second]}")
    _check_rows(first, draw.num_rows)
    _check_rows(second, draw.num_rows)
    both = [
        [torch.cat(pair) for pair in zip(arrays, second[seed], strict=True)]
        for seed, arrays in first.items()
    ]

    def difference(swapped: Float[Tensor, "R n"]) -> Float[Tensor, " R"]:
        mine = torch.cat([1 - swapped, swapped], dim=1)  # (R, 2n)
        found = [statistic(mine, *a) - statistic(1 - mine, *a) for a in both]
        return torch.stack(found).mean(dim=0)

    observed = float(difference(torch.zeros(1, draw.num_rows, dtype=torch.float64)))
    if math.isnan(observed):
        return math.nan
    # Two ways to add the same numbers may differ in the last bits; a tie is as extreme.
    least = abs(observed) * (1 - 1e-9)
    generator = torch.Generator().manual_seed(draw.seed)
    extreme = 1
    for size in _blocks(draw.num_resamples, 2 * draw.num_rows):
        coins = torch.randint(2, (size, draw.num_rows), generator=generator).double()
        extreme += int((~(difference(coins).abs() < least)).sum())
    return extreme / (draw.num_resamples + 1)


def holm(p_values: Sequence[float]) -> tuple[float, ...]:
    """Return p-values adjusted for their number: each at most alpha controls the family at alpha.

    Args:
        p_values: In [0, 1]; NaN, no evidence, counts as 1.

    Returns:
        Adjusted p-values in the same order, each at most 1.

    Source:
        Holm 1979, A simple sequentially rejective multiple test procedure.

    Example:
        >>> holm([0.01, 0.5, 0.02])
        (0.03, 0.5, 0.04)
    """
    clean = [1.0 if math.isnan(p) else p for p in p_values]
    order = sorted(range(len(clean)), key=clean.__getitem__)
    adjusted = [1.0] * len(clean)
    so_far = 0.0
    for rank, index in enumerate(order):
        so_far = min(1.0, max(so_far, (len(clean) - rank) * clean[index]))
        adjusted[index] = so_far
    return tuple(adjusted)


def standing(
    methods: Mapping[str, SeedScores], *, higher_is_better: bool, significance: float = 0.05
) -> Standing:
    """Return which of several methods is best and second best where the paired test supports it.

    The claims of a column are two: the first beats every other one, the second beats every one
    after it. A claim holds only if each of its comparisons does, so its p-value is the largest of
    theirs, which also covers that the first was chosen by looking. Holm's correction is over the
    claims. A comparison with fewer than ``MIN_SEEDS`` common seeds supports nothing.

    Methods whose scores are the same number on all rows and on every resample (the accuracy of a
    method and of its tempered answers, say) are one method here: they share a place.

    Args:
        methods: Name to scores, all of one draw.
        higher_is_better: Direction of the score.
        significance: Bound on the chance of any wrong claim in the column, in (0, 1).

    Returns:
        The standing. Methods with an undefined mean are left out.
    """
    means = {name: float(scores.observed.mean()) for name, scores in methods.items()}
    sign = -1.0 if higher_is_better else 1.0
    order = sorted(
        (name for name, mean in means.items() if not math.isnan(mean)),
        key=lambda name: sign * means[name],
    )
    places = _places(order, methods)
    claims = [
        max(
            _p_beats(methods[name], methods[other], sign)
            for name in places[k]
            for after in places[k + 1 :]
            for other in after
        )
        for k in range(min(2, len(places) - 1))
    ]
    p_best, p_second = (*holm(claims), math.nan, math.nan)[:2]
    return Standing(
        order=tuple(order),
        best=places[0] if p_best < significance else (),
        second=places[1] if p_second < significance else (),
        p_best=p_best,
        p_second=p_second,
    )


def _places(order: Sequence[str], methods: Mapping[str, SeedScores]) -> list[tuple[str, ...]]:
    """Return the methods in their order, equal ones together."""
    places: list[tuple[str, ...]] = []
    for name in order:
        k = next((k for k, of in enumerate(places) if _equal(methods[of[0]], methods[name])), None)
        if k is None:
            places.append((name,))
        else:
            places[k] = (*places[k], name)
    return places


def _equal(one: SeedScores, other: SeedScores) -> bool:
    return (
        one.seeds == other.seeds
        and torch.equal(one.observed, other.observed)
        and torch.equal(one.resampled, other.resampled)
    )


def _p_beats(better: SeedScores, worse: SeedScores, sign: float) -> float:
    """Return the p-value that ``better`` is better; 1 where nothing can be said."""
    if not set(better.seeds) & set(worse.seeds):
        return 1.0
    found = paired_difference(better, worse)
    # Over the common seeds alone the order may be another than over all seeds.
    return found.p_value if found.trusted and sign * found.value < 0 else 1.0


def _reflected(value: float, deviation: Float[Tensor, " R"]) -> tuple[float, float, float]:
    """Return interval and two-sided p-value of a value whose error is like ``deviation``."""
    if bool(deviation.isnan().any()):
        return math.nan, math.nan, math.nan
    tails = torch.tensor([(1 + _LEVEL) / 2, (1 - _LEVEL) / 2], dtype=torch.float64)
    low, high = (value - deviation.quantile(tails)).tolist()
    tail = min(int((deviation >= value).sum()), int((deviation <= value).sum()))
    return low, high, min(1.0, 2 * (tail + 1) / (len(deviation) + 1))


def _t_draws(freedom: int, draw: RowDraw) -> Float[Tensor, " R"]:
    """Return R evenly spaced quantiles of Student's t in random order: no noise in the tails."""
    generator = torch.Generator().manual_seed(draw.seed)
    place = torch.randperm(draw.num_resamples, generator=generator).double() + 0.5
    return torch.from_numpy(stdtrit(freedom, (place / draw.num_resamples).numpy()))


def _kinds(
    num_rows: int, strata: Int[Tensor, " n"] | None, groups: Int[Tensor, " n"] | None
) -> list[Tensor]:
    """Return the rows of the groups of each kind: (groups, size) of one stratum and one size."""
    own = torch.arange(num_rows) if groups is None else groups
    kinds = torch.zeros(num_rows, dtype=torch.int64) if strata is None else strata
    found: list[Tensor] = []
    for kind in kinds.unique(sorted=True):
        rows = (kinds == kind).nonzero().squeeze(1)
        _, place, sizes = own[rows].unique(return_inverse=True, return_counts=True)
        for size in sizes.unique(sorted=True):
            chosen = sizes[place] == size
            together = place[chosen].argsort(stable=True)  # rows of a group side by side
            found.append(rows[chosen][together].view(-1, int(size)))
    return found


def _row_counts(
    size: int,
    num_rows: int,
    kinds: Sequence[Tensor],
    generator: torch.Generator,
) -> Float[Tensor, "size n"]:
    """Return how often each row is drawn in each resample, its group with replacement."""
    counts = torch.zeros(size, num_rows, dtype=torch.float64)
    for groups in kinds:
        number = len(groups)
        drawn = groups[torch.randint(number, (size, number), generator=generator)].flatten(1)
        counts.scatter_add_(1, drawn, torch.ones_like(drawn, dtype=torch.float64))
    return counts


def _blocks(num_resamples: int, num_rows: int) -> list[int]:
    """Return sizes that add up to R and keep a block of counts within bounds."""
    size = max(1, _BLOCK // num_rows)
    whole, rest = divmod(num_resamples, size)
    return [size] * whole + ([rest] if rest else [])


def _check_rows(runs: Mapping[int, Sequence[Tensor]], num_rows: int) -> None:
    lengths = {len(array) for arrays in runs.values() for array in arrays}
    if lengths != {num_rows} or num_rows == 0:
        raise ValueError(f"every run must have the same {num_rows} > 0 rows, got {sorted(lengths)}")
