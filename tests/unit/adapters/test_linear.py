"""dalorra_core.adapters.linear: the adapted layer against loops over samples and ranks."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from dalorra_core.adapters.binding import Binding
from dalorra_core.adapters.linear import AdaptedLinear, low_rank_delta
from dalorra_core.adapters.pack import ModulePack, SamplePack, fold

M, B, T, D_IN, D_OUT, R = 3, 2, 4, 5, 6, 2


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def module_of(*, own_a: bool, own_b: bool, gated: bool) -> ModulePack:
    return ModulePack(
        random(M if own_a else 1, R, D_IN, seed=1),
        random(M if own_b else 1, D_OUT, R, seed=2),
        random(M, R, seed=3) if gated else None,
    )


def by_loops(h: Tensor, module: ModulePack, scaling: float) -> Tensor:
    """Return sum_j z_mj b_j (a_j . h) for each folded row, one rank at a time."""
    out = torch.zeros(*h.shape[:-1], D_OUT, dtype=torch.float64)
    rows = h.shape[0] // M
    for n in range(h.shape[0]):
        m = n // rows
        a = module.lora_A[m if len(module.lora_A) > 1 else 0]
        b = module.lora_B[m if len(module.lora_B) > 1 else 0]
        for j in range(R):
            z = 1.0 if module.z is None else float(module.z[m, j])
            out[n] += scaling * z * (h[n] @ a[j]).unsqueeze(-1) * b[:, j]
    return out


@pytest.mark.parametrize("own_a", [False, True])
@pytest.mark.parametrize("own_b", [False, True])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("shape", [(M * B, D_IN), (M * B, T, D_IN)])
def test_the_low_rank_part_is_the_sum_over_ranks(
    own_a: bool, own_b: bool, gated: bool, shape: tuple[int, ...]
) -> None:
    module = module_of(own_a=own_a, own_b=own_b, gated=gated)
    h = random(*shape, seed=4)
    found = low_rank_delta(h, module, M, 1.5)
    torch.testing.assert_close(found, by_loops(h, module, 1.5), rtol=1e-12, atol=1e-12)


def test_the_result_has_the_dtype_of_the_states() -> None:
    module = module_of(own_a=False, own_b=False, gated=True)
    h = random(M * B, D_IN, seed=4)
    found = low_rank_delta(h.bfloat16(), module, M, 1.5)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), by_loops(h, module, 1.5), rtol=0.05, atol=0.2)


@pytest.mark.parametrize("own_b", [False, True])
@pytest.mark.parametrize("gradients", [False, True])
def test_a_layer_adds_the_bound_part_and_only_that(own_b: bool, gradients: bool) -> None:
    base = nn.Linear(D_IN, D_OUT, dtype=torch.float64)
    binding = Binding()
    layer = AdaptedLinear(base, "q", binding)
    h = random(M * B, T, D_IN, seed=4)
    module, before = module_of(own_a=False, own_b=own_b, gated=True), h.clone()
    with torch.set_grad_enabled(gradients):
        assert torch.equal(layer(h), base(h))
        with binding.bind(SamplePack(M, 2.0, {"other": module})):
            assert torch.equal(layer(h), base(h))
        with binding.bind(SamplePack(M, 2.0, {"q": module})):
            torch.testing.assert_close(layer(h), base(h) + by_loops(h, module, 2.0))
        assert torch.equal(layer(h), base(h))
    assert torch.equal(h, before)


@pytest.mark.parametrize("own_b", [False, True])
@pytest.mark.parametrize("gradients", [False, True])
def test_a_layer_under_autocast_adds_its_part_in_the_lower_precision(
    own_b: bool, gradients: bool
) -> None:
    base, binding = nn.Linear(D_IN, D_OUT), Binding()
    layer = AdaptedLinear(base, "q", binding)
    h, module = random(M * B, T, D_IN, seed=4), module_of(own_a=False, own_b=own_b, gated=True)
    pack = SamplePack(M, 2.0, {"q": module}).to(torch.device("cpu"), torch.float32)
    with (
        torch.set_grad_enabled(gradients),
        torch.autocast("cpu", dtype=torch.bfloat16),
        binding.bind(pack),
    ):
        found = layer(h.float())
    assert found.dtype == torch.bfloat16
    expected = base.double()(h) + by_loops(h, module, 2.0)
    torch.testing.assert_close(found.double(), expected, rtol=0.05, atol=0.2)


@pytest.mark.parametrize("own_b", [False, True])
def test_the_gradients_of_a_layer_are_those_of_the_sum(own_b: bool) -> None:
    base, binding = nn.Linear(D_IN, D_OUT, dtype=torch.float64), Binding()
    layer, h = AdaptedLinear(base, "q", binding), random(M, B, T, D_IN, seed=4)
    weight = random(M * B, T, D_OUT, seed=7)
    plain = module_of(own_a=False, own_b=own_b, gated=True)
    assert plain.z is not None
    down, up, z = (x.clone().requires_grad_() for x in (plain.lora_A, plain.lora_B, plain.z))
    with binding.bind(SamplePack(M, 2.0, {"q": ModulePack(down, up, z)})):
        found = layer(h.flatten(0, 1))
    u = torch.einsum("mbti,ri,mr->mbtr", h, down[0], z)
    delta = 2.0 * torch.einsum("mbtr,mor->mbto", u, up.expand(M, D_OUT, R))
    expected = base(h.flatten(0, 1)) + delta.flatten(0, 1)
    for ours, theirs in zip(
        torch.autograd.grad((found * weight).sum(), (down, up, z)),
        torch.autograd.grad((expected * weight).sum(), (down, up, z)),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


def test_a_layer_adds_each_packs_part_to_its_own_rows() -> None:
    """Three groups; the middle pack does not adapt this layer; ranks and scalings differ."""
    base = nn.Linear(D_IN, D_OUT, dtype=torch.float64)
    binding = Binding()
    layer = AdaptedLinear(base, "q", binding)
    counts = (2, 1, 3)
    h = random(M * sum(counts), T, D_IN, seed=4)
    first = module_of(own_a=False, own_b=True, gated=True)
    last = ModulePack(random(1, 7, D_IN, seed=5), random(1, D_OUT, 7, seed=6), None)
    packs = (
        SamplePack(M, 2.0, {"q": first}),
        SamplePack(M, 2.0, {"other": first}),
        SamplePack(M, 0.5, {"q": last}),
    )
    with torch.no_grad(), binding.bind(*packs, rows=counts):
        found = layer(h).unflatten(0, (M, -1))  # (M, B, T, d_out)
    rows = h.unflatten(0, (M, -1))
    for pack, own in zip(packs, (slice(0, 2), slice(2, 3), slice(3, 6)), strict=True):
        with torch.no_grad(), binding.bind(pack):
            alone = layer(rows[:, own].flatten(0, 1))
        torch.testing.assert_close(found[:, own].flatten(0, 1), alone, rtol=1e-12, atol=1e-12)
    assert torch.equal(found[:, 2:3], base(rows[:, 2:3]))


@pytest.mark.parametrize("copies", [1, M])
@pytest.mark.parametrize("several", [False, True])
def test_a_module_that_samples_share_is_the_same_before_and_after_rows_are_repeated(
    copies: int, several: bool
) -> None:
    base, binding = nn.Linear(D_IN, D_OUT, dtype=torch.float64), Binding()
    layer = AdaptedLinear(base, "q", binding)
    one = ModulePack(random(1, R, D_IN, seed=1), random(1, D_OUT, R, seed=2), random(1, R, seed=3))
    other = ModulePack(random(1, R, D_IN, seed=5), random(1, D_OUT, R, seed=6))
    once = random(B, T, D_IN, seed=4)
    h = fold(once, copies)
    packs = [SamplePack(M, 2.0, {"q": module}) for module in (one, other)[: 1 + several]]
    with binding.bind(*packs, rows=(1, B - 1) if several else ()):
        found = layer(h)
    for n in range(len(h)):
        mine = other if several and n % B > 0 else one
        each = replace(mine, z=None if mine.z is None else mine.z.expand(M, R))
        expected = base(h[n]) + by_loops(h[n].expand(M, T, D_IN), each, 2.0)[0]
        torch.testing.assert_close(found[n], expected)
