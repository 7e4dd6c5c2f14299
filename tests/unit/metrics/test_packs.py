"""Spread and mutual information from replicate packs, by hand and against every pack there is."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from dalorra_core import metrics
from dalorra_core.config import Design
from dalorra_core.sampling.designs import DESIGNS, sample_uniforms
from tests.support.reference import every_mask, mask_probability

KEEP = (0.35, 0.6, 0.8)
M = 4


def of_masks() -> Tensor:
    """Return the label probabilities of two rows under each of 8 masks, (8, B, C)."""
    z = torch.tensor(every_mask(3)).double()
    generator = torch.Generator().manual_seed(3)
    weights = torch.randn(3, 2 * 4, generator=generator, dtype=torch.float64)
    pairs = (z[:, :1] * z[:, 1:2]) * torch.randn(8, generator=generator, dtype=torch.float64)
    return (z @ weights + pairs).view(8, 2, 4).softmax(-1)


def posterior() -> Tensor:
    weights = [mask_probability(mask, KEEP) for mask in every_mask(3)]
    return torch.tensor(weights).double().view(-1, 1, 1)


def exact() -> tuple[Tensor, Tensor]:
    """Return the variance (B, C) and the mutual information (B,) of the posterior."""
    weights, probs = posterior(), of_masks()
    mean = (weights * probs).sum(0)
    entropy = torch.special.entr(probs).sum(-1)  # (8, B)
    total = torch.special.entr(mean).sum(-1)
    return (weights * (probs - mean).square()).sum(0), total - (weights[..., 0] * entropy).sum(0)


def drawn(design: Design, groups: int, replicates: int) -> Tensor:
    """Return log-probabilities of groups of replicate packs, the groups as rows (R, M, G, B, C)."""
    # the gates of one pack are independent, so many packs are one draw of many gates
    v = sample_uniforms(("packs",), M, (replicates, groups, 3), design)  # (M, R, G, 3)
    index = (v > 1 - torch.tensor(KEEP).double()).long() @ torch.tensor([4, 2, 1])
    return of_masks()[index].log().transpose(0, 1)


def test_values_worked_out_by_hand() -> None:
    # two packs of two samples, means 0.6 and 0.8 for the first label
    first = torch.tensor([[0.9, 0.3], [0.7, 0.9]]).double()  # (R, M)
    log_probs = torch.stack([first, 1 - first], -1).unsqueeze(2).log()  # (R, M, 1, 2)
    assert metrics.pack_mean_variance(log_probs).tolist() == [[pytest.approx(0.02)] * 2]
    assert metrics.pack_variance(log_probs).tolist() == [[pytest.approx(0.05 + 0.02)] * 2]
    found = metrics.pack_information(log_probs)
    assert found.correction.item() == pytest.approx(0.5 * 0.01 * (1 / 0.7 + 1 / 0.3))
    pooled = metrics.mutual_information(log_probs.flatten(0, 1))
    assert found.mutual_information.item() == pytest.approx(pooled.item() + found.correction.item())


@pytest.mark.parametrize("num_samples", [1, 2])
def test_the_spread_is_unbiased_over_all_packs_of_independent_samples(num_samples: int) -> None:
    """Every pair of packs with its probability: no noise, and exact to rounding."""
    masks = torch.tensor(list(itertools.product(range(8), repeat=2 * num_samples)))  # (G, 2 M)
    packs = of_masks()[masks].log().transpose(0, 1).unflatten(0, (2, num_samples))
    each = metrics.pack_variance(packs.flatten(2, 3)).view(len(masks), 2, 4)
    weights = posterior().flatten()[masks].prod(1).view(-1, 1, 1)
    torch.testing.assert_close((weights * each).sum(0), exact()[0])


def test_the_spread_is_unbiased_over_all_stratified_packs() -> None:
    """One gate, M = 2: of p = 0.7 one sample is on for sure, and both with probability 0.4."""
    probs = torch.tensor([[0.2, 0.8], [0.6, 0.4]]).double()
    packs = {(0, 1): 0.3, (1, 0): 0.3, (1, 1): 0.4}  # off in the one stratum or the other
    found, naive = torch.zeros(1, 2).double(), torch.zeros(1, 2).double()
    for (one, p), (two, q) in itertools.product(packs.items(), repeat=2):
        of_both = probs[[*one, *two]].log().view(2, 2, 1, 2)
        found += p * q * metrics.pack_variance(of_both)
        naive += p * q * of_both.exp().var(1, correction=0).mean(0)
    expected = 0.7 * 0.3 * 0.4**2
    assert found.tolist() == [[pytest.approx(expected)] * 2]
    mean_variance = 0.4 * 0.6 / 2**2 * 0.4**2  # f (1 - f) / M^2 of the gate's mean
    assert naive.tolist() == [[pytest.approx(expected - mean_variance)] * 2]


@pytest.mark.parametrize("design", DESIGNS)
@pytest.mark.parametrize("replicates", [2, 4])
def test_the_correction_takes_off_the_bias_under_every_design(
    design: Design, replicates: int
) -> None:
    groups = 20_000 // replicates
    variance, information = exact()
    packs = drawn(design, groups, replicates)
    rows = packs.flatten(2, 3)  # (R, M, G B, C)
    spread = metrics.pack_variance(rows).view(groups, 2, 4)
    error = spread.std(0) / math.sqrt(groups)
    assert ((spread.mean(0) - variance).abs() < 5 * error).all()
    found = metrics.pack_information(rows)
    corrected = found.mutual_information.view(groups, 2)
    one_pack = metrics.mutual_information(rows[0]).view(groups, 2)
    error = corrected.std(0) / math.sqrt(groups)
    # what is left is of third order: a tenth of what was taken off
    allowed = 5 * error + 0.1 * information / M
    assert ((corrected.mean(0) - information).abs() < allowed).all()
    if design == "iid":
        assert (one_pack.mean(0) < 0.85 * information).all()
    assert (found.correction >= 0).all()


def test_equal_packs_need_no_correction_and_labels_without_probability_none() -> None:
    pack = torch.tensor([[[0.5, 0.5, 0.0]], [[0.9, 0.1, 0.0]]]).log()  # (2, 1, 3)
    found = metrics.pack_information(torch.stack([pack, pack]))
    assert found.correction.tolist() == [0.0]
    alone = metrics.mutual_information(pack).item()
    assert found.mutual_information.item() == pytest.approx(alone)
    other = metrics.pack_information(torch.stack([pack, pack.flip(-1).roll(-1, -1)]))
    assert other.correction.isfinite().all()


def test_the_order_of_packs_and_of_samples_changes_nothing() -> None:
    packs = drawn("stratified", 1, 3)[:, :, 0]
    found = metrics.pack_information(packs).mutual_information
    for other in (packs.flip(0), packs.flip(1)):
        torch.testing.assert_close(metrics.pack_information(other).mutual_information, found)


def test_one_pack_says_nothing_of_its_mean_and_nan_stays() -> None:
    with pytest.raises(ValueError, match="at least 2 packs are needed, got 1"):
        metrics.pack_information(torch.zeros(1, 4, 2, 1))
    broken = metrics.pack_information(torch.full((2, 2, 1, 2), torch.nan))
    assert broken.mutual_information.isnan().all()
    assert broken.correction.isnan().all()
