"""The one adapted layer of every method: ``o_m = W0 h + s * B_m diag(z_m) A_m h``.

A module's transforms, where it has any, stand around these factors; see ``ModulePack``.
"""

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from dalorra_core.adapters.binding import Binding, Loan
from dalorra_core.adapters.pack import ModulePack, fold, unfold

__all__ = ["AdaptedLinear", "low_rank_delta"]


def low_rank_delta(h: Tensor, module: ModulePack, num_samples: int, scaling: float) -> Tensor:
    """Return ``s * B_m diag(z_m) A_m h`` for M folded samples, with the module's transforms.

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
    u = scaling * _core_features(h, module, num_samples)  # (M*B, ..., r)
    return _apply(u, module.lora_B.to(h.dtype), num_samples)  # (M*B, ..., d_out)


def _core_features(h: Tensor, module: ModulePack, num_samples: int) -> Tensor:
    """Return ``core(z * (A before(h) + beside(h)))``, (M*B, ..., r)."""
    u = _rank_features(h, module, num_samples)
    if module.z is not None:
        gate = module.z.to(h.dtype)  # (M or 1, r) or (M, B, r)
        u = u * gate if gate.shape[:-1] == (1,) else _gated(u, gate)
    if module.core is not None:
        u = module.core(unfold(u, num_samples)).flatten(0, 1)
    return u


def _gated(u: Tensor, gate: Tensor) -> Tensor:
    """Return the rank features (M*B, ..., r) of each sample, or row of it, by its own gates."""
    runs = u.reshape(*gate.shape[:-1], -1, gate.shape[-1])  # (M, B*..., r) or (M, B, ..., r)
    return (runs * gate.unsqueeze(-2)).view(u.shape)


def _rank_features(h: Tensor, module: ModulePack, num_samples: int) -> Tensor:
    """Return ``A before(h) + beside(h)``, (M*B, ..., r)."""
    inputs = h
    if module.before is not None:
        inputs = module.before(unfold(h, num_samples)).flatten(0, 1)
    u = _apply(inputs, module.lora_A.to(h.dtype), num_samples)
    if module.beside is not None:
        u = u + module.beside(unfold(h, num_samples)).flatten(0, 1)
    return u


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
        return self._with_deltas(self.base(h), h)

    def of_shared(self, h: Tensor, num_samples: int) -> Tensor:
        """Return what ``forward`` gives for ``fold(h, num_samples)``; W0 h is computed once.

        Args:
            h: Inputs (B, ..., d_in) that all samples have in common.
            num_samples: M.
        """
        return self._with_deltas(fold(self.base(h), num_samples), fold(h, num_samples))

    def _with_deltas(self, out: Tensor, h: Tensor) -> Tensor:
        for loan in self._binding.lookup(self.name):
            out = _with_delta(out, h, loan)
        return out


def _with_delta(out: Tensor, h: Tensor, loan: Loan) -> Tensor:
    """Return ``out`` with one pack's part added to its rows; changes ``out`` when not all are."""
    module, m, scaling, share = loan
    if share is None:
        return _plus_up(out, _core_features(h, module, m), module.lora_B, scaling)
    if h.shape[1] == share.of_tokens:  # rows without padding, (M or 1, N, d)
        out[:, share.tokens] += low_rank_delta(h[:, share.tokens], module, m, scaling)
        return out
    copies = len(h) // share.of  # M; or 1, in layers that all samples share
    own = unfold(h, copies)[:, share.rows].flatten(0, 1)  # (copies*B_g, ..., d_in)
    delta = low_rank_delta(own, module, m, scaling)
    unfold(out, copies)[:, share.rows] += unfold(delta, copies)
    return out


def _plus_up(out: Tensor, u: Tensor, up: Tensor, scaling: float) -> Tensor:
    """Return ``out + s B_m u`` from one product that begins at ``out``, (M*B, ..., d_out).

    What it adds never stands in memory by itself, and without gradients neither does a copy of
    ``out``: on a CPU such passes over activations cost more than the product. A short question is
    through so many layers that views count too.
    """
    u, up = u.to(out.dtype), up.to(out.dtype).transpose(1, 2)  # (1 or M, r, d_out)
    if len(up) == 1:
        rows = out.view(-1, out.shape[-1])
        product = torch.addmm if torch.is_grad_enabled() else Tensor.addmm_
        return product(rows, u.view(-1, u.shape[-1]), up[0], alpha=scaling).view(out.shape)
    m = len(up)
    rows = unfold(out, m).flatten(1, -2)  # (M, B*..., d_out)
    return torch.baddbmm(rows, unfold(u, m).flatten(1, -2), up, alpha=scaling).view(out.shape)
