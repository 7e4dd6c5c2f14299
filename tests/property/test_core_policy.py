"""dalorra_core.calibration.policy against brute force, on generated rows."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dalorra_core.calibration.policy import Thresholds, choose_thresholds
from dalorra_core.metrics.uncertainty import UncertaintySummary, summarise


def summary_of(probs: Tensor) -> UncertaintySummary:
    return summarise(probs.double().log().unsqueeze(0))


def measured(
    summary: UncertaintySummary, labels: Tensor, found: Thresholds
) -> tuple[int, int, float]:
    """Return (accepted, wrong among them, accuracy over labels and refusal) by the rule's words."""
    accepted = wrong = right = 0
    for i in range(len(labels)):
        least = math.inf if found.min_confidence is None else found.min_confidence
        abstains = float(summary.predictive_entropy[i]) > found.abstain_threshold
        hit = int(summary.predicted[i]) == int(labels[i])
        right += abstains if labels[i] < 0 else (hit and not abstains)
        if not abstains and float(summary.confidence[i]) >= least:
            accepted += 1
            wrong += not hit
    return accepted, wrong, right / len(labels)


def check_against_brute_force(
    summary: UncertaintySummary, labels: Tensor, target: float
) -> Thresholds:
    found = choose_thresholds(summary, labels, target)
    accepted, wrong, accuracy = measured(summary, labels, found)
    entropies = summary.predictive_entropy.tolist()
    if (labels < 0).any():
        candidates = [-1.0, *entropies]
        best = max(
            measured(summary, labels, Thresholds(2.0, value, None, 0.0))[2] for value in candidates
        )
        assert accuracy == pytest.approx(best)
    most = 0
    for value in {*summary.confidence.tolist(), 2.0}:
        trial = Thresholds(value, found.abstain_threshold, None, 0.0)
        took, missed, _ = measured(summary, labels, trial)
        if took and missed / took <= target:
            most = max(most, took)
    assert accepted == most
    assert found.coverage == pytest.approx(accepted / len(labels))
    if accepted:
        assert found.selective_risk == pytest.approx(wrong / accepted)
        assert wrong / accepted <= target
    else:
        assert (found.min_confidence, found.selective_risk) == (None, None)
    return found


@given(
    rows=st.lists(
        st.tuples(st.integers(5, 10), st.sampled_from([-1, 0, 0, 0, 1])), min_size=1, max_size=14
    ),
    target=st.sampled_from([0.02, 0.1, 0.25, 0.5, 0.9]),
)
def test_thresholds_are_the_best_there_are(rows: list[tuple[int, int]], target: float) -> None:
    """Few distinct confidences, so that ties are everywhere; certain rows (1.0) among them."""
    p = torch.tensor([tenths / 10 for tenths, _ in rows], dtype=torch.float64)
    summary = summary_of(torch.stack([p, 1 - p], dim=1))
    check_against_brute_force(summary, torch.tensor([label for _, label in rows]), target)


@given(seed=st.integers(0, 10_000), n=st.integers(1, 40), target=st.sampled_from([0.02, 0.1, 0.4]))
def test_thresholds_are_the_best_there_are_for_many_labels(
    seed: int, n: int, target: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    probs = (2 * torch.randn(n, 4, generator=generator, dtype=torch.float64)).softmax(-1)
    labels = torch.multinomial(probs, 1, generator=generator).flatten()
    labels[torch.rand(n, generator=generator) < 0.3] = -1
    check_against_brute_force(summary_of(probs), labels, target)
