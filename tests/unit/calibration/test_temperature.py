"""dalorra_core.calibration.temperature: the optimum against a grid, and the rule of keeping."""

import math

import pytest
import torch
from torch import Tensor

from dalorra_core.calibration.temperature import fit_temperature, mixture_nll
from dalorra_core.errors import DataError
from dalorra_core.predictive.scoring import Prediction
from dalorra_core.predictive.tempering import temper, tempered

HALVES = torch.arange(400) < 200


def drawn(sharpness: float, n: int = 400, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Labels that follow a mixture of 3 samples, and log-probabilities sharper than it."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(1, n, 5, generator=generator, dtype=torch.float64) * 2
    logits = base + 0.3 * torch.randn(3, n, 5, generator=generator, dtype=torch.float64)
    truth = logits.softmax(-1).mean(0)
    labels = torch.multinomial(truth, 1, generator=generator).flatten()
    return (logits * sharpness).log_softmax(-1), labels


@pytest.mark.parametrize("sharpness", [0.4, 3.0])
def test_the_fit_is_the_best_on_a_fine_grid(sharpness: float) -> None:
    log_probs, labels = drawn(sharpness)
    fit = fit_temperature(log_probs, labels, HALVES, ~HALVES)
    grid = [math.exp(i / 200) for i in range(-500, 501)]
    values = [mixture_nll(log_probs[:, HALVES], labels[HALVES], t) for t in grid]
    best = grid[values.index(min(values))]
    assert fit.fitted == pytest.approx(best, rel=0.006)
    assert fit.fitted == pytest.approx(sharpness, rel=0.3)
    assert fit.kept
    assert fit.value == fit.fitted
    assert fit.nll_after < fit.nll_before
    assert fit.nll_after == mixture_nll(log_probs[:, ~HALVES], labels[~HALVES], fit.fitted)


def test_a_temperature_that_hurts_elsewhere_is_not_kept() -> None:
    """Sure and wrong in the fit part, sure and right in the other: softening can only hurt."""
    p = torch.tensor([[0.9, 0.1]], dtype=torch.float64).repeat(20, 1)
    labels = torch.tensor([0] * 7 + [1] * 3 + [0] * 10)
    fit = fit_temperature(
        p.log().unsqueeze(0), labels, torch.arange(20) < 10, torch.arange(20) >= 10
    )
    assert fit.fitted == pytest.approx(math.log(9) / math.log(7 / 3), rel=1e-3)  # p(0) becomes 0.7
    assert not fit.kept
    assert fit.value == 1.0
    assert fit.nll_before == pytest.approx(-math.log(0.9))
    assert fit.nll_after == pytest.approx(-math.log(0.7), rel=1e-3)


def test_only_in_scope_rows_count() -> None:
    log_probs, labels = drawn(2.0)
    expected = fit_temperature(log_probs, labels, HALVES, ~HALVES)
    extra = torch.randn(3, 50, 5, dtype=torch.float64).log_softmax(-1)
    more = torch.cat([log_probs, extra], dim=1)
    outside = torch.cat([labels, torch.full((50,), -1)])
    everywhere = torch.ones(50, dtype=torch.bool)
    found = fit_temperature(
        more, outside, torch.cat([HALVES, everywhere]), torch.cat([~HALVES, everywhere])
    )
    assert found == expected
    assert (found.n_fit, found.n_held_out) == (200, 200)


@pytest.mark.parametrize("part", ["fit", "select"])
def test_a_part_without_in_scope_rows_is_named(part: str) -> None:
    log_probs, labels = drawn(1.0)
    labels = labels.masked_fill(HALVES if part == "fit" else ~HALVES, -1)
    with pytest.raises(DataError, match=f"in the {part} part"):
        fit_temperature(log_probs, labels, HALVES, ~HALVES)


def test_tempering_is_of_logits_and_sample_by_sample() -> None:
    logits = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(1))
    expected = (logits / 2.5).log_softmax(-1)
    torch.testing.assert_close(temper(logits.log_softmax(-1), 2.5), expected)


def test_a_label_that_is_not_allowed_stays_so() -> None:
    log_probs = torch.tensor([0.25, 0.75, 0.0]).log()
    found = temper(log_probs, 2.0).exp()
    root = torch.tensor([0.25, 0.75, 0.0]).sqrt()
    torch.testing.assert_close(found, root / root.sum())


def test_temperature_one_changes_no_bit() -> None:
    prediction = Prediction(torch.randn(2, 3, 4).log_softmax(-1), torch.rand(3))
    found = tempered(prediction, 1.0)
    assert torch.equal(found.log_probs, prediction.log_probs)
    assert tempered(prediction, 3.0).label_mass is prediction.label_mass
