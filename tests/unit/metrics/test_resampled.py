"""Scores of many resamples at once: each equals the plain score of the repeated rows."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torchmetrics.functional.classification import multiclass_calibration_error

from dalorra_core import metrics
from dalorra_core.errors import ConfigError
from dalorra_core.metrics.resampled import (
    Statistic,
    one_by_one,
    resampled_adaptive_ece,
    resampled_augrc,
    resampled_aurc,
    resampled_auroc,
    resampled_classwise_ece,
    resampled_ece,
    resampled_mean,
)
from tests.support import reference

ROWS, RESAMPLES, LABELS = 60, 25, 4


def drawn_counts(rows: int = ROWS) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    chosen = torch.randint(rows, (RESAMPLES, rows), generator=generator)
    return torch.stack([torch.bincount(row, minlength=rows) for row in chosen]).double()


def answers(*, ties: bool) -> tuple[Tensor, Tensor]:
    """Probabilities (n, C) and labels, half of which are the predicted ones."""
    generator = torch.Generator().manual_seed(4)
    logits = 2 * torch.randn(ROWS, LABELS, generator=generator, dtype=torch.float64)
    if ties:
        logits = logits.round()
    probs = logits.softmax(dim=-1)
    labels = torch.randint(LABELS, (ROWS,), generator=generator)
    keep = torch.rand(ROWS, generator=generator) < 0.5
    return probs, torch.where(keep, probs.argmax(dim=-1), labels)


def plain(statistic: Callable[..., float], counts: Tensor, *arrays: Tensor) -> list[float]:
    """The statistic of the repeated rows, one resample after the other."""
    out: list[float] = []
    for row in counts.long().tolist():
        index = [i for i, count in enumerate(row) for _ in range(count)]
        out.append(statistic(*(array[index] for array in arrays)))
    return out


def auroc_of(scores: Tensor, positive: Tensor) -> float:
    return metrics.auroc(scores[positive], scores[~positive])


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize(
    ("resampled", "score"),
    [
        (resampled_aurc, metrics.aurc),
        (resampled_augrc, metrics.augrc),
        (resampled_auroc, auroc_of),
    ],
)
def test_scores_of_an_order_equal_the_plain_ones(
    resampled: Statistic, score: Callable[..., float], ties: bool
) -> None:
    probs, labels = answers(ties=ties)
    confidence, predicted = probs.max(dim=-1)
    counts = drawn_counts()
    found = resampled(counts, confidence, predicted == labels)
    expected = plain(score, counts, confidence, predicted == labels)
    assert found.tolist() == pytest.approx(expected, rel=1e-12, abs=1e-14)


@pytest.mark.parametrize("num_bins", [1, 7, 15, 100])
@pytest.mark.parametrize("ties", [False, True])
def test_calibration_errors_equal_the_plain_ones(ties: bool, num_bins: int) -> None:
    probs, labels = answers(ties=ties)
    confidence, predicted = probs.max(dim=-1)
    counts = drawn_counts()
    for resampled, score in (
        (resampled_ece, metrics.ece),
        (resampled_adaptive_ece, metrics.adaptive_ece),
    ):
        found = resampled(counts, confidence, predicted == labels, num_bins)
        expected = plain(lambda p, y, score=score: score(p, y, num_bins), counts, probs, labels)
        assert found.tolist() == pytest.approx(expected, rel=1e-12, abs=1e-14)
    found = resampled_classwise_ece(counts, probs, labels, num_bins)
    expected = plain(lambda p, y: metrics.classwise_ece(p, y, num_bins), counts, probs, labels)
    assert found.tolist() == pytest.approx(expected, rel=1e-12, abs=1e-14)


def test_ece_on_every_edge_and_at_one_equals_torchmetrics() -> None:
    edges = torch.linspace(0, 1, 16)
    top = torch.cat([edges[edges >= 0.5], torch.ones(3), torch.nextafter(edges[-3:], edges[:3])])
    correct = torch.arange(len(top)) % 2 == 0
    counts = drawn_counts(len(top))
    found = resampled_ece(counts, top, correct)
    for resample, value in zip(counts.long(), found.tolist(), strict=True):
        index = torch.arange(len(top)).repeat_interleave(resample)
        probs = torch.stack([top[index], 1 - top[index]], dim=-1)
        expected = multiclass_calibration_error(
            probs, (~correct[index]).long(), num_classes=2, n_bins=15, norm="l1"
        )
        assert value == pytest.approx(float(expected), abs=len(top) * 2**-24)


def test_a_mean_is_weighted_by_the_counts() -> None:
    counts = torch.tensor([[1.0, 1.0, 1.0, 1.0], [0.0, 3.0, 0.0, 1.0]], dtype=torch.float64)
    found = resampled_mean(counts, torch.tensor([1.0, 2.0, 4.0, 9.0]))
    assert found.tolist() == [4.0, 15 / 4]


def test_auroc_is_undefined_without_both_kinds() -> None:
    counts = torch.tensor([[1.0, 1.0], [2.0, 0.0]], dtype=torch.float64)
    found = resampled_auroc(counts, torch.tensor([0.9, 0.1]), torch.tensor([True, False]))
    assert found[0] == 1.0
    assert found[1].isnan()


def test_all_right_and_all_wrong_have_defined_risks() -> None:
    counts = torch.ones(1, 3, dtype=torch.float64)
    confidence = torch.tensor([0.9, 0.5, 0.5])
    for correct, aurc, augrc in ((True, 0.0, 0.0), (False, 1.0, 0.5)):
        right = torch.tensor([correct] * 3)
        assert float(resampled_aurc(counts, confidence, right)) == pytest.approx(aurc)
        assert float(resampled_augrc(counts, confidence, right)) == pytest.approx(augrc)


def test_one_by_one_repeats_the_rows_of_every_array() -> None:
    seen: list[tuple[list[float], list[float]]] = []

    def statistic(a: Tensor, b: Tensor) -> float:
        seen.append((a.tolist(), b.tolist()))
        return reference.auroc_loop(a.tolist(), b.tolist())

    counts = torch.tensor([[0.0, 2.0], [1.0, 1.0]], dtype=torch.float64)
    found = one_by_one(statistic)(counts, torch.tensor([1.0, 2.0]), torch.tensor([1.0, 0.0]))
    assert seen == [([2.0, 2.0], [0.0, 0.0]), ([1.0, 2.0], [1.0, 0.0])]
    assert found.tolist() == [1.0, 0.875]


def test_what_is_no_probability_is_refused() -> None:
    counts = torch.ones(1, 2, dtype=torch.float64)
    with pytest.raises(ValueError, match="must lie in"):
        resampled_ece(counts, torch.tensor([1.5, 0.5]), torch.tensor([True, False]))
    with pytest.raises(ConfigError, match="num_bins"):
        resampled_ece(counts, torch.tensor([0.5, 0.5]), torch.tensor([True, False]), 0)
