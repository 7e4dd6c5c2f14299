"""Which numbers of an evaluation each metric is made of, so that methods can be compared by it."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dalorra_core.errors import ConfigError
from dalorra_core.metrics.calibration import adaptive_ece, classwise_ece, ece
from dalorra_core.metrics.paired import RowDraw, SeedScores, seed_scores
from dalorra_core.metrics.resampled import (
    Statistic,
    resampled_adaptive_ece,
    resampled_augrc,
    resampled_aurc,
    resampled_auroc,
    resampled_classwise_ece,
    resampled_ece,
    resampled_mean,
)

__all__ = [
    "METRICS",
    "Metric",
    "ScoredRows",
    "detection_scores",
    "metric_scores",
    "noise_floors",
    "possible_labels",
    "with_outside",
]


@dataclass(frozen=True, eq=False)
class ScoredRows:
    """One run's answers to n rows.

    Attributes:
        labels: True labels, shape (n,); -1 for a row out of scope or of another distribution.
        log_mean_probs: Log of the mixture, shape (n, C), nats.
        scores: Tensors of ``UncertaintySummary`` by name, each (n,); those that are missing make
            their ``auroc_*`` unavailable.
        ids: The rows' names, n of them, to see that two runs answered the same rows.
        groups: Number of each row's group, shape (n,): rows with the same content have the same,
            and are resampled together. None: all rows are different.
    """

    labels: Int[Tensor, " n"]
    log_mean_probs: Float[Tensor, "n C"]
    scores: Mapping[str, Float[Tensor, " n"]]
    ids: tuple[str, ...]
    groups: Int[Tensor, " n"] | None = None


_Arrays = Callable[[ScoredRows], tuple[Tensor, ...]]


@dataclass(frozen=True)
class Metric:
    """How a metric is computed from scored rows.

    Attributes:
        higher_is_better: Its direction.
        statistic: Of resampled rows.
        arrays: The statistic's arrays, from the rows that it is about.
        detects_outside: Whether it is about all rows, in scope or not; else the rows in scope.
    """

    higher_is_better: bool
    statistic: Statistic
    arrays: _Arrays
    detects_outside: bool = False


def detection_scores(scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return every score that can flag a row as wrong or out of scope, higher = more likely so.

    Args:
        scores: Tensors of ``UncertaintySummary`` by name; those that are not there are left out.
    """
    return {name: sign * scores[name] for name, sign in _DOUBT.items() if name in scores}


def possible_labels(
    probs: Float[Tensor, "n C"], labels: Int[Tensor, " n"]
) -> tuple[Float[Tensor, "n K"], Int[Tensor, " n"]]:
    """Return probabilities of the labels that some row of a set may have, and labels among them.

    A label that is no choice of any row (one in reserve, or of another part of a combined task)
    has probability 0 everywhere and would make a mean over labels smaller without being right.

    Args:
        probs: Mixture probabilities, shape (n, C).
        labels: True label indices, shape (n,); -1 stays -1.
    """
    inside = labels >= 0
    possible = (probs[inside] > 0).any(dim=0)
    possible[labels[inside]] = True
    place = possible.long().cumsum(dim=0) - 1
    return probs[:, possible], torch.where(inside, place[labels.clamp(min=0)], labels)


def noise_floors(rows: ScoredRows, *, num_draws: int = 100, seed: int = 0) -> dict[str, float]:
    """Return what each calibration error would be if all these probabilities were true.

    Draws the label of each row from its own probabilities, again and again: what remains is noise.

    Args:
        rows: One run's answers; rows out of scope do not count.
        num_draws: Simulated test sets, at least 1.
        seed: Of the draws.

    Returns:
        Mean ``ece``, ``adaptive_ece`` and ``classwise_ece``, fractions; empty if no row is in
        scope.
    """
    inside = rows.labels >= 0
    if not bool(inside.any()):
        return {}
    probs, _ = possible_labels(_probs(rows)[inside], rows.labels[inside])
    edges = probs.cumsum(dim=1)  # (n, K)
    generator = torch.Generator().manual_seed(seed)
    sums = dict.fromkeys(_ERRORS, 0.0)
    for _ in range(num_draws):
        drawn = torch.rand(len(edges), 1, generator=generator, dtype=torch.float64) * edges[:, -1:]
        labels = torch.searchsorted(edges, drawn, right=True).squeeze(1)
        labels = labels.clamp(max=probs.shape[1] - 1)  # where a draw was rounded up to the end
        for name, error in _ERRORS.items():
            sums[name] += error(probs, labels)
    return {name: total / num_draws for name, total in sums.items()}


def with_outside(inside: ScoredRows, outside: ScoredRows) -> ScoredRows:
    """Return the rows of two test sets, the second one's labelled -1: out of distribution.

    Args:
        inside: One run's answers to rows of its own task.
        outside: The same run's answers to rows of another; their probabilities become NaN.

    Returns:
        All rows, with the scores that both have.
    """
    unknown = inside.log_mean_probs.new_full(
        (len(outside.labels), inside.log_mean_probs.shape[1]), math.nan
    )
    return ScoredRows(
        labels=torch.cat([inside.labels, torch.full_like(outside.labels, -1)]),
        log_mean_probs=torch.cat([inside.log_mean_probs, unknown]),
        scores={
            name: torch.cat([values, outside.scores[name]])
            for name, values in inside.scores.items()
            if name in outside.scores
        },
        ids=inside.ids + outside.ids,
        groups=torch.cat([_groups(inside), _groups(outside) + len(inside.ids)]),
    )


