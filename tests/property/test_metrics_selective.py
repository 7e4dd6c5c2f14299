"""What must hold of selective prediction and calibration for any scores whatever."""

import math
from random import Random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchmetrics.functional.classification import multiclass_calibration_error

from dalorra_core import metrics
from tests.support import reference

# Few distinct values, so that ties are common; quarters are exact in every precision.
_scores = st.integers(0, 12).map(lambda k: k / 4)
_answers = st.lists(st.tuples(_scores, st.booleans()), min_size=1, max_size=30)


def _split(answers: list[tuple[float, bool]]) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.tensor([s for s, _ in answers]), torch.tensor([ok for _, ok in answers])


@given(_answers)
def test_a_strictly_increasing_map_changes_no_ranking_metric(
    answers: list[tuple[float, bool]],
) -> None:
    confidence, correct = _split(answers)
    mapped = torch.exp(confidence.double()) * 3 - 7
    assert metrics.aurc(confidence, correct) == metrics.aurc(mapped, correct)
    assert metrics.augrc(confidence, correct) == metrics.augrc(mapped, correct)


@given(_answers, st.randoms(use_true_random=False))
def test_the_order_of_the_examples_changes_nothing(
    answers: list[tuple[float, bool]],
    random: Random,
) -> None:
    mixed = random.sample(answers, len(answers))
    assert metrics.aurc(*_split(answers)) == pytest.approx(metrics.aurc(*_split(mixed)), rel=1e-12)
    assert metrics.augrc(*_split(answers)) == pytest.approx(
        metrics.augrc(*_split(mixed)), rel=1e-12
    )


@given(_answers)
def test_full_coverage_has_the_error_rate(answers: list[tuple[float, bool]]) -> None:
    confidence, correct = _split(answers)
    curve = metrics.risk_coverage_curve(confidence, correct)
    error_rate = 1 - float(correct.double().mean())
    assert curve.selective_risk[-1].item() == pytest.approx(error_rate, abs=1e-12)
    assert curve.coverage[-1].item() == 1.0
    everything = torch.ones_like(correct)
    assert metrics.selective_risk(correct, everything) == pytest.approx(error_rate, abs=1e-12)


@given(_answers)
def test_augrc_equals_its_closed_form(answers: list[tuple[float, bool]]) -> None:
    confidence, correct = _split(answers)
    expected = reference.augrc_loop(confidence.tolist(), correct.tolist())
    assert metrics.augrc(confidence, correct) == pytest.approx(expected, abs=1e-12)


@given(st.lists(_scores, min_size=1, max_size=20), st.lists(_scores, min_size=1, max_size=20))
def test_swapping_the_sides_mirrors_auroc(positive: list[float], negative: list[float]) -> None:
    forward = metrics.auroc(torch.tensor(positive), torch.tensor(negative))
    backward = metrics.auroc(torch.tensor(negative), torch.tensor(positive))
    assert forward + backward == pytest.approx(1.0, abs=1e-12)
    assert forward == pytest.approx(reference.auroc_loop(positive, negative), abs=1e-12)


@given(
    st.lists(
        st.tuples(
            st.integers(15, 30).map(lambda k: k / 30) | st.floats(0.5, 1, width=32),
            st.integers(0, 1),
        ),
        min_size=1,
        max_size=40,
    ),
    st.integers(1, 20),
)
def test_ece_equals_torchmetrics(rows: list[tuple[float, int]], num_bins: int) -> None:
    top = torch.tensor([p for p, _ in rows])
    probs = torch.stack([top, 1 - top], dim=-1)  # (n, 2)
    labels = torch.tensor([label for _, label in rows])
    theirs = multiclass_calibration_error(probs, labels, num_classes=2, n_bins=num_bins, norm="l1")
    assert metrics.ece(probs, labels, num_bins) == pytest.approx(float(theirs), abs=40 * 2**-24)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=40))
def test_every_calibration_score_is_a_fraction(confidences: list[float]) -> None:
    top = torch.tensor(confidences, dtype=torch.float64)
    probs = torch.stack([top, 1 - top], dim=-1)
    labels = torch.zeros(len(confidences), dtype=torch.int64)
    for metric in (metrics.ece, metrics.adaptive_ece, metrics.classwise_ece):
        assert 0.0 <= metric(probs, labels) <= 1.0
    assert 0.0 <= metrics.brier(probs, labels) <= 2.0
    assert not math.isnan(metrics.nll(probs.log(), labels))
