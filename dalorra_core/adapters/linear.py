"""The one adapted layer of every method: ``o_m = W0 h + s * B_m diag(z_m) A_m h``."""

import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from dalorra_core.adapters.binding import Binding, Loan
from dalorra_core.adapters.pack import ModulePack, unfold

__all__ = ["AdaptedLinear", "low_rank_delta"]


def low_rank_delta(h: Tensor, module: ModulePack, num_samples: int, scaling: float) -> Tensor:
    """Return ``s * B_m diag(z_m) A_m h`` for M folded samples.

    Args:
        h: Module inputs (M*B, ..., d_in), row m*B + b, or (B, ..., d_in) when M is 1.
        module: Factors of this module.
        num_samples: M.
        scaling: s = lora_alpha / r.

    Returns:
        The adapter's output (M*B, ..., d_out) in the dtype of ``h``.

    Source:
        docs/method.md, eq. (1).
    """
    u = _apply(h, module.lora_A.to(h.dtype), num_samples)  # (M*B, ..., r)
    if module.z is None:
        u = u * scaling
    else:
        gate = module.z.to(h.dtype) * scaling  # (M, r)
        middle = [1] * (u.dim() - 1)
        u = (unfold(u, num_samples) * gate.view(num_samples, *middle, -1)).flatten(0, 1)
    return _apply(u, module.lora_B.to(h.dtype), num_samples)  # (M*B, ..., d_out)


def _apply(x: Tensor, weight: Tensor, num_samples: int) -> Tensor:
    """Apply one shared weight (1, d_out, d_in), or weight m of (M, d_out, d_in) to sample m."""
    if weight.shape[0] == 1:
        return F.linear(x, weight[0])
    rows = unfold(x, num_samples).flatten(1, -2)  # (M, B*..., d_in)
    out = rows @ weight.transpose(1, 2)  # (M, B*..., d_out)
    return out.view(*x.shape[:-1], weight.shape[1])


class AdaptedLinear(nn.Module):
    """A frozen linear layer plus whatever low-rank factors are bound for this forward."""

    def __init__(self, base: nn.Linear, name: str, binding: Binding) -> None:
        super().__init__()
        self.base = base
        self.name = name
        self._binding = binding

    def forward(self, h: Tensor) -> Tensor:
        """Return W0 h, plus the adapters' parts where packs are bound: (M*B, ..., d_out)."""
        out = self.base(h)
        for loan in self._binding.lookup(self.name):
            out = _with_delta(out, h, loan)
        return out


def _with_delta(out: Tensor, h: Tensor, loan: Loan) -> Tensor:
    """Return ``out`` with one pack's part added to its rows; changes ``out`` when not all are."""
    module, m, scaling, rows = loan
    if rows is None:
        return out + low_rank_delta(h, module, m, scaling)
    own = unfold(h, m)[:, rows].flatten(0, 1)  # (M*B_g, ..., d_in)
    unfold(out, m)[:, rows] += unfold(low_rank_delta(own, module, m, scaling), m)
    return out