def _groups(rows: ScoredRows) -> Int[Tensor, " n"]:
    return torch.arange(len(rows.labels)) if rows.groups is None else rows.groups


def metric_scores(
    name: str, runs: Mapping[int, ScoredRows], *, num_resamples: int = 2000, seed: int = 0
) -> SeedScores:
    """Return one method's scores by a metric, ready for ``paired_difference`` and ``standing``.

    Args:
        name: A key of ``METRICS``.
        runs: Training seed to the run's answers, all to the same rows in the same order.
        num_resamples: R, at least 2.
        seed: Of the resamples; the same for methods that are to be compared.

    Returns:
        The scores. For ``auroc_oos_*`` rows of either kind are resampled apart. Rows of the first
        run's groups are resampled together.

    Raises:
        ConfigError: If there is no such metric, or a run has not the scores it needs.
        ValueError: If there are no runs or no rows for it, or runs differ in their rows.
    """
    if name not in METRICS:
        raise ConfigError(f"metric must be one of {', '.join(METRICS)}, got {name!r}")
    metric = METRICS[name]
    reference = next(iter(runs.values()), None)
    if reference is None:
        raise ValueError(f"{name} needs at least one run, got none")
    for run in runs.values():
        if run.ids != reference.ids or not torch.equal(run.labels, reference.labels):
            raise ValueError(f"{name} needs runs that answered the same rows in the same order")
    inside = reference.labels >= 0
    chosen = torch.ones_like(inside) if metric.detects_outside else inside
    arrays = {s: tuple(a[chosen] for a in metric.arrays(run)) for s, run in runs.items()}
    draw = RowDraw(int(chosen.sum()), num_resamples, seed)
    strata = inside.long() if metric.detects_outside else None
    return seed_scores(metric.statistic, arrays, draw, strata, _groups(reference)[chosen])


_ERRORS: Mapping[str, Callable[[Tensor, Tensor], float]] = MappingProxyType(
    {"ece": ece, "adaptive_ece": adaptive_ece, "classwise_ece": classwise_ece}
)

# Sign that makes each score of `UncertaintySummary` rise with doubt.
_DOUBT = MappingProxyType(
    {
        "confidence": -1.0,
        "predictive_entropy": 1.0,
        "mutual_information": 1.0,
        "expected_entropy": 1.0,
        "variation_ratio": 1.0,
        "confidence_std": 1.0,
    }
)


def _probs(rows: ScoredRows) -> Float[Tensor, "n C"]:
    return rows.log_mean_probs.double().exp()


def _correct(rows: ScoredRows) -> tuple[Tensor, ...]:
    return (rows.log_mean_probs.argmax(dim=-1) == rows.labels,)


def _confidence_and_correct(rows: ScoredRows) -> tuple[Tensor, ...]:
    return (_probs(rows).amax(dim=-1), *_correct(rows))


def _row_nll(rows: ScoredRows) -> tuple[Tensor, ...]:
    truth = rows.labels.clamp(min=0).unsqueeze(1)  # (n, 1); rows out of scope are not looked at
    return (-rows.log_mean_probs.double().gather(1, truth).squeeze(1),)


def _row_brier(rows: ScoredRows) -> tuple[Tensor, ...]:
    hit = torch.arange(rows.log_mean_probs.shape[1]) == rows.labels.unsqueeze(1)  # (n, C)
    return ((_probs(rows) - hit.double()).square().sum(dim=-1),)


def _possible(rows: ScoredRows) -> tuple[Tensor, ...]:
    return possible_labels(_probs(rows), rows.labels)


def _doubt(rows: ScoredRows, name: str) -> Float[Tensor, " n"]:
    if name not in rows.scores:
        raise ConfigError(f"runs have no score {name}, only {', '.join(rows.scores)}")
    return _DOUBT[name] * rows.scores[name].double()


def _better_high(statistic: Statistic, arrays: _Arrays) -> Metric:
    return Metric(higher_is_better=True, statistic=statistic, arrays=arrays)


def _better_low(statistic: Statistic, arrays: _Arrays) -> Metric:
    return Metric(higher_is_better=False, statistic=statistic, arrays=arrays)


def _finds_errors(name: str) -> Metric:
    return _better_high(resampled_auroc, lambda rows: (_doubt(rows, name), ~_correct(rows)[0]))


def _finds_outside(name: str) -> Metric:
    def arrays(rows: ScoredRows) -> tuple[Tensor, ...]:
        return _doubt(rows, name), rows.labels < 0

    return replace(_better_high(resampled_auroc, arrays), detects_outside=True)


METRICS: Mapping[str, Metric] = MappingProxyType(
    {
        "accuracy": _better_high(resampled_mean, _correct),
        "nll": _better_low(resampled_mean, _row_nll),
        "ece": _better_low(resampled_ece, _confidence_and_correct),
        "adaptive_ece": _better_low(resampled_adaptive_ece, _confidence_and_correct),
        "classwise_ece": _better_low(resampled_classwise_ece, _possible),
        "brier": _better_low(resampled_mean, _row_brier),
        "aurc": _better_low(resampled_aurc, _confidence_and_correct),
        "augrc": _better_low(resampled_augrc, _confidence_and_correct),
        **{f"auroc_error_{name}": _finds_errors(name) for name in _DOUBT},
        **{f"auroc_oos_{name}": _finds_outside(name) for name in _DOUBT},
    }
)
"""Metrics by the names that ``evaluate`` reports them under."""
