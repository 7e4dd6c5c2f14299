"""Metrics by name: the same numbers as the evaluation report's, and what they refuse."""

import math
from dataclasses import fields, replace

import pytest
import torch
from torch import Tensor

from dalorra_core.errors import ConfigError
from dalorra_core.metrics.calibration import classwise_ece, ece_noise_floor
from dalorra_core.metrics.scored import (
    METRICS,
    ScoredRows,
    metric_scores,
    noise_floors,
    possible_labels,
    with_outside,
)
from dalorra_core.metrics.uncertainty import log_mean_probs, summarise
from dalorra_core.training.evaluation import evaluate

ROWS = 80


def scored(seed: int, rows: int = ROWS, *, out_of_scope: bool = True) -> tuple[Tensor, ScoredRows]:
    generator = torch.Generator().manual_seed(seed)
    log_probs = (2 * torch.randn(3, rows, 4, generator=generator)).log_softmax(-1)
    labels = torch.randint(4, (rows,), generator=torch.Generator().manual_seed(0))
    if out_of_scope:
        labels[::5] = -1
    summary = summarise(log_probs)
    values = {f.name: getattr(summary, f.name) for f in fields(summary)}
    scores = {n: v for n, v in values.items() if n not in ("mean_probs", "predicted")}
    ids = tuple(f"row-{i}" for i in range(rows))
    return log_probs, ScoredRows(labels, log_mean_probs(log_probs), scores, ids)


def test_every_metric_of_the_report_is_here_with_its_value() -> None:
    log_probs, rows = scored(1)
    report = evaluate(log_probs, rows.labels)
    assert set(METRICS) == set(report.metrics)
    for name, estimate in report.metrics.items():
        found = metric_scores(name, {4: rows}, num_resamples=2)
        assert found.observed.tolist() == pytest.approx([estimate.value], rel=1e-12), name
        assert found.seeds == (4,)


def test_intervals_over_rows_are_those_of_the_report() -> None:
    """Quantiles over resamples of one run, from other draws of the rows than the report's."""
    log_probs, rows = scored(2)
    report = evaluate(log_probs, rows.labels, bootstrap_seed=0, num_resamples=1000)
    for name in ("nll", "auroc_error_confidence", "auroc_oos_mutual_information"):
        resampled = metric_scores(name, {0: rows}).resampled
        spread = float(resampled.std())
        # Two simulated 2.5 % quantiles: standard error below 0.1 sd each (0.08 at R = 1000).
        estimate = report.metrics[name]
        assert estimate.low is not None
        assert estimate.high is not None
        for q, end in ((0.025, estimate.low), (0.975, estimate.high)):
            assert float(resampled.quantile(q)) == pytest.approx(end, abs=5 * 0.15 * spread)


def test_directions() -> None:
    better_high = {name for name, metric in METRICS.items() if metric.higher_is_better}
    assert better_high == {n for n in METRICS if n == "accuracy" or n.startswith("auroc_")}


def test_rows_of_another_task_are_detected_and_change_nothing_else() -> None:
    _, inside = scored(3, out_of_scope=False)
    _, outside = scored(4, 30)
    outside = replace(outside, scores={"confidence": outside.scores["confidence"]})
    both = with_outside(inside, outside)
    for name in ("accuracy", "nll", "ece", "brier", "classwise_ece"):
        alone = metric_scores(name, {0: inside}, num_resamples=20)
        together = metric_scores(name, {0: both}, num_resamples=20)
        torch.testing.assert_close(together.observed, alone.observed)
        torch.testing.assert_close(together.resampled, alone.resampled)
    found = metric_scores("auroc_oos_confidence", {0: both}, num_resamples=20)
    pairs = [
        (low < high) + (low == high) / 2
        for low in outside.scores["confidence"].tolist()
        for high in inside.scores["confidence"].tolist()
    ]
    assert found.observed.tolist() == pytest.approx([math.fsum(pairs) / len(pairs)])
    assert found.draw.num_rows == ROWS + 30
    assert both.labels[-30:].tolist() == [-1] * 30
    assert set(both.scores) == {"confidence"}


def test_a_single_row_of_another_task_is_in_every_resample() -> None:
    _, inside = scored(3, out_of_scope=False)
    _, outside = scored(4, 1)
    both = with_outside(inside, outside)
    found = metric_scores("auroc_oos_confidence", {0: both}, num_resamples=50)
    assert not bool(found.resampled.isnan().any())
    assert len(found.resampled.unique()) > 10


