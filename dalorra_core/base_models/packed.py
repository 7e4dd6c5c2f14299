"""Linear layers for inference on a CPU: weights lie in memory as oneDNN's products read them.

A product with few rows otherwise spends its time on arranging the weight, anew at every call
(docs/decisions/0034).
"""

import ctypes
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

__all__ = ["PackedLinear", "pack_linears"]

_ROWS = 120
"""Rows of the products that the arrangement is chosen for: ten samples of a short prompt."""

_SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Layers that a model gives the same input, one after the other."""


class _Product:
    """The products of several layers with the same input, computed as one.

    The first layer that is called computes all parts, the others take theirs. What is computed is
    kept until every part has been taken or another input comes; that input must not be changed in
    place meanwhile.
    """

    def __init__(self, layers: Sequence[nn.Linear]) -> None:
        weight = torch.cat([layer.weight.detach() for layer in layers])
        self._packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, _ROWS)  # noqa: SLF001
        biases: list[Tensor] = [layer.bias for layer in layers if layer.bias is not None]
        self._bias = torch.cat(biases) if biases else None
        self._widths = [layer.out_features for layer in layers]
        self._input: Tensor | None = None
        self._parts: dict[int, Tensor] = {}

    def weight(self, number: int) -> Tensor:
        """Return the plain weight of one layer, a fresh copy."""
        whole: Tensor = self._packed.to_dense()
        return whole if len(self._widths) == 1 else whole.split(self._widths)[number].clone()

    def part(self, x: Tensor, number: int) -> Tensor:
        """Return W x + b of one layer, (..., d_in) to (..., d_out)."""
        if x is not self._input or number not in self._parts:
            product = torch.ops.mkldnn._linear_pointwise  # noqa: SLF001
            found: Tensor = product(x, self._packed, self._bias, "none", [], "")
            self._input, self._parts = x, dict(enumerate(found.split(self._widths, -1)))
        part = self._parts.pop(number)
        if not self._parts:
            self._input = None
        return part


class PackedLinear(nn.Linear):
    """A frozen linear layer in float32 that holds its weight in oneDNN's arrangement only.

    ``weight`` gives the plain weight, the very same numbers, as a fresh copy. Where a derivative in
    the inputs is wanted the layer computes with such a copy.

    Args:
        linear: A layer on the CPU, in float32.
        product: What computes it, with the layers of the same input; one of its own by default.
        number: Its place among those.
    """

    def __init__(self, linear: nn.Linear, product: _Product | None = None, number: int = 0) -> None:
        nn.Module.__init__(self)  # nn.Linear's own would make a weight
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.bias = linear.bias
        self._product, self._number = product or _Product([linear]), number
        self.eval()

    def __getattr__(self, name: str) -> Any:
        """Return the plain weight, or what any module has."""
        if name == "weight":
            return self._product.weight(self._number)
        return super().__getattr__(name)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  nn.Linear's name
        """Return W x + b, (..., d_in) to (..., d_out)."""
        if input.requires_grad and torch.is_grad_enabled():
            return F.linear(input, self.weight, self.bias)
        return self._product.part(input, self._number)


def pack_linears(model: nn.Module) -> None:
    """Pack the linear layers of a model in place, where that is possible.

    Those in float32 on a CPU, when torch was built with oneDNN. Layers of the same input share one
    product. A weight that the model uses elsewhere too, as a tied output projection is the input
    embedding, is held twice then.

    Args:
        model: Frozen, for inference.
    """
    for parent in list(model.modules()):
        plain = {n: m for n, m in parent.named_children() if type(m) is nn.Linear}
        fitting = {name: layer for name, layer in plain.items() if _fits(layer.weight)}
        for names in _groups(fitting):
            layers = [fitting[name] for name in names]
            product = _Product(layers)
            for number, (name, layer) in enumerate(zip(names, layers, strict=True)):
                setattr(parent, name, PackedLinear(layer, product, number))
    _hand_back()


def _groups(layers: Mapping[str, nn.Linear]) -> list[tuple[str, ...]]:
    """Return the names of a module's layers, those together that get the same input."""
    together = [
        names
        for names in _SIBLINGS
        if layers.keys() >= set(names)
        and len({(layers[n].in_features, layers[n].bias is None) for n in names}) == 1
    ]
    grouped = {name for names in together for name in names}
    return [*together, *((name,) for name in layers if name not in grouped)]


def _hand_back() -> None:
    """Give freed memory back to the system: glibc keeps the places of plain weights as holes."""
    with suppress(OSError, AttributeError):  # no other C library has it
        ctypes.CDLL(None).malloc_trim(0)


def _fits(weight: Tensor) -> bool:
    return weight.dtype == torch.float32 and weight.device.type == "cpu" and _works()


@cache
def _works() -> bool:
    """Try on a small layer: the operators are torch's own, but not of its public interface."""
    plain, x = nn.Linear(24, 40), torch.linspace(-1, 1, 3 * 24).view(3, 24)
    with torch.no_grad():
        try:
            packed = PackedLinear(plain)
            same = torch.equal(packed.weight, plain.weight)
            return same and torch.allclose(packed(x), plain(x), rtol=1e-5, atol=1e-6)
        except (AttributeError, RuntimeError, TypeError):
            return False
