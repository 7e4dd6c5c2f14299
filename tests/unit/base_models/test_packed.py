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
