"""dalorra_core.sampling.designs: how M samples lie to each other, and that each alone is exact."""

import hashlib
import math
from typing import get_args

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from dalorra_core.config import Design
from dalorra_core.sampling import designs
from dalorra_core.sampling.designs import (
    DESIGNS,
    iid_normals,
    iid_uniforms,
    sample_normals,
    sample_uniforms,
    spread_uniforms,
)
from dalorra_core.sampling.streams import LARGEST, uniforms

every_design = pytest.mark.parametrize("design", DESIGNS)

IID_SHA256 = "967b37733691ef78425052e2ecc8461b9cb932962139025592a0acb01cc022fb"
IID_SAMPLE = [0.9441781405563341, 0.5331147320245795, 0.035089062561212636]
IID_NORMALS = [0.2976553440093994, 0.04865746572613716, 1.0224735736846924, 0.6645653247833252]


def drawn(design: Design, num_samples: int, size: int, name: str = "draw") -> Tensor:
    """Return (M, size)."""
    return sample_uniforms((name, design), num_samples, (size,), design)


def test_iid_draws_are_those_of_before_there_were_designs() -> None:
    """Recorded then: every stored probe and every id of a mask set depends on them."""
    u = iid_uniforms(("sha", 3), 10, 5, 8)
    assert hashlib.sha256(u.numpy().tobytes()).hexdigest() == IID_SHA256
    assert iid_uniforms(("sha", 3), 4, 2, 3)[2].flatten()[:3].tolist() == IID_SAMPLE
    normal = iid_normals(("noise", 1), 4, (3, 20))[2, 1, :4].tolist()
    assert normal == pytest.approx(IID_NORMALS, rel=1e-6)


def test_the_names_are_those_of_the_settings() -> None:
    assert DESIGNS == get_args(Design) == ("iid", "stratified", "antithetic")


@every_design
@pytest.mark.parametrize("num_samples", [1, 2, 5])
def test_each_sample_alone_is_uniform_and_its_numbers_independent(
    design: Design, num_samples: int
) -> None:
    n = 20_000
    for row in drawn(design, num_samples, n).numpy():
        assert ((row > 0) & (row < 1)).all()
        assert abs(row.mean() - 0.5) < 5 * math.sqrt(1 / 12 / n)
        assert abs((row**2).mean() - 1 / 3) < 5 * math.sqrt(4 / 45 / n)
        assert abs(np.corrcoef(row[:-1], row[1:])[0, 1]) < 5 / math.sqrt(n)
        counts = np.bincount((row * 16).astype(int), minlength=16)
        # chi-square of 15 degrees of freedom: mean 15, sd sqrt(30)
        assert ((counts - n / 16) ** 2 / (n / 16)).sum() < 15 + 5 * math.sqrt(30)


@every_design
def test_normals_are_the_quantiles_of_the_uniforms(design: Design) -> None:
    key, shape = ("noise", 1), (3, 700)
    normal = sample_normals(key, 5, shape, design)
    assert (normal.shape, normal.dtype) == ((5, *shape), torch.float32)
    expected = stats.norm.ppf(sample_uniforms(key, 5, shape, design).numpy())
    torch.testing.assert_close(normal, torch.from_numpy(expected).float())
    assert all(stats.kstest(row.flatten().numpy(), "norm").pvalue > 1e-5 for row in normal)


@every_design
def test_a_draw_follows_its_name_and_shape_is_only_form(design: Design) -> None:
    first = sample_uniforms(("a", 1), 3, (2, 4), design)
    assert torch.equal(first.flatten(1), sample_uniforms(("a", 1), 3, (8,), design))
    assert not torch.equal(first, sample_uniforms(("a", 2), 3, (2, 4), design))
    assert (first.dtype, first.shape) == (torch.float64, (3, 2, 4))


@pytest.mark.parametrize("num_samples", [1, 2, 3, 4, 10, 17])
def test_stratified_numbers_have_one_sample_in_every_stratum(num_samples: int) -> None:
    v = drawn("stratified", num_samples, 300)
    strata = (v * num_samples).long().sort(dim=0).values
    assert torch.equal(strata, torch.arange(num_samples).unsqueeze(1).expand(-1, 300))


@pytest.mark.parametrize("num_samples", [2, 3, 4, 10])
@pytest.mark.parametrize("keep", [0.03, 0.25, 0.5, 0.62, 0.91, 1.0])
def test_a_stratified_gate_is_on_in_m_p_samples_rounded_down_or_up(
    num_samples: int, keep: float
) -> None:
    n = 4000
    active = (drawn("stratified", num_samples, n) > 1 - keep).sum(0)
    whole = round(num_samples * keep, 9)
    floor, up = math.floor(whole), whole - math.floor(whole)
    assert ((active == floor) | (active == math.ceil(whole))).all()
    share = (active > floor).double().mean()
    assert abs(share - up) <= 5 * math.sqrt(up * (1 - up) / n)


