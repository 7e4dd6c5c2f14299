"""Calibration scores against torchmetrics, slow loops and values worked out by hand."""

import math

import pytest
import torch
from torchmetrics.functional.classification import (
    binary_calibration_error,
    multiclass_calibration_error,
)

from dalorra_core import metrics
from dalorra_core.errors import ConfigError
from tests.support import reference


def _random(rows: int, labels: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    probs = (3 * torch.randn(rows, labels, generator=generator)).softmax(dim=-1)
    return probs, torch.randint(labels, (rows,), generator=generator)


def _torchmetrics_ece(probs: torch.Tensor, labels: torch.Tensor, num_bins: int) -> float:
    return float(
        multiclass_calibration_error(
            probs, labels, num_classes=probs.shape[1], n_bins=num_bins, norm="l1"
        )
    )


# torchmetrics adds up to 500 float32 terms; half a unit in the last place of each bounds the gap.
FLOAT32_SUM = 500 * 2**-24


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("labels", "num_bins"), [(2, 15), (4, 15), (150, 15), (5, 1), (5, 10)])
def test_ece_equals_torchmetrics(labels: int, num_bins: int, seed: int) -> None:
    probs, truth = _random(500, labels, seed)
    assert metrics.ece(probs, truth, num_bins) == pytest.approx(
        _torchmetrics_ece(probs, truth, num_bins), abs=FLOAT32_SUM
    )


@pytest.mark.parametrize("num_bins", [3, 7, 10, 15, 20])
def test_ece_equals_torchmetrics_on_every_edge_and_at_one(num_bins: int) -> None:
    edges = torch.linspace(0, 1, num_bins + 1)
    top = torch.cat([edges[edges >= 0.5], torch.ones(3), torch.nextafter(edges[-3:], edges[:3])])
    probs = torch.stack([top, 1 - top], dim=-1)  # (n, 2)
    truth = torch.arange(len(top)) % 2
    assert metrics.ece(probs, truth, num_bins) == pytest.approx(
        _torchmetrics_ece(probs, truth, num_bins), abs=FLOAT32_SUM
    )


def test_confidence_of_exactly_one_has_a_bin_of_its_own() -> None:
    # In one shared bin the two errors would cancel to |0.5 - 0.97|; apart they do not.
    probs = torch.tensor([[1.0, 0.0], [0.94, 0.06]])
    assert metrics.ece(probs, torch.tensor([1, 0])) == pytest.approx((1.0 + 0.06) / 2)
    bins = metrics.reliability_bins(probs[:, 0], torch.tensor([False, True]))
    assert bins.count.tolist() == [0] * 14 + [1, 1]
    assert bins.lower[-1].item() == 1.0


def test_an_edge_belongs_to_the_bin_above() -> None:
    bins = metrics.reliability_bins(torch.tensor([0.5]), torch.tensor([True]), num_bins=2)
    assert bins.count.tolist() == [0, 1, 0]


def test_reliability_bins_worked_out_by_hand() -> None:
    confidence = torch.tensor([0.1, 0.2, 0.6, 0.8, 0.9, 1.0])
    correct = torch.tensor([False, True, True, True, False, True])
    bins = metrics.reliability_bins(confidence, correct, num_bins=4)
    assert bins.count.tolist() == [2, 0, 1, 2, 1]
    expected = torch.tensor([0.15, math.nan, 0.6, 0.85, 1.0], dtype=torch.float64)
    torch.testing.assert_close(bins.confidence, expected, equal_nan=True, rtol=1e-7, atol=0)
    accuracy = torch.tensor([0.5, math.nan, 1.0, 0.5, 1.0], dtype=torch.float64)
    torch.testing.assert_close(bins.accuracy, accuracy, equal_nan=True)


def test_ece_equals_the_slow_reference() -> None:
    probs, truth = _random(400, 6, seed=9)
    confidence, predicted = probs.double().max(dim=-1)
    expected = reference.ece_loop(confidence.tolist(), (predicted == truth).tolist(), 15)
    assert metrics.ece(probs, truth) == pytest.approx(expected, abs=1e-12)


def test_float64_probabilities_may_round_to_one() -> None:
    probs = torch.tensor([[1.0 + 1e-9, 0.0]], dtype=torch.float64)
    assert metrics.ece(probs, torch.tensor([0])) == 0.0


def test_classwise_ece_is_the_mean_of_binary_ones() -> None:
    probs, truth = _random(300, 5, seed=3)
    each = [
        float(
            binary_calibration_error(
                probs[:, c].contiguous(), (truth == c).long(), n_bins=15, norm="l1"
            )
        )
        for c in range(5)
    ]
    assert metrics.classwise_ece(probs, truth) == pytest.approx(sum(each) / 5, abs=FLOAT32_SUM)


