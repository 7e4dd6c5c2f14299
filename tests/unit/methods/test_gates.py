"""The gates of DALorRA: relaxed in training, hard in prediction, from the same noise."""

import math
from typing import Any

import pytest
import torch
from torch.distributions import RelaxedBernoulli

from dalorra_core.methods import METHODS
from dalorra_core.methods.dalorra import DalorraConfig, gates_of, hard_gates, relaxed_gates
from dalorra_core.sampling.designs import iid_uniforms
from tests.support.tiny_models import tiny_adapter


def phi_of(rows: int = 2, r: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return 1.5 * torch.randn(rows, r, generator=generator, dtype=torch.float64)


def test_relaxed_gates_follow_the_paper() -> None:
    """Eq. 3: z = sigmoid((phi + log v - log(1 - v)) / tau)."""
    phi, v = phi_of(), iid_uniforms(("t",), 4, 2, 3)
    z = relaxed_gates(phi, v, 0.3)
    for m in range(4):
        for i in range(2):
            for j in range(3):
                noise = math.log(v[m, i, j]) - math.log(1 - v[m, i, j])
                expected = 1 / (1 + math.exp(-(phi[i, j] + noise) / 0.3))
                assert z[m, i, j].item() == pytest.approx(expected, rel=1e-5, abs=1e-9)


@pytest.mark.parametrize(
    ("keep", "tau", "mean", "sd"),
    [
        (0.3, 0.1, 0.302, 0.436),
        (0.3, 2 / 3, 0.338, 0.324),
        (0.3, 1.0, 0.362, 0.275),
        (0.5, 2 / 3, 0.500, 0.344),
        (0.5, 2.0, 0.500, 0.188),
    ],
)
def test_moments_by_quadrature_are_those_of_the_design(
    keep: float, tau: float, mean: float, sd: float
) -> None:
    """methods.md 4.11, table of the train/test mismatch; midpoint rule over the uniforms."""
    n = 200_000
    v = ((torch.arange(n, dtype=torch.float64) + 0.5) / n).view(n, 1, 1)
    z = relaxed_gates(torch.tensor([[math.log(keep / (1 - keep))]]), v, tau).double()
    assert z.mean().item() == pytest.approx(mean, abs=1.5e-3)
    assert z.std(correction=0).item() == pytest.approx(sd, abs=1.5e-3)


def test_moments_match_torchs_relaxed_bernoulli() -> None:
    n, tau, phi = 20_000, 0.5, torch.tensor([[-1.0, 0.3, 2.0]])
    ours = relaxed_gates(phi, iid_uniforms(("moments",), n, 1, 3), tau)[:, 0]  # (n, 3)
    with torch.random.fork_rng():
        torch.default_generator.manual_seed(0)
        theirs: Any = RelaxedBernoulli(torch.tensor(tau), logits=phi[0]).sample(torch.Size([n]))
    for power in (1, 2):
        a, b = ours.double() ** power, theirs.double() ** power
        error = ((a.var(0) + b.var(0)) / n).sqrt()
        assert ((a.mean(0) - b.mean(0)).abs() < 5 * error).all()


def test_the_gradient_of_relaxed_gates() -> None:
    v = iid_uniforms(("grad",), 3, 2, 3)
    phi = phi_of().requires_grad_()
    assert torch.autograd.gradcheck(lambda value: relaxed_gates(value, v, 2 / 3), (phi,))
    relaxed_gates(phi, v, 0.5).sum().backward()
    z = relaxed_gates(phi.detach(), v, 0.5)
    assert phi.grad is not None
    torch.testing.assert_close(phi.grad, (z * (1 - z) / 0.5).sum(0), rtol=1e-6, atol=1e-9)


def test_hard_gates_are_the_limit_of_relaxed_ones() -> None:
    phi, v = phi_of(), iid_uniforms(("limit",), 500, 2, 3)
    hard = hard_gates(phi, v)
    torch.testing.assert_close(relaxed_gates(phi, v, 1e-7).float(), hard, rtol=0, atol=1e-6)
    agree = (relaxed_gates(phi, v, 2 / 3) > 0.5) == hard.bool()
    assert agree.all()  # at every temperature a gate is on the side of its hard value


def test_hard_gates_are_one_with_the_keep_probability() -> None:
    n, phi = 20_000, torch.tensor([[-3.0, -0.5, 0.0, 1.0, 4.0]])
    z = hard_gates(phi, iid_uniforms(("share",), n, 1, 5))[:, 0].double()
    p = phi[0].double().sigmoid()
    assert set(z.unique().tolist()) == {0.0, 1.0}
    assert ((z.mean(0) - p).abs() < 5 * (p * (1 - p) / n).sqrt()).all()
    covariance = torch.cov(z.T) - torch.diag(torch.diag(torch.cov(z.T)))
    assert covariance.abs().max() < 5 * 0.25 / math.sqrt(n)


def test_saturated_gates_are_certain() -> None:
    v = iid_uniforms(("certain",), 1000, 1, 2)
    z = hard_gates(torch.tensor([[100.0, -100.0]]), v)
    assert torch.equal(z, torch.tensor([1.0, 0.0]).expand(1000, 1, 2))
    edges = torch.tensor([0.5**54, 1.0 - 2**-53], dtype=torch.float64).view(2, 1, 1)
    phi = torch.tensor([[100.0, -100.0]], requires_grad=True)
    relaxed = relaxed_gates(phi, edges, 0.1)
    relaxed.sum().backward()
    assert phi.grad is not None
    assert phi.grad.isfinite().all()
    assert torch.equal(relaxed[0], torch.tensor([[1.0, 0.0]]))


def test_the_mean_of_the_gates_is_the_keep_probability() -> None:
    phi, v = phi_of(), iid_uniforms(("t",), 4, 2, 3)
    assert torch.equal(gates_of(phi, None, "hard", 0.3), phi.sigmoid())
    assert torch.equal(gates_of(phi, v, "mean", 0.3), phi.sigmoid())


def test_shapes_are_those_of_what_a_run_begins_with() -> None:
    specs, config = tiny_adapter().state.specs, DalorraConfig()
    begun = METHODS["dalorra"].init(specs, 3, 0, config)
    assert METHODS["dalorra"].shapes(specs, 3, config) == {
        n: tuple(t.shape) for n, t in begun.items()
    }
