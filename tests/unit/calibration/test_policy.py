"""dalorra_core.calibration.policy: thresholds against brute force."""

import math

import pytest
import torch
from torch import Tensor

from dalorra_core.calibration.policy import NOTHING_ANSWERED, choose_thresholds
from dalorra_core.errors import ConfigError, DataError
from dalorra_core.metrics.uncertainty import UncertaintySummary, summarise


def summary_of(probs: Tensor) -> UncertaintySummary:
    return summarise(probs.double().log().unsqueeze(0))


def binary(confidence: list[float]) -> UncertaintySummary:
    p = torch.tensor(confidence, dtype=torch.float64)
    return summary_of(torch.stack([p, 1 - p], dim=1))  # label 0 is always predicted


def test_an_accepted_out_of_scope_row_is_an_error() -> None:
    """Four rows, all sure of label 0; the surest is out of scope and cannot be told apart."""
    summary = binary([0.99, 0.98, 0.97, 0.96])
    labels = torch.tensor([-1, 0, 0, 0])
    assert choose_thresholds(summary, labels, 0.1).min_confidence is None
    allowing = choose_thresholds(summary, labels, 0.25)
    assert allowing.min_confidence == pytest.approx(0.96)
    assert allowing.selective_risk == pytest.approx(0.25)
    assert allowing.coverage == 1.0


def test_rows_of_equal_confidence_are_accepted_together_or_not_at_all() -> None:
    summary = binary([0.9, 0.8, 0.8, 0.8])
    found = choose_thresholds(summary, torch.tensor([0, 0, 1, 0]), 0.2)
    assert found.min_confidence == pytest.approx(0.9)
    assert found.coverage == 0.25


def test_when_every_answer_would_be_wrong_every_row_is_refused() -> None:
    summary = binary([1.0, 0.9])
    found = choose_thresholds(summary, torch.tensor([-1, 1]), 0.1)
    assert found.abstain_threshold == NOTHING_ANSWERED
    assert (summary.predictive_entropy > found.abstain_threshold).all()
    assert (found.min_confidence, found.coverage) == (None, 0.0)


def test_the_abstain_threshold_lies_midway_between_two_rows() -> None:
    summary = binary([0.99, 0.95, 0.6])
    found = choose_thresholds(summary, torch.tensor([0, 0, -1]), 0.1)
    entropy = summary.predictive_entropy
    assert found.abstain_threshold == pytest.approx(float(entropy[1] + entropy[2]) / 2)
    assert (found.coverage, found.selective_risk) == (pytest.approx(2 / 3), 0.0)


def test_without_out_of_scope_rows_abstaining_starts_at_the_99th_percentile() -> None:
    summary = binary([0.5 + i / 400 for i in range(200)])
    found = choose_thresholds(summary, torch.zeros(200, dtype=torch.long), 0.1)
    expected = summary.predictive_entropy.quantile(0.99)
    assert found.abstain_threshold == pytest.approx(float(expected))
    assert found.coverage == pytest.approx(0.99)


@pytest.mark.parametrize("target", [0.0, 1.0, -0.5, math.nan])
def test_a_target_outside_its_domain_is_refused(target: float) -> None:
    with pytest.raises(ConfigError, match=f"target_selective_risk must lie strictly.*{target}"):
        choose_thresholds(binary([0.9]), torch.tensor([0]), target)


def test_no_rows_are_refused() -> None:
    empty = binary([0.9])
    with pytest.raises(DataError, match="at least one held-out row"):
        choose_thresholds(empty, torch.zeros(0, dtype=torch.long), 0.1)
