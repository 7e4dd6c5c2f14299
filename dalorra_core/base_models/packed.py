"""Linear layers for inference on a CPU: weights lie in memory as oneDNN's products read them.

A product with few rows otherwise spends its time on arranging the weight, anew at every call
(docs/decisions/0034).
"""

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

__all__ = ["PackedLinear", "pack_linears"]

_ROWS = 120
"""Rows of the products that the arrangement is chosen for: ten samples of a short prompt."""


class PackedLinear(nn.Linear):
    """A frozen linear layer in float32 that holds its weight in oneDNN's arrangement only.

    ``weight`` gives the plain weight, the very same numbers, as a fresh copy. Where a derivative in
    the inputs is wanted the layer computes with such a copy.

    Args:
        linear: A layer on the CPU, in float32.
    """

    def __init__(self, linear: nn.Linear) -> None:
        nn.Module.__init__(self)  # nn.Linear's own would make a weight
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.bias = linear.bias
        weight = linear.weight.detach()
        self._packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, _ROWS)  # noqa: SLF001
        self.eval()

    def __getattr__(self, name: str) -> Any:
        """Return the plain weight, or what any module has."""
        return self._packed.to_dense() if name == "weight" else super().__getattr__(name)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  nn.Linear's name
        """Return W x + b, (..., d_in) to (..., d_out)."""
        if input.requires_grad and torch.is_grad_enabled():
            return F.linear(input, self.weight, self.bias)
        product = torch.ops.mkldnn._linear_pointwise  # noqa: SLF001
        found: Tensor = product(input, self._packed, self.bias, "none", [], "")
        return found


def pack_linears(model: nn.Module) -> None:
    """Pack the linear layers of a model in place, where that is possible.

    Those in float32 on a CPU, when torch was built with oneDNN. A weight that the model uses
    elsewhere too, as a tied output projection is the input embedding, is held twice then.

    Args:
        model: Frozen, for inference.
    """
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and _fits(module.weight):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, PackedLinear(module))


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
