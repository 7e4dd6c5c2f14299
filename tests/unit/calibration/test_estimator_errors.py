"""Errors against a reference: unbiased against the sum over every mask, under every design."""

import math

import pytest
import torch
from torch import Tensor

from dalorra_core.calibration.estimator_errors import (
    Estimate,
    errors_within,
    estimate,
    excess_bound,
    reference_answers,
    squared_errors,
    squared_mean_errors,
)
from dalorra_core.config import Design
from dalorra_core.errors import ConfigError
from dalorra_core.sampling.designs import DESIGNS, sample_uniforms
from tests.support.reference import every_mask, mask_probability
from tests.support.tiny_models import probs_of_masks, random_rows, tiny_adapter

M, PACKS, REFERENCE, REPEATS = 2, 8, 128, 200
KEEP = (0.91, 0.3, 0.62, 0.5, 0.75, 0.1)


@pytest.fixture(scope="module")
def of_masks() -> Tensor:
    """Return a tiny adapter's probabilities under each of 64 masks, (64, B, C)."""
    tiny = tiny_adapter(r=2, layers=(1, 1))  # six gates
    return probs_of_masks(tiny, random_rows((5, 3, 6)))


def gate_pairs(p: float, design: Design) -> dict[tuple[int, int], float]:
    """Return the probability of both values of one gate in a pack of two, from the definitions."""
    if design == "iid":
        return {(a, b): (p if a else 1 - p) * (p if b else 1 - p) for a in (0, 1) for b in (0, 1)}
    if design == "antithetic":  # v > 1 - p and 1 - v > 1 - p
        both, neither = max(0.0, 2 * p - 1), max(0.0, 1 - 2 * p)
        one = (1 - both - neither) / 2
        return {(1, 1): both, (0, 0): neither, (1, 0): one, (0, 1): one}
    low, high = max(0.0, 2 * p - 1), min(1.0, 2 * p)  # of being on in either half of (0, 1)
    found = dict.fromkeys([(0, 0), (0, 1), (1, 0), (1, 1)], 0.0)
    for first, second in ((low, high), (high, low)):
        for a, b in found:
            found[a, b] += 0.5 * (first if a else 1 - first) * (second if b else 1 - second)
    return found


def exact_errors(of_masks: Tensor, design: Design) -> tuple[float, float]:
    """Return the expected squared errors of a pack of two, summed over all pairs of masks."""
    masks = every_mask(len(KEEP))
    weights = torch.tensor([mask_probability(mask, KEEP) for mask in masks]).double()
    entropy = torch.special.entr(of_masks).sum(-1)  # (64, B)
    truth = torch.einsum("z,zbc->bc", weights, of_masks)
    information = torch.special.entr(truth).sum(-1) - weights @ entropy
    pairs = [gate_pairs(p, design) for p in KEEP]
    both = torch.tensor(
        [
            [math.prod(pair[a, b] for pair, a, b in zip(pairs, x, y, strict=True)) for y in masks]
            for x in masks
        ]
    ).double()  # (64, 64)
    assert float(both.sum()) == pytest.approx(1.0)
    mean = (of_masks[:, None] + of_masks[None]) / 2  # (64, 64, B, C)
    found = torch.special.entr(mean).sum(-1) - (entropy[:, None] + entropy[None]) / 2
    of_mean = (both[..., None] * (mean - truth).square().sum(-1)).sum((0, 1)).mean()
    of_information = (both[..., None] * (found - information).square()).sum((0, 1)).mean()
    return float(of_mean), float(of_information)


def drawn(of_masks: Tensor, name: str, num_samples: int, packs: int, design: Design) -> Tensor:
    """Return log-probabilities of independent packs for every repeat, (repeat, R, M, B, C)."""
    shape = (REPEATS, packs, len(KEEP))
    v = sample_uniforms((name,), num_samples, shape, design)  # (M, repeat, R, gates)
    index = (v > 1 - torch.tensor(KEEP).double()).long() @ 2 ** torch.arange(5, -1, -1)
    return of_masks[index].log().permute(1, 2, 0, 3, 4)


@pytest.mark.parametrize("design", DESIGNS)
def test_errors_are_unbiased_against_the_sum_over_every_mask(
    of_masks: Tensor, design: Design
) -> None:
    references = drawn(of_masks, "reference", REFERENCE, 1, "iid")[:, 0]
    packs = drawn(of_masks, "packs", M, PACKS, design)
    found: dict[str, list[Estimate]] = {"mean": [], "information": []}
    for samples, pack in zip(references, packs, strict=True):
        errors = squared_errors(reference_answers(samples), pack)
        found["mean"].append(estimate(errors.mean))
        found["information"].append(estimate(errors.information))
    exact = dict(zip(found, exact_errors(of_masks, design), strict=True))
    for name, estimates in found.items():
        values = torch.tensor([e.value for e in estimates]).double()
        error = float(values.std()) / math.sqrt(REPEATS)
        assert abs(float(values.mean()) - exact[name]) < 5 * error, name
        # what each estimate says of itself covers how far they are from each other
        said = torch.tensor([e.standard_error for e in estimates]).double().square().mean().sqrt()
        assert said > 0.9 * values.std(), name


