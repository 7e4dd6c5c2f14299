"""dalorra_core.objectives.kl: the gates' divergence, against its definition and torch's."""

import math

import pytest
import torch
from torch.distributions import Bernoulli, kl_divergence

from dalorra_core.errors import ConfigError
from dalorra_core.objectives.kl import mask_kl
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
