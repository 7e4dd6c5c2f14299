"""dalorra_core.objectives.kl: the gates' divergence, against its definition and torch's."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch.distributions import Bernoulli, Normal, kl_divergence

from dalorra_core.errors import ConfigError
from dalorra_core.objectives.kl import gate_kl, mask_kl, normal_kl, normal_kl_reversed
from tests.support.reference import mask_kl_loop


def phi_of(rows: int, r: int, *, scale: float = 2.0, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(rows, r, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("prior", [0.1, 0.5, 0.7, 0.99])
def test_kl_is_the_sum_over_all_masks(prior: float) -> None:
    phi = phi_of(2, 4)
    expected = mask_kl_loop(phi.sigmoid().flatten().tolist(), prior)
    assert float(mask_kl(phi, prior)) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("prior", [0.1, 0.5, 0.7])
def test_kl_equals_torchs_bernoulli_kl(prior: float) -> None:
    phi = phi_of(65, 8, scale=4.0)
    prior_prob = torch.tensor(prior, dtype=torch.float64)
    expected = kl_divergence(Bernoulli(logits=phi), Bernoulli(prior_prob)).sum()
    torch.testing.assert_close(mask_kl(phi, prior), expected, rtol=1e-10, atol=0)


@pytest.mark.parametrize("prior", [0.2, 0.5, 0.9])
def test_kl_and_its_gradient_are_zero_at_the_prior(prior: float) -> None:
    logit = math.log(prior) - math.log1p(-prior)
    phi = torch.full((65, 8), logit, dtype=torch.float64, requires_grad=True)
    kl = mask_kl(phi, prior)
    kl.backward()
    assert phi.grad is not None
    assert abs(kl.item()) < 1e-12
    assert phi.grad.abs().max() < 1e-15


def test_the_gradient_is_the_one_of_the_paper() -> None:
    """d KL / d phi = p (1 - p) (phi - logit p0), methods.md 4.11."""
    phi = phi_of(3, 5).requires_grad_()
    mask_kl(phi, 0.3).backward()
    p = phi.detach().sigmoid()
    expected = p * (1 - p) * (phi.detach() - math.log(0.3 / 0.7))
    assert phi.grad is not None
    torch.testing.assert_close(phi.grad, expected, rtol=1e-10, atol=1e-14)


def test_gradcheck() -> None:
    phi = phi_of(2, 3).requires_grad_()
    assert torch.autograd.gradcheck(lambda value: mask_kl(value, 0.4), (phi,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("value", "limit"), [(100.0, -math.log(0.3)), (-100.0, -math.log(0.7))])
def test_a_saturated_gate_costs_what_its_limit_does(
    value: float, limit: float, dtype: torch.dtype
) -> None:
    phi = torch.full((1, 2), value, dtype=dtype, requires_grad=True)
    kl = mask_kl(phi, 0.3)
    kl.backward()
    assert kl.item() == pytest.approx(2 * limit, rel=1e-6)
    assert phi.grad is not None
    assert phi.grad.abs().max() < 1e-30


@pytest.mark.parametrize("prior", [0.0, 1.0, -0.1, 1.5, math.nan])
def test_a_prior_outside_its_domain_is_refused_by_name_and_value(prior: float) -> None:
    with pytest.raises(ConfigError, match=f"prior_prob must lie strictly between 0 and 1.*{prior}"):
        mask_kl(torch.zeros(1, 1), prior)


def gaussians(rows: int = 3, k: int = 50) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    mean = torch.randn(rows, k, generator=generator, dtype=torch.float64)
    log_sigma = 2 * torch.randn(rows, k, generator=generator, dtype=torch.float64)
    return mean, log_sigma


@pytest.mark.parametrize("prior", [0.15, 1.0, 3.0])
def test_the_normal_kl_equals_torchs(prior: float) -> None:
    mean, log_sigma = gaussians()
    q, p = Normal(mean, log_sigma.exp()), Normal(torch.zeros_like(mean), prior)
    expected, reverse = kl_divergence(q, p).sum(-1), kl_divergence(p, q).sum(-1)
    torch.testing.assert_close(normal_kl(mean, log_sigma, prior), expected, rtol=1e-12, atol=0)
    found = normal_kl_reversed(mean, log_sigma, prior)
    torch.testing.assert_close(found, reverse, rtol=1e-12, atol=0)
    assert not torch.allclose(expected, reverse, rtol=0.1)


def test_one_sigma_for_a_row_counts_once_for_each_entry() -> None:
    mean, log_sigma = gaussians()
    row = log_sigma[:, :1]
    expected = kl_divergence(Normal(mean, row.exp()), Normal(torch.zeros_like(mean), 0.2)).sum(-1)
    torch.testing.assert_close(normal_kl(mean, row, 0.2), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("divergence", [normal_kl, normal_kl_reversed])
def test_the_normal_kl_is_zero_with_zero_gradient_at_the_prior(divergence: Any) -> None:
    mean = torch.zeros(2, 5, requires_grad=True)
    log_sigma = torch.full((2, 5), math.log(0.2), dtype=torch.float64, requires_grad=True)
    value = divergence(mean, log_sigma, 0.2).sum()
    value.backward()
    assert abs(value.item()) < 1e-15
    assert mean.grad is not None
    assert log_sigma.grad is not None
    assert max(mean.grad.abs().max(), log_sigma.grad.abs().max()) < 1e-15


@pytest.mark.parametrize("divergence", [normal_kl, normal_kl_reversed])
def test_gradcheck_of_the_normal_kl(divergence: Any) -> None:
    mean, log_sigma = gaussians(2, 3)
    arguments = (mean.requires_grad_(), (0.3 * log_sigma).requires_grad_())
    assert torch.autograd.gradcheck(lambda m, s: divergence(m, s, 0.7), arguments)


def test_a_sum_over_many_float32_weights_loses_no_digits() -> None:
    """The published shapes: 2.1 million weights of about 4 nats each, from float32 parameters."""
    generator = torch.Generator().manual_seed(2)
    mean = 0.01 * torch.randn(65, 32768, generator=generator)
    log_sigma = math.log(0.002) + 0.1 * torch.randn(65, 32768, generator=generator)
    m, s = mean.double().numpy(), log_sigma.double().exp().numpy()
    terms = np.log(0.15 / s) + (s * s + m * m) / (2 * 0.15**2) - 0.5
    expected = math.fsum(terms.ravel().tolist())
    assert float(normal_kl(mean, log_sigma, 0.15).sum()) == pytest.approx(expected, rel=1e-12)


def test_extreme_standard_deviations_have_finite_values_and_gradients() -> None:
    log_sigma = torch.tensor([-300.0, -30.0, 30.0], requires_grad=True)
    value = normal_kl(torch.tensor([0.0, 1e4, -1e4]), log_sigma, 0.1)
    value.backward()
    assert value.isfinite()
    assert log_sigma.grad is not None
    assert log_sigma.grad.isfinite().all()
    assert log_sigma.grad[:2].tolist() == [-1.0, -1.0]


@pytest.mark.parametrize("divergence", [normal_kl, normal_kl_reversed])
@pytest.mark.parametrize("prior", [0.0, -0.1, math.nan])
def test_a_prior_without_spread_is_refused(divergence: Any, prior: float) -> None:
    with pytest.raises(ConfigError, match=f"prior_sigma must be positive, got {prior}"):
        divergence(torch.zeros(1), torch.zeros(1), prior)


def test_the_divergence_of_single_gates_is_torchs() -> None:
    generator = torch.Generator().manual_seed(0)
    phi, prior = 3 * torch.randn(2, 4, 3, generator=generator, dtype=torch.float64)
    theirs = kl_divergence(Bernoulli(logits=phi), Bernoulli(logits=prior))
    torch.testing.assert_close(gate_kl(phi, prior), theirs, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(
        gate_kl(phi, torch.zeros(3, dtype=torch.float64)).sum(), mask_kl(phi, 0.5)
    )


def test_saturated_gates_have_a_finite_divergence_and_gradient() -> None:
    phi = torch.tensor([100.0, -100.0, 100.0], requires_grad=True)
    prior = torch.tensor([100.0, 0.0, -100.0], requires_grad=True)
    found = gate_kl(phi, prior)
    assert found.tolist() == pytest.approx([0.0, math.log(2), 100.0], abs=1e-5)
    found.sum().backward()
    assert phi.grad is not None
    assert prior.grad is not None
    assert phi.grad.isfinite().all()
    assert prior.grad.isfinite().all()