def test_what_cannot_be_scored_is_refused() -> None:
    _, rows = scored(5)
    with pytest.raises(ConfigError, match="metric must be one of accuracy"):
        metric_scores("f1", {0: rows})
    with pytest.raises(ValueError, match="at least one run"):
        metric_scores("nll", {})
    with pytest.raises(ValueError, match="same rows in the same order"):
        metric_scores("nll", {0: rows, 1: replace(rows, ids=rows.ids[::-1])})
    with pytest.raises(ValueError, match="same rows in the same order"):
        metric_scores("nll", {0: rows, 1: replace(rows, labels=rows.labels.flip(0))})
    only = replace(rows, scores={"confidence": rows.scores["confidence"]})
    with pytest.raises(ConfigError, match="no score variation_ratio, only confidence"):
        metric_scores("auroc_error_variation_ratio", {0: only})
    with pytest.raises(ValueError, match="same 0 > 0 rows"):
        metric_scores("nll", {0: replace(rows, labels=torch.full((ROWS,), -1))})


def test_a_label_that_is_no_choice_of_any_row_does_not_make_the_classwise_error_smaller() -> None:
    log_probs, rows = scored(3)
    wider = torch.cat([log_probs[:, :, :2], log_probs.new_full((3, ROWS, 2), -math.inf)], dim=2)
    wider = torch.cat([wider, log_probs[:, :, 2:]], dim=2)
    labels = torch.where(rows.labels >= 2, rows.labels + 2, rows.labels)
    plain, padded = (
        evaluate(*asked).metrics["classwise_ece"].value
        for asked in ((log_probs, rows.labels), (wider, labels))
    )
    assert padded == pytest.approx(plain, rel=1e-12)
    known = replace(rows, labels=labels, log_mean_probs=log_mean_probs(wider))
    found = metric_scores("classwise_ece", {1: known}, num_resamples=2)
    assert found.observed.tolist() == pytest.approx([plain], rel=1e-12)


def test_a_label_that_is_right_counts_even_where_no_row_may_have_it() -> None:
    probs, labels = possible_labels(torch.tensor([[0.0, 0.0, 1.0]]), torch.tensor([0]))
    assert (probs.tolist(), labels.tolist()) == ([[0.0, 1.0]], [0])


def test_the_noise_floors_are_the_errors_of_a_calibrated_model() -> None:
    _, rows = scored(5, 400)
    inside = rows.labels >= 0
    found = noise_floors(rows, num_draws=400)
    probs = rows.log_mean_probs.double().exp()[inside]
    other = ece_noise_floor(
        probs.amax(1), num_draws=2000, generator=torch.Generator().manual_seed(9)
    )
    # Means of 400 and of 2000 draws: 5 standard errors.
    assert found["ece"] == pytest.approx(
        other.mean, abs=5 * other.std * math.sqrt(1 / 400 + 1 / 2000)
    )
    drawn = torch.multinomial(
        probs, 1000, replacement=True, generator=torch.Generator().manual_seed(2)
    )
    errors = torch.tensor([classwise_ece(probs, labels) for labels in drawn.T])
    error = 5 * float(errors.std()) * math.sqrt(1 / 400 + 1 / 1000)
    assert found["classwise_ece"] == pytest.approx(float(errors.mean()), abs=error)
    assert set(found) == {"ece", "adaptive_ece", "classwise_ece"}
    assert found["adaptive_ece"] > 0
    assert noise_floors(replace(rows, labels=torch.full_like(rows.labels, -1))) == {}


def test_rows_of_one_group_are_resampled_together() -> None:
    _, rows = scored(6, out_of_scope=False)
    pairs = torch.arange(ROWS) // 2
    same = torch.arange(ROWS) // 2 * 2
    twice = replace(
        rows,
        labels=rows.labels[same],
        log_mean_probs=rows.log_mean_probs[same],
        scores={name: values[same] for name, values in rows.scores.items()},
    )
    known, unknown = (
        metric_scores("nll", {0: one}, num_resamples=2000).resampled.std()
        for one in (replace(twice, groups=pairs), twice)
    )
    # Half the evidence: sqrt(2) times the deviation, of which 2000 resamples know 1.6 %.
    assert float(known / unknown) == pytest.approx(math.sqrt(2), rel=0.1)
    both = with_outside(replace(twice, groups=pairs), replace(twice, groups=pairs))
    assert both.groups is not None
    assert len(both.groups.unique()) == ROWS