@pytest.mark.parametrize("rows", [7, 15, 100, 301])
def test_adaptive_ece_equals_the_slow_reference(rows: int) -> None:
    probs, truth = _random(rows, 4, seed=rows)
    confidence, predicted = probs.double().max(dim=-1)
    expected = reference.adaptive_ece_loop(confidence.tolist(), (predicted == truth).tolist(), 15)
    assert metrics.adaptive_ece(probs, truth) == pytest.approx(expected, abs=1e-12)


def test_adaptive_ece_does_not_depend_on_the_order_of_ties() -> None:
    probs = torch.tensor([[0.75, 0.25]]).repeat(6, 1)
    truth = torch.tensor([0, 0, 0, 1, 1, 1])
    forward = metrics.adaptive_ece(probs, truth, num_bins=3)
    assert forward == pytest.approx(metrics.adaptive_ece(probs, truth.flip(0), num_bins=3))
    assert forward == pytest.approx(0.25)


def test_brier_and_nll_equal_the_slow_reference() -> None:
    probs, truth = _random(50, 7, seed=4)
    exact = probs.double()
    assert metrics.brier(probs, truth) == pytest.approx(
        reference.brier_loop(exact.numpy(), truth.tolist()), rel=1e-12
    )
    assert metrics.nll(exact.log(), truth) == pytest.approx(
        reference.nll_loop(exact.numpy(), truth.tolist()), rel=1e-12
    )


def test_brier_is_two_when_certain_and_wrong() -> None:
    assert metrics.brier(torch.tensor([[1.0, 0.0]]), torch.tensor([1])) == 2.0


def test_nll_is_infinite_for_an_impossible_truth() -> None:
    assert metrics.nll(torch.tensor([[0.0, -torch.inf]]), torch.tensor([1])) == math.inf


def test_noise_floor_of_one_bin_matches_its_closed_form() -> None:
    # n fair coins in one bin: ECE = |Binomial(n, 1/2) - n/2| / n, a finite sum.
    n, draws = 50, 2000
    outcomes = [(math.comb(n, k) / 2**n, abs(k - n / 2) / n) for k in range(n + 1)]
    mean = math.fsum(p * gap for p, gap in outcomes)
    std = math.sqrt(math.fsum(p * (gap - mean) ** 2 for p, gap in outcomes))
    floor = metrics.ece_noise_floor(
        torch.full((n,), 0.5), num_draws=draws, generator=torch.Generator().manual_seed(1)
    )
    assert floor.mean == pytest.approx(mean, abs=5 * std / math.sqrt(draws))
    # The variance of a sample deviation of a bounded, light-tailed gap is below std^2 / draws.
    assert floor.std == pytest.approx(std, abs=5 * std / math.sqrt(draws))


def test_noise_floor_is_zero_for_certain_predictions() -> None:
    floor = metrics.ece_noise_floor(
        torch.tensor([0.0, 1.0]), num_draws=3, generator=torch.Generator().manual_seed(0)
    )
    assert (floor.mean, floor.std) == (0.0, 0.0)


def test_noise_floor_repeats_with_its_generator() -> None:
    confidence = torch.linspace(0.3, 0.9, 40)
    first, second = (
        metrics.ece_noise_floor(confidence, num_draws=5, generator=torch.Generator().manual_seed(8))
        for _ in range(2)
    )
    assert first == second


@pytest.mark.parametrize("metric", [metrics.ece, metrics.classwise_ece, metrics.adaptive_ece])
def test_what_is_not_a_probability_is_refused(metric: object) -> None:
    assert callable(metric)
    truth = torch.tensor([0])
    for bad in ([[2.5, -1.5]], [[math.nan, 0.5]], [[1.1, 0.0]]):
        with pytest.raises(ValueError, match=r"probabilities must lie in \[0, 1\]"):
            metric(torch.tensor(bad), truth)
    with pytest.raises(ConfigError, match="num_bins must be at least 1, got 0"):
        metric(torch.tensor([[0.5, 0.5]]), truth, 0)


@pytest.mark.parametrize(
    "metric",
    [metrics.ece, metrics.classwise_ece, metrics.adaptive_ece, metrics.brier, metrics.nll],
)
def test_labels_outside_the_label_set_are_refused(metric: object) -> None:
    assert callable(metric)
    for bad in (-1, 2):
        with pytest.raises(ValueError, match=r"labels must lie in \[0, 2\), got"):
            metric(torch.tensor([[0.5, 0.5]]), torch.tensor([bad]))
    with pytest.raises(ValueError, match="at least one example"):
        metric(torch.empty(0, 2), torch.empty(0, dtype=torch.int64))


def test_empty_confidences_and_too_few_draws_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one example"):
        metrics.reliability_bins(torch.empty(0), torch.empty(0, dtype=torch.bool))
    with pytest.raises(ConfigError, match="num_draws must be at least 2, got 1"):
        metrics.ece_noise_floor(torch.ones(1), num_draws=1, generator=torch.Generator())
