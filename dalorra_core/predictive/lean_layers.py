"""Decoder layers in fewer operations, for inference on a CPU.

A short question goes through some fifty small operations in each layer, and together they take as
long as its products. Layers of families that were read are run with the same formulas in fewer
steps: the norm as one operation, query and key turned together, nothing looked up or passed on.
"""

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from dalorra_core.predictive.last_layer import rotated

__all__ = ["make_lean"]

_FAMILIES = frozenset({"llama", "mistral", "qwen2", "qwen3"})
"""Families whose layer was read: norms before attention and MLP, none after."""


@torch.no_grad()
def make_lean(decoder: nn.Module) -> bool:
    """Give a decoder's layers a forward of fewer operations; changes it.

    Nothing changes for other families, other precisions than float32, devices other than the CPU,
    or where the outcome on two rows is not the same.

    Args:
        decoder: The part of a causal LM that ends in the last hidden states; on no other thread.

    Returns:
        Whether they have it now.
    """
    config: Any = getattr(decoder, "config", None)
    layers: Any = getattr(decoder, "layers", None)
    if getattr(config, "model_type", None) not in _FAMILIES or not layers:
        return False
    place = next(decoder.parameters())
    if place.device.type != "cpu" or place.dtype != torch.float32:
        return False
    if config._attn_implementation != "sdpa":  # noqa: SLF001  transformers has no other name for it
        return False
    ids = torch.tensor([[1, 2, 3, 4, 3, 2], [3, 1, 2, 2, 4, 1]])
    whole = decoder(input_ids=ids, use_cache=False).last_hidden_state
    for layer in layers:
        layer.forward = _LeanLayer(layer)
    try:
        lean = decoder(input_ids=ids, use_cache=False).last_hidden_state
        same = torch.allclose(lean, whole, rtol=1e-3, atol=1e-3)
    except (RuntimeError, ValueError, TypeError, AttributeError):
        same = False
    if not same:
        for layer in layers:
            del layer.forward
    return same


class _LeanLayer:
    """Stands for a layer's own ``forward``; its parts, adapted or not, are the layer's."""

    def __init__(self, layer: nn.Module) -> None:
        self._layer: Any = layer

    def __call__(
        self,
        hidden_states: Tensor,
        *,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        **_: Any,
    ) -> Tensor:
        """Return the layer's outputs, (N, T, d)."""
        layer = self._layer
        normed = _normed(hidden_states, layer.input_layernorm)
        hidden = hidden_states + self._attended(normed, position_embeddings, attention_mask)
        outcome: Tensor = hidden + layer.mlp(_normed(hidden, layer.post_attention_layernorm))
        return outcome

    def _attended(
        self, x: Tensor, position_embeddings: tuple[Tensor, Tensor], mask: Tensor | None
    ) -> Tensor:
        """Return what attention adds, (N, T, d)."""
        part = self._layer.self_attn
        shape = (*x.shape[:2], -1, part.head_dim)
        query, key, value = (
            projection(x).view(shape).transpose(1, 2)  # (N, H, T, d_head)
            for projection in (part.q_proj, part.k_proj, part.v_proj)
        )
        if hasattr(part, "q_norm"):
            query, key = part.q_norm(query), part.k_norm(key)
        heads = query.shape[1]
        both = rotated(torch.cat([query, key], dim=1), *position_embeddings)
        found = F.scaled_dot_product_attention(
            both[:, :heads],
            both[:, heads:],
            value,
            attn_mask=mask,
            is_causal=mask is None and x.shape[1] > 1,
            scale=part.scaling,
            enable_gqa=heads != value.shape[1],
        )
        added: Tensor = part.o_proj(found.transpose(1, 2).flatten(2))
        return added


def _normed(x: Tensor, norm: Any) -> Tensor:
    return F.rms_norm(x, (x.shape[-1],), norm.weight, norm.variance_epsilon)
