"""Per-row uncertainty against values worked out by hand and a slow float64 reference."""

import math

import numpy as np
import pytest
import torch
from torch.distributions import Categorical

from dalorra_core import metrics
from tests.support import reference


def _log_probs(samples: int, rows: int, labels: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(samples, rows, labels, generator=generator, dtype=torch.float64)
    return logits.log_softmax(dim=-1)


def test_two_opposite_certain_samples_are_all_epistemic() -> None:
    certain = torch.tensor([[[0.0, -torch.inf]], [[-torch.inf, 0.0]]])  # (2, 1, 2)
    summary = metrics.summarise(certain)
    assert summary.mean_probs.tolist() == [[0.5, 0.5]]
    assert summary.expected_entropy.item() == 0.0
    assert summary.mutual_information.item() == pytest.approx(math.log(2), rel=1e-15)
    assert summary.confidence_std.item() == 0.5
    assert summary.variation_ratio.item() == 0.5
    assert summary.predicted.item() == 0


def test_two_equal_unsure_samples_are_all_aleatoric() -> None:
    unsure = torch.full((2, 1, 4), 0.25).log()
    summary = metrics.summarise(unsure)
    assert summary.predictive_entropy.item() == pytest.approx(math.log(4), rel=1e-7)
    assert summary.mutual_information.item() == 0.0
    assert summary.normalized_entropy.item() == pytest.approx(1.0)
    assert summary.variation_ratio.item() == 0.0
    assert summary.confidence_std.item() == 0.0


def test_values_worked_out_by_hand() -> None:
    # Samples (0.9, 0.1) and (0.3, 0.7): the mixture is (0.6, 0.4).
    log_probs = torch.tensor([[[0.9, 0.1]], [[0.3, 0.7]]], dtype=torch.float64).log()
    summary = metrics.summarise(log_probs)
    assert summary.confidence.item() == pytest.approx(0.6)
    assert summary.confidence_std.item() == pytest.approx(0.3)
    assert summary.variation_ratio.item() == 0.5
    assert summary.predictive_entropy.item() == pytest.approx(0.6730116670092565)
    assert summary.expected_entropy.item() == pytest.approx(0.4679735696)
    assert summary.mutual_information.item() == pytest.approx(0.2050380974)
    assert summary.normalized_entropy.item() == pytest.approx(0.6730116670 / math.log(2))


def test_every_measure_equals_the_slow_reference() -> None:
    log_probs = _log_probs(samples=7, rows=9, labels=5)
    log_probs[:, 3, 2:] = -torch.inf  # a row with two choices
    log_probs[:, 3] = log_probs[:, 3].log_softmax(dim=-1)
    log_probs[:, 4, 1:] = -torch.inf  # a row with a single one
    log_probs[:, 4] = log_probs[:, 4].log_softmax(dim=-1)
    allowed = torch.tensor([5, 5, 5, 2, 1, 5, 5, 5, 5])
    expected = reference.uncertainty_loop(log_probs.numpy())
    summary = metrics.summarise(log_probs, allowed)
    np.testing.assert_allclose(
        summary.mean_probs.numpy(), reference.mixture_loop(log_probs.numpy()), rtol=1e-13
    )
    for name, values in expected.items():
        np.testing.assert_allclose(
            getattr(summary, name).numpy(), values, rtol=1e-12, atol=1e-14, err_msg=name
        )


def test_entropies_equal_torch_distributions() -> None:
    log_probs = _log_probs(samples=4, rows=6, labels=3)
    mixture = Categorical(probs=log_probs.exp().mean(dim=0))
    torch.testing.assert_close(metrics.predictive_entropy(log_probs), mixture.entropy())
    each = Categorical(logits=log_probs).entropy().mean(dim=0)
    torch.testing.assert_close(metrics.expected_entropy(log_probs), each)


def test_one_sample_has_no_epistemic_part() -> None:
    single = _log_probs(samples=1, rows=50, labels=7).float()
    assert not metrics.mutual_information(single).any()
    assert not metrics.confidence_std(single).any()
    assert not metrics.variation_ratio(single).any()


def test_the_mixture_averages_probabilities_not_logits() -> None:
    log_probs = torch.tensor([[[0.99, 0.01]], [[0.5, 0.5]]], dtype=torch.float64).log()
    assert metrics.mean_probs(log_probs)[0, 0].item() == pytest.approx(0.745)


def test_log_mixture_stays_finite_where_probabilities_underflow() -> None:
    log_probs = torch.tensor([[[0.0, -900.0]], [[0.0, -torch.inf]]])
    assert metrics.log_mean_probs(log_probs)[0, 1].item() == pytest.approx(-900.0 - math.log(2))


def test_a_certain_mixture_never_exceeds_one() -> None:
    certain = torch.zeros(3, 1, 1)
    assert metrics.log_mean_probs(certain).item() <= 0.0
    assert metrics.confidence(certain).item() <= 1.0


def test_a_tie_inside_a_sample_is_not_dissent() -> None:
    log_probs = torch.tensor([[[0.5, 0.5]], [[0.4, 0.6]]], dtype=torch.float64).log()
    assert metrics.variation_ratio(log_probs).item() == 0.0


def test_results_are_float64_for_float32_input() -> None:
    summary = metrics.summarise(_log_probs(2, 3, 4).float())
    assert summary.mean_probs.dtype == torch.float64
    assert summary.mutual_information.dtype == torch.float64
    assert summary.predicted.dtype == torch.int64


def test_nan_is_never_hidden() -> None:
    broken = torch.full((2, 1, 2), torch.nan)
    summary = metrics.summarise(broken)
    assert summary.mutual_information.isnan().all()
    assert summary.confidence.isnan().all()


def test_no_choices_at_all_is_refused() -> None:
    with pytest.raises(ValueError, match="num_allowed must be at least 1, got 0"):
        metrics.normalized_entropy(_log_probs(1, 2, 3), torch.tensor([3, 0]))
