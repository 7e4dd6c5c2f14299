"""Selective prediction against pairs, permutations and values worked out by hand."""

import math

import pytest
import torch
from torchmetrics.functional.classification import binary_auroc

from dalorra_core import metrics
from tests.support import reference


def test_aurc_of_five_answers_with_the_two_errors_last() -> None:
    # Risks 0, 0, 0, 1/4, 2/5: their mean is 0.13 (a trapezoid would say 0.1125).
    confidence = torch.tensor([0.9, 0.8, 0.7, 0.6, 0.5])
    correct = torch.tensor([True, True, True, False, False])
    assert metrics.aurc(confidence, correct) == pytest.approx(0.13, rel=1e-12)


def test_curve_lists_coverage_risk_and_threshold_surest_first() -> None:
    confidence = torch.tensor([0.6, 0.9, 0.7, 0.8])
    correct = torch.tensor([True, False, True, True])
    curve = metrics.risk_coverage_curve(confidence, correct)
    assert curve.coverage.tolist() == [0.25, 0.5, 0.75, 1.0]
    assert curve.selective_risk.tolist() == pytest.approx([1.0, 0.5, 1 / 3, 0.25])
    assert curve.threshold.tolist() == pytest.approx([0.9, 0.8, 0.7, 0.6])


@pytest.mark.parametrize(
    ("confidence", "correct"),
    [
        ([0.5, 0.5, 0.5], [True, False, False]),
        ([0.9, 0.7, 0.7, 0.7, 0.1], [False, True, False, True, True]),
        ([0.2, 0.2, 0.8, 0.8, 0.8, 0.5], [True, False, True, False, True, False]),
    ],
)
def test_ties_are_averaged_over_all_orders(confidence: list[float], correct: list[bool]) -> None:
    expected = reference.aurc_over_all_orders(confidence, correct)
    found = metrics.aurc(torch.tensor(confidence), torch.tensor(correct))
    assert found == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("correct", "expected"), [([True, True], 0.0), ([False, False], 0.5), ([True], 0.0)]
)
def test_augrc_of_perfect_and_hopeless_models(correct: list[bool], expected: float) -> None:
    scores = torch.linspace(0, 1, len(correct))
    assert metrics.augrc(scores, torch.tensor(correct)) == expected


def test_augrc_equals_its_closed_form() -> None:
    generator = torch.Generator().manual_seed(5)
    confidence = torch.rand(80, generator=generator).mul(20).round()  # many ties
    correct = torch.rand(80, generator=generator) < 0.7
    expected = reference.augrc_loop(confidence.tolist(), correct.tolist())
    assert metrics.augrc(confidence, correct) == pytest.approx(expected, rel=1e-12)


def test_auroc_equals_pairs_and_torchmetrics() -> None:
    generator = torch.Generator().manual_seed(6)
    positive = torch.randn(40, generator=generator).add(0.5).mul(4).round().div(4)
    negative = torch.randn(70, generator=generator).mul(4).round().div(4)
    found = metrics.auroc(positive, negative)
    assert found == pytest.approx(
        reference.auroc_loop(positive.tolist(), negative.tolist()), rel=1e-12
    )
    scores = torch.cat([positive, negative])
    truth = torch.cat([torch.ones(40), torch.zeros(70)]).long()
    # torchmetrics takes scores in [0, 1] as they are; AUROC does not mind an increasing map.
    squeezed = (scores - scores.min()) / (scores.max() - scores.min())
    assert found == pytest.approx(float(binary_auroc(squeezed, truth)), abs=110 * 2**-24)


def test_auroc_orders_infinities() -> None:
    assert metrics.auroc(torch.tensor([torch.inf]), torch.tensor([-torch.inf, 3.0])) == 1.0


def test_auroc_of_an_empty_side_is_undefined() -> None:
    assert math.isnan(metrics.auroc(torch.empty(0), torch.ones(2)))
    assert math.isnan(metrics.auroc(torch.ones(2), torch.empty(0)))


def test_detection_flags_strictly_above_the_threshold() -> None:
    found = metrics.detection_at_threshold(
        torch.tensor([0.5, 0.6, 0.9]), torch.tensor([0.1, 0.5, 0.7, 0.2]), threshold=0.5
    )
    assert found == metrics.Detection(recall=2 / 3, false_positive_rate=0.25)


def test_detection_compares_in_float64() -> None:
    # float32 0.1 is a little more than float64 0.1.
    found = metrics.detection_at_threshold(torch.tensor([0.1]), torch.empty(0), threshold=0.1)
    assert found.recall == 1.0
    assert math.isnan(found.false_positive_rate)


def test_selective_risk_counts_only_the_answered() -> None:
    correct = torch.tensor([True, False, False, True])
    accepted = torch.tensor([True, True, False, False])
    assert metrics.selective_risk(correct, accepted) == 0.5


def test_selective_risk_of_no_answers_is_undefined() -> None:
    assert math.isnan(metrics.selective_risk(torch.tensor([True]), torch.tensor([False])))


def test_nan_scores_and_empty_sets_are_refused() -> None:
    nan, fine = torch.tensor([math.nan]), torch.tensor([0.5])
    with pytest.raises(ValueError, match="got 1 NaN"):
        metrics.auroc(nan, fine)
    with pytest.raises(ValueError, match="got 1 NaN"):
        metrics.auroc(fine, nan)
    with pytest.raises(ValueError, match="got 1 NaN"):
        metrics.aurc(nan, torch.tensor([True]))
    with pytest.raises(ValueError, match="threshold must be a number"):
        metrics.detection_at_threshold(fine, fine, math.nan)
    with pytest.raises(ValueError, match="at least one example"):
        metrics.augrc(torch.empty(0), torch.empty(0, dtype=torch.bool))
