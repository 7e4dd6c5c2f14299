"""dalorra_core.adapters.flipout: the noise of a token, of two tokens, of two rows."""

import math

import pytest
import torch
from torch import Tensor

from dalorra_core.adapters.flipout import FlippedNoise

R, D, M = 3, 7, 6000


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def sigma() -> Tensor:
    return 0.2 + random(R, D, seed=3).abs()


@pytest.fixture(scope="module")
def drawn(sigma: Tensor) -> Tensor:
    """Noise of many samples on two rows of two tokens with equal inputs: (M, 2, 2, R), float64."""
    noise = sigma * random(M, R, D, seed=1)
    h = random(D, seed=2).expand(M, 2, 2, D)
    return FlippedNoise(noise, ("t", "q"), by_row=True)(h).double()


def test_the_variance_of_a_token_is_the_sum_of_sigma_squared_h_squared(
    drawn: Tensor, sigma: Tensor
) -> None:
    expected = (sigma.square() @ random(D, seed=2).square()).double()  # (R,)
    found = drawn.square().mean(0)  # (2, 2, R); the mean is 0
    standard_error = expected * math.sqrt(2 / M)  # of a normal's variance
    assert ((found - expected).abs() < 5 * standard_error).all()
    assert (drawn.mean(0).abs() < 5 * (expected / M).sqrt()).all()


def test_noise_is_uncorrelated_across_tokens_rows_and_ranks(drawn: Tensor) -> None:
    columns = drawn.flatten(1)  # (M, 4 R)
    columns = columns / columns.square().mean(0).sqrt()
    products = columns.unsqueeze(2) * columns.unsqueeze(1)  # (M, 4 R, 4 R)
    error = products.var(0).sqrt() / math.sqrt(M)
    off = products.mean(0).abs() - 5 * error
    assert (off - 1e9 * torch.eye(4 * R, dtype=torch.float64)).max() < 0


def test_tokens_share_the_noise_up_to_signs(sigma: Tensor) -> None:
    """With one input switched on, all tokens have the same size of noise: only signs differ."""
    noise = sigma * random(1, R, D, seed=1)
    h = torch.zeros(1, 2, 3, D)
    h[..., 4] = 2.0
    u = FlippedNoise(noise, ("t",), by_row=True)(h)
    torch.testing.assert_close(u.abs(), 2 * noise[:, :, 4].abs().expand_as(u[0])[None])
    assert (u < 0).any()
    assert (u > 0).any()


@pytest.mark.parametrize("by_row", [False, True])
@pytest.mark.parametrize("middle", [(), (4,)])
def test_the_formula_token_by_token(by_row: bool, middle: tuple[int, ...]) -> None:
    noise, x = random(2, R, D, seed=1), random(2, 3, *middle, D, seed=4)
    flipped = FlippedNoise(noise, ("k",), by_row=by_row)
    inner, outer = flipped.signs(x)
    assert {*inner.unique().tolist(), *outer.unique().tolist()} == {-1.0, 1.0}
    found = flipped(x)
    assert found.shape == (2, 3, *middle, R)
    inner, outer = inner.expand_as(x), outer.expand_as(found)
    for m in range(2):
        for place in torch.cartesian_prod(*(torch.arange(k) for k in (3, *middle))).view(
            -1, 1 + len(middle)
        ):
            at = (m, *place.tolist())
            expected = outer[at].double() * (
                noise[m].double() @ (inner[at].double() * x[at].double())
            )
            torch.testing.assert_close(found[at].double(), expected, rtol=1e-5, atol=1e-5)


def test_signs_at_prediction_depend_on_sample_and_position_alone() -> None:
    noise, long = random(3, R, D, seed=1), random(3, 2, 9, D, seed=4)
    flipped = FlippedNoise(noise, ("k",))
    whole = flipped(long)
    torch.testing.assert_close(flipped(long[:, :1, :5]), whole[:, :1, :5])
    torch.testing.assert_close(flipped(long.flip(1)), whole.flip(1))
    part = flipped.narrow(1, 3)
    assert part.first == 1
    torch.testing.assert_close(part(long[1:]), whole[1:])
    torch.testing.assert_close(part.narrow(1, 2)(long[2:]), whole[2:])
    inner, _ = flipped.signs(long)
    assert not torch.equal(inner[0], inner[1])
    assert not torch.equal(inner[0, :, 0], inner[0, :, 1])
    other, _ = FlippedNoise(noise, ("l",)).signs(long)
    assert not torch.equal(inner, other)


def test_rows_have_signs_of_their_own_in_training_only() -> None:
    noise, x = random(1, R, D, seed=1), random(1, 1, 4, D, seed=4).expand(1, 2, 4, D)
    together, apart = FlippedNoise(noise, ("k",)), FlippedNoise(noise, ("k",), by_row=True)
    assert torch.equal(together(x)[:, 0], together(x)[:, 1])
    assert not torch.equal(apart(x)[:, 0], apart(x)[:, 1])


def test_gradients_reach_the_noise_and_the_input() -> None:
    noise = random(2, R, D, seed=1).double().requires_grad_()
    x = random(2, 2, 3, D, seed=4).double().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda n, h: FlippedNoise(n, ("k",), by_row=True)(h), (noise, x)
    )


def test_it_keeps_the_dtype_of_its_input_and_moves_whole() -> None:
    flipped = FlippedNoise(random(2, R, D), ("k",))
    moved = flipped.to(torch.device("cpu"), torch.float64)
    assert moved.noise.dtype == torch.float64
    assert [t.shape for t in moved.tensors()] == [(2, R, D)]
    x = random(2, 2, 3, D, seed=4)
    low = flipped(x.bfloat16())
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.float(), flipped(x), rtol=0.05, atol=0.1)