def test_errors_of_samples_of_the_reference_are_unbiased_too(of_masks: Tensor) -> None:
    references = drawn(of_masks, "reference", 60, 1, "iid")[:, 0]
    found = [errors_within(samples, (M, 10)) for samples in references]
    assert found[0][M].mean.shape == (6, 3)
    exact = exact_errors(of_masks, "iid")
    values = torch.tensor(
        [[float(f[M].mean.mean()), float(f[M].information.mean())] for f in found]
    )
    error = values.std(0) / math.sqrt(REPEATS)
    assert ((values.mean(0) - torch.tensor(exact)).abs() < 5 * error).all()
    # ten independent samples: a fifth of the error of two
    tens = torch.tensor([float(f[10].mean.mean()) for f in found])
    assert abs(float(tens.mean()) - exact[0] / 5) < 5 * float(tens.std()) / math.sqrt(REPEATS)


def test_the_errors_of_the_reference_itself_are_not_counted(of_masks: Tensor) -> None:
    """With few samples in the reference its own error is as large as what is measured."""
    references = drawn(of_masks, "short reference", 64, 1, "iid")[:, 0]
    exact = torch.einsum(
        "z,zbc->bc",
        torch.tensor([mask_probability(mask, KEEP) for mask in every_mask(6)]).double(),
        of_masks,
    )
    found = torch.stack(
        [squared_mean_errors(reference_answers(samples), exact[None])[0] for samples in references]
    )  # (repeats, B): the exact mean has no error
    error = found.std(0) / math.sqrt(REPEATS)
    assert (found.mean(0).abs() < 5 * error).all()
    raw = torch.stack(
        [(samples.exp().mean(0) - exact).square().sum(-1) for samples in references]
    ).mean(0)
    assert (raw > 5 * error).all()


def test_the_reference_by_hand() -> None:
    first = torch.tensor([0.9, 0.7, 0.6, 0.8] * 16).double()  # mean 0.75, variance 0.0125 n / (n-1)
    samples = torch.stack([first, 1 - first], -1)[:, None].log()  # (64, 1, 2)
    found = reference_answers(samples)
    variance = 0.0125 * 64 / 63
    assert found.mean.tolist() == [[pytest.approx(0.75), pytest.approx(0.25)]]
    assert found.mean_variance.item() == pytest.approx(2 * variance / 64)
    gained = [
        p * math.log(p / 0.75) + (1 - p) * math.log((1 - p) / 0.25) for p in (0.9, 0.7, 0.6, 0.8)
    ]
    mean = sum(gained) / 4
    bias = variance / 128 * (1 / 0.75 + 1 / 0.25)
    assert found.information.item() == pytest.approx(mean + bias)
    spread = sum((g - mean) ** 2 for g in gained) / 4 * 64 / 63
    assert found.information_variance.item() == pytest.approx(spread / 64)


def test_labels_that_are_no_choice_of_a_row_change_nothing() -> None:
    p = torch.tensor([[[0.9, 0.1, 0.0]], [[0.7, 0.3, 0.0]]] * 32)
    found, without = reference_answers(p.log()), reference_answers(p[..., :2].log())
    assert found.information.item() == pytest.approx(without.information.item())
    assert found.information_variance.item() == pytest.approx(without.information_variance.item())


def test_rows_and_packs_both_count() -> None:
    rows, packs = torch.arange(4.0), torch.tensor([0.0, 6.0])
    of_rows = rows.expand(2, 4).double()
    assert estimate(of_rows).standard_error == pytest.approx(math.sqrt(5 / 3 / 4))
    of_packs = packs.double().view(2, 1).expand(2, 4)
    assert estimate(of_packs).standard_error == pytest.approx(3.0)
    many = torch.arange(40.0).double()
    both = many + many.view(40, 1)
    each, counted_twice = float(many.var()) / 40, float(both.var()) / 1600
    assert estimate(both).standard_error == pytest.approx(math.sqrt(2 * each - counted_twice))
    assert estimate(both).value == pytest.approx(39.0)


def test_the_bound_on_a_difference_by_hand() -> None:
    packs = torch.tensor([[0.0], [6.0]]).double().expand(2, 4)  # mean 3, standard error 3
    zero = torch.zeros(3, 4).double()
    # t with one degree of freedom: tan(0.45 pi) = 6.31
    assert excess_bound(packs, zero, 0.95) == pytest.approx(3.0 + 3.0 * math.tan(0.45 * math.pi))
    assert excess_bound(zero, packs, 0.95) == pytest.approx(-3.0 + 3.0 * math.tan(0.45 * math.pi))
    both = excess_bound(packs, packs + 1.0, 0.95)  # their variances add up
    assert both == pytest.approx(-1.0 + math.sqrt(18) * math.tan(0.45 * math.pi))
    rows = torch.arange(4.0).double().expand(9, 4)
    assert excess_bound(rows, rows - 1.0, 0.95) == pytest.approx(1.0)  # the rows are the same


def test_a_reference_has_two_samples_at_least() -> None:
    with pytest.raises(ConfigError, match="at least 2 samples, got 1"):
        reference_answers(torch.full((1, 1, 2), 0.5).log())
