import pytest
import torch
from torch import Tensor, nn

from dalorra_core.base_models import packed
from dalorra_core.base_models.packed import PackedLinear, pack_linears

needs_onednn = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="this torch was built without oneDNN"
)


def linear(d_in: int = 37, d_out: int = 50, *, bias: bool = False) -> nn.Linear:
    layer = nn.Linear(d_in, d_out, bias=bias).requires_grad_(requires_grad=False)
    for parameter in layer.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    return layer


def in_float64(layer: nn.Linear, x: Tensor) -> Tensor:
    bias = 0.0 if layer.bias is None else layer.bias.double()
    return x.double() @ layer.weight.double().T + bias


@needs_onednn
@pytest.mark.parametrize("shape", [(1,), (12,), (3, 5), (2, 3, 130), (0, 4)])
@pytest.mark.parametrize("bias", [False, True])
def test_it_computes_what_the_plain_layer_does(shape: tuple[int, ...], *, bias: bool) -> None:
    plain = linear(bias=bias)
    layer, x = PackedLinear(plain), torch.randn(*shape, 37)
    torch.testing.assert_close(layer(x).double(), in_float64(plain, x), rtol=1e-5, atol=1e-5)


@needs_onednn
def test_its_weight_is_the_plain_one_bit_for_bit() -> None:
    plain = linear()
    layer = PackedLinear(plain)
    assert torch.equal(layer.weight, plain.weight)
    assert (layer.in_features, layer.out_features) == (37, 50)
    assert not list(layer.parameters())
    with pytest.raises(AttributeError, match="no attribute 'wait'"):
        _ = layer.wait


@needs_onednn
def test_derivatives_in_its_inputs_are_those_of_the_plain_layer() -> None:
    plain = linear()
    x, same = (torch.linspace(-1, 1, 74).view(2, 37).requires_grad_() for _ in range(2))
    PackedLinear(plain)(x).square().sum().backward()
    plain(same).square().sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, same.grad)


@needs_onednn
def test_only_float32_layers_of_a_model_are_packed() -> None:
    model = nn.Sequential(linear(), nn.Sequential(linear(50, 8).double()), nn.LayerNorm(8))
    pack_linears(model)
    assert [type(m) for m in model.modules()][1:] == [
        PackedLinear,
        nn.Sequential,
        nn.Linear,
        nn.LayerNorm,
    ]


class Attention(nn.Module):
    """Three layers of one input, as a model names them, and one of another."""

    def __init__(self, *, bias: bool = False) -> None:
        super().__init__()
        self.q_proj, self.o_proj = linear(37, 24, bias=bias), linear(24, 37, bias=bias)
        self.k_proj, self.v_proj = linear(37, 16, bias=bias), linear(37, 10, bias=bias)

    def layers(self) -> list[nn.Linear]:
        return [self.q_proj, self.k_proj, self.v_proj]


@needs_onednn
@pytest.mark.parametrize("bias", [False, True])
def test_layers_of_one_input_share_a_product(*, bias: bool) -> None:
    plain, packed_ones = Attention(bias=bias), Attention(bias=bias)
    pack_linears(packed_ones)
    x, y = torch.randn(2, 5, 37), torch.randn(2, 5, 37)
    for one, other in zip(packed_ones.layers(), plain.layers(), strict=True):
        assert torch.equal(one.weight, other.weight)
    q, k, v = packed_ones.layers()
    for layer, given in ((q, x), (k, x), (v, x), (v, y), (q, y), (q, y), (q, x), (k, x), (k, y)):
        kind = packed_ones.layers().index(layer)
        expected = in_float64(plain.layers()[kind], given)
        torch.testing.assert_close(layer(given).double(), expected, rtol=1e-5, atol=1e-5)
    o = packed_ones.o_proj
    z = torch.randn(3, 24)
    torch.testing.assert_close(o(z).double(), in_float64(plain.o_proj, z), rtol=1e-5, atol=1e-5)


@needs_onednn
def test_a_part_may_be_changed_in_place_and_one_product_serves_all(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = Attention()
    pack_linears(model)
    x = torch.randn(4, 37)
    expected = [layer(x).clone() for layer in model.layers()]
    count = 0
    product = torch.ops.mkldnn._linear_pointwise

    def counted(*args: object) -> Tensor:
        nonlocal count
        count += 1
        return product(*args)

    monkeypatch.setattr(packed.torch.ops.mkldnn, "_linear_pointwise", counted)
    model.q_proj(x).add_(1.0)
    assert torch.equal(model.k_proj(x), expected[1])
    assert torch.equal(model.v_proj(x), expected[2])
    assert count == 1
    assert torch.equal(model.q_proj(x), expected[0])  # all parts were taken: computed again
    assert count == 2


@needs_onednn
def test_layers_with_unlike_inputs_or_biases_have_products_of_their_own() -> None:
    model = Attention()
    model.k_proj = linear(37, 16, bias=True)
    x = torch.randn(4, 37)
    expected = [in_float64(layer, x) for layer in model.layers()]
    pack_linears(model)
    for layer, value in zip(model.layers(), expected, strict=True):
        assert type(layer) is PackedLinear
        torch.testing.assert_close(layer(x).double(), value, rtol=1e-5, atol=1e-5)


def stays_plain(monkeypatch: pytest.MonkeyPatch, layer: object) -> bool:
    """Say whether a model's layer stays as it is where a packed one is made by ``layer``."""
    model = nn.Sequential(linear())
    with monkeypatch.context() as patch:
        patch.setattr(packed, "PackedLinear", layer)
        packed._works.cache_clear()
        pack_linears(model)
    packed._works.cache_clear()
    return type(model[0]) is nn.Linear


@pytest.mark.parametrize("error", [AttributeError, RuntimeError])
def test_without_the_operators_layers_stay_plain(
    monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    def missing(*_: object) -> Tensor:
        raise error("no such operator")

    assert stays_plain(monkeypatch, missing)


def test_operators_that_compute_something_else_are_not_used(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Wrong(nn.Linear):
        def __init__(self, layer: nn.Linear) -> None:
            super().__init__(layer.in_features, layer.out_features)
            self.weight = layer.weight

        def forward(self, input: Tensor) -> Tensor:  # noqa: A002
            return super().forward(input) + 1

    assert stays_plain(monkeypatch, Wrong)
