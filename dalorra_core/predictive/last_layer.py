"""The last decoder layer, computed only where it is read: at each row's last token.

Label logits come from one position. The last layer's keys and values are needed at all of them, its
query, its attention output and its MLP at that one alone: of Llama's layer about a twentieth of the
work is left for rows of any length. Exact but for the order of sums.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from dalorra_core.adapters.inject import LM_HEAD
from dalorra_core.adapters.pack import MaybePositionless, SamplePack

__all__ = ["can_shorten", "needs_every_position", "shortened_to"]

_FAMILIES = frozenset({"llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text"})
"""Families whose attention was read; what is known of others could not show in a short trial."""


def needs_every_position(packs: Sequence[SamplePack]) -> bool:
    """Return whether a pack does something to activations that may depend on where they stand."""
    return any(
        not (isinstance(transform, MaybePositionless) and transform.positionless)
        for pack in packs
        for name, module in pack.modules.items()
        if name != LM_HEAD
        for transform in module.transforms
    )


@contextmanager
def shortened_to(decoder: nn.Module, last: Tensor) -> Iterator[None]:
    """Let the last layer give one position of each row, inside the block.

    What the decoder returns is then (N, 1, d).

    Args:
        decoder: A decoder for which ``can_shorten`` holds.
        last: (N,) position of each row's last token, rows as they arrive at that layer.
    """
    layers: Any = decoder.layers
    decoder.layers = nn.ModuleList([*layers[:-1], _LastPositions(layers[-1], last)])
    try:
        yield
    finally:
        decoder.layers = layers


@torch.no_grad()
def can_shorten(decoder: nn.Module) -> bool:
    """Return whether this decoder's last layer is understood: tries both ways on two rows."""
    config: Any = getattr(decoder, "config", None)
    layers: Any = getattr(decoder, "layers", None)
    if getattr(config, "model_type", None) not in _FAMILIES or not layers:
        return False
    if getattr(layers[-1].self_attn, "attn_logit_softcapping", None) is not None:
        return False
    device = next(decoder.parameters()).device
    ids = torch.tensor([[1, 2, 3, 4, 3, 2], [3, 1, 2, 2, 4, 1]], device=device)
    last, rows = torch.tensor([5, 3], device=device), torch.arange(2, device=device)
    whole = decoder(input_ids=ids, use_cache=False).last_hidden_state[rows, last]
    try:
        with shortened_to(decoder, last):
            short = decoder(input_ids=ids, use_cache=False).last_hidden_state[:, 0]
    except (RuntimeError, ValueError, TypeError, AttributeError):
        return False
    return short.shape == whole.shape and torch.allclose(
        short.float(), whole.float(), rtol=1e-2, atol=1e-2
    )


class _LastPositions(nn.Module):
    """Stands in the last layer's place; its parts, adapted or not, are the layer's own."""

    def __init__(self, layer: nn.Module, last: Tensor) -> None:
        super().__init__()
        self._layer: Any = layer
        self._last = last
        self.attention_type = getattr(layer, "attention_type", None)  # some decoders ask for it

    def forward(
        self, hidden_states: Tensor, *, position_embeddings: tuple[Tensor, Tensor], **_: Any
    ) -> Tensor:
        layer = self._layer
        rows = torch.arange(len(self._last), device=self._last.device)
        at_last = hidden_states[rows, self._last].unsqueeze(1)  # (N, 1, d)
        attended = self._attention(layer.input_layernorm(hidden_states), rows, position_embeddings)
        if hasattr(layer, "pre_feedforward_layernorm"):  # Gemma's layer has norms on both sides
            at_last = at_last + layer.post_attention_layernorm(attended)
            outcome = layer.mlp(layer.pre_feedforward_layernorm(at_last))
            return at_last + layer.post_feedforward_layernorm(outcome)
        at_last = at_last + attended
        return at_last + layer.mlp(layer.post_attention_layernorm(at_last))

    def _attention(
        self, normed: Tensor, rows: Tensor, position_embeddings: tuple[Tensor, Tensor]
    ) -> Tensor:
        """Return what the last tokens attend to, (N, 1, d)."""
        part = self._layer.self_attn
        cos, sin = (x.expand(len(rows), -1, -1) for x in position_embeddings)  # (N, T, d_head)
        here = (cos[rows, self._last].unsqueeze(1), sin[rows, self._last].unsqueeze(1))
        query = part.q_proj(normed[rows, self._last].unsqueeze(1))
        heads, width = query.shape[-1] // part.head_dim, part.head_dim
        query = query.unflatten(-1, (heads, width)).transpose(1, 2)  # (N, H, 1, d_head)
        key = part.k_proj(normed).unflatten(-1, (-1, width)).transpose(1, 2)  # (N, H_kv, T, d_head)
        value = part.v_proj(normed).unflatten(-1, (-1, width)).transpose(1, 2)
        if hasattr(part, "q_norm"):
            query, key = part.q_norm(query), part.k_norm(key)
        found = F.scaled_dot_product_attention(
            _rotated(query, *here),
            _rotated(key, cos, sin),
            value,
            attn_mask=self._seen(normed.shape[1]),
            scale=part.scaling,
            enable_gqa=key.shape[1] != heads,
        )
        return part.o_proj(found.transpose(1, 2).flatten(2))  # (N, 1, d)

    def _seen(self, length: int) -> Tensor:
        """Return the positions that each row's last token sees, (N, 1, 1, T) bool."""
        positions = torch.arange(length, device=self._last.device)
        last = self._last.unsqueeze(1)
        seen = positions <= last
        window = self._window()
        if window is not None:
            seen = seen & (positions > last - window)
        return seen[:, None, None]

    def _window(self) -> int | None:
        part = self._layer.self_attn
        if hasattr(part, "sliding_window"):  # of this layer; Mistral has one for all
            return part.sliding_window
        return getattr(part.config, "sliding_window", None)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return (N, H, T, d_head) turned by the angles of its positions, (N, T, d_head)."""
    first, second = x.chunk(2, dim=-1)
    turned = torch.cat([-second, first], dim=-1)
    return x * cos.unsqueeze(1) + turned * sin.unsqueeze(1)