@pytest.mark.parametrize(("num_samples", "keep"), [(4, 0.91), (4, 0.55), (10, 0.53), (3, 0.5)])
def test_the_variance_of_a_stratified_gates_mean_is_f_times_1_minus_f_over_m_squared(
    num_samples: int, keep: float
) -> None:
    n, f = 40_000, num_samples * keep % 1
    mean = (drawn("stratified", num_samples, n) > 1 - keep).double().mean(0)
    expected = f * (1 - f) / num_samples**2
    # M times the mean less its floor is a coin of probability f; the bound is for its variance
    fourth = f * (1 - f) * (1 - 3 * f * (1 - f)) / num_samples**4
    error = math.sqrt((fourth - expected**2) / n) + expected / n
    assert abs(float(mean.var()) - expected) < 5 * error
    assert expected < keep * (1 - keep) / num_samples  # of iid


@pytest.mark.parametrize(("num_samples", "keep"), [(4, 0.25), (4, 0.5), (10, 0.5), (8, 0.875)])
def test_a_gate_with_whole_m_p_has_no_variance_at_all(num_samples: int, keep: float) -> None:
    active = drawn("stratified", num_samples, 5000) > 1 - keep
    assert (active.sum(0) == num_samples * keep).all()


def test_orders_of_different_numbers_are_independent_and_all_as_likely() -> None:
    n = 12_000
    strata = (drawn("stratified", 3, n) * 3).long()
    order = strata[0] * 3 + strata[1]  # which says all three
    counts = torch.bincount(order, minlength=9)[[1, 2, 3, 5, 6, 7]]
    assert counts.sum() == n
    assert ((counts - n / 6).abs() < 5 * math.sqrt(n * 5 / 36)).all()
    pairs = torch.bincount(strata[0, ::2] * 3 + strata[0, 1::2], minlength=9)
    assert ((pairs - n / 18).abs() < 5 * math.sqrt(n / 2 * 8 / 81)).all()


def test_stratified_sets_of_other_sizes_are_other_sets() -> None:
    assert not torch.equal(drawn("stratified", 4, 9), drawn("stratified", 10, 9)[:4])


@pytest.mark.parametrize("num_samples", [1, 2, 3, 6, 7])
def test_antithetic_samples_are_pairs_that_sum_to_one(num_samples: int) -> None:
    v = drawn("antithetic", num_samples, 500)
    pairs = num_samples // 2
    assert torch.equal(v[1 : 2 * pairs : 2], 1 - v[0 : 2 * pairs : 2])
    assert torch.equal(v, drawn("antithetic", 8, 500)[:num_samples])  # a longer draw begins so
    singles = v[::2]
    assert len(torch.unique(singles[:, 0])) == len(singles)


@pytest.mark.parametrize("keep", [0.5, 0.62, 0.91, 0.25])
def test_the_variance_of_an_antithetic_gates_mean(keep: float) -> None:
    n = 40_000
    mean = (drawn("antithetic", 4, n) > 1 - keep).double().mean(0)
    iid = keep * (1 - keep) / 4
    expected = iid * (1 - min(keep, 1 - keep) / max(keep, 1 - keep))
    fourth = (mean - keep).pow(4).mean()
    error = float((fourth - expected**2).clamp(min=0) / n) ** 0.5
    assert abs(float((mean - keep).square().mean()) - expected) <= 5 * error + 1e-15


def test_antithetic_noise_is_opposite() -> None:
    eps = sample_normals(("eps",), 4, (1000,), "antithetic")
    torch.testing.assert_close(eps[1::2], -eps[::2])


@pytest.mark.parametrize("word", [0.5**54, LARGEST])
@every_design
def test_no_number_reaches_zero_or_one(
    monkeypatch: pytest.MonkeyPatch, design: Design, word: float
) -> None:
    def extreme(_: object, size: int) -> np.ndarray:
        return np.full(size, word)

    monkeypatch.setattr(designs, "uniforms", extreme)
    for num_samples in (2, 3, 10):
        v = drawn(design, num_samples, 4)
        assert ((v > 0) & (v < 1)).all()
        assert sample_normals(("x",), num_samples, (4,), design).isfinite().all()


def test_a_stratified_sample_is_made_of_its_own_stream() -> None:
    v = sample_uniforms(("sha", 3), 4, (5,), "stratified")
    streams = [uniforms(("sha", 3, "stratified", 4, m), 10) for m in range(4)]
    for j in range(5):
        order = sorted(range(4), key=lambda m: streams[m][j])
        expected = [(order[m] + streams[m][5 + j]) / 4 for m in range(4)]
        assert v[:, j].tolist() == expected


def test_spread_uniforms_are_uniform_one_by_one_and_even_together() -> None:
    n = 1000
    first = torch.stack([spread_uniforms(("u", i), 6, 3) for i in range(n)])  # (n, 6)
    for m in range(6):
        assert abs(first[:, m].mean().item() - 0.5) < 5 / math.sqrt(12 * n)
        assert abs(first[:, m].var().item() - 1 / 12) < 5 * math.sqrt(1 / 180 / n)
    assert first.min() >= 0
    assert first.max() < 1
    for block in (first[:, :3], first[:, 3:]):
        assert torch.equal((3 * block).long().sort(1).values, torch.arange(3).expand(n, 3))
    assert torch.equal(spread_uniforms(("u", 0), 3, 3), first[0, :3])
    assert len(set(spread_uniforms(("one",), 5, 1).tolist())) == 5
