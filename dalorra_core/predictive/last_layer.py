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
from dalorra_core.adapters.linear import AdaptedLinear
from dalorra_core.adapters.pack import MaybePositionless, SamplePack, fold
from dalorra_core.predictive.unpadded import UnpaddedRows

__all__ = ["can_shorten", "needs_every_position", "rotated", "shortened_to"]

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
def shortened_to(
    decoder: nn.Module, last: Tensor, num_samples: int = 1, unpadded: UnpaddedRows | None = None
) -> Iterator[None]:
    """Let the last layer give one position of each row, inside the block.

    What the decoder returns is then (N, 1, d).

    Args:
        decoder: A decoder for which ``can_shorten`` holds.
        last: (N,) position of each row's last token, rows as they leave that layer.
        num_samples: M above 1 says that rows arrive as (B, T, d), the same for all samples, which
            begin to differ inside the layer; they leave it as row m*B + b.
        unpadded: How rows arrive without padding, which this layer needs; None where they have it.
    """
    layers: Any = decoder.layers
    short = _LastPositions(layers[-1], last, num_samples, unpadded)
    decoder.layers = nn.ModuleList([*layers[:-1], short])
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

    def __init__(
        self, layer: nn.Module, last: Tensor, num_samples: int, unpadded: UnpaddedRows | None
    ) -> None:
        super().__init__()
        self._layer: Any = layer
        self._last, self._num_samples, self._unpadded = last, num_samples, unpadded
        self.attention_type = getattr(layer, "attention_type", None)  # some decoders ask for it

    def forward(self, hidden_states: Tensor, **options: Any) -> Any:
        layer = self._layer
        before = vars(layer).get("forward")
        layer.forward = self._shortened  # called as the layer, whose hooks may fetch its weights
        try:
            return layer(hidden_states, **options)
        finally:
            del layer.forward
            if before is not None:
                layer.forward = before

    def _shortened(
        self, hidden_states: Tensor, *, position_embeddings: tuple[Tensor, Tensor], **_: Any
    ) -> Tensor:
        layer = self._layer
        if self._unpadded is not None:
            hidden_states = self._unpadded.padded(hidden_states)
            cos, sin = position_embeddings
            position_embeddings = self._unpadded.of_longest(cos), self._unpadded.of_longest(sin)
        here = self._last[: len(hidden_states)]  # the samples of a row end at the same token
        normed = layer.input_layernorm(hidden_states)
        attended = self._attention(normed, here, position_embeddings)
        at_last = self._folded(_at(hidden_states, here))  # (N, 1, d)
        if hasattr(layer, "pre_feedforward_layernorm"):  # Gemma's layer has norms on both sides
            at_last = at_last + layer.post_attention_layernorm(attended)
            outcome = layer.mlp(layer.pre_feedforward_layernorm(at_last))
            return at_last + layer.post_feedforward_layernorm(outcome)
        at_last = at_last + attended
        return at_last + layer.mlp(layer.post_attention_layernorm(at_last))

    def _attention(
        self, normed: Tensor, here: Tensor, position_embeddings: tuple[Tensor, Tensor]
    ) -> Tensor:
        """Return what the last tokens attend to, (N, 1, d)."""
        part = self._layer.self_attn
        cos, sin = position_embeddings  # (1, T, d_head)
        query = self._heads(part.q_proj, _at(normed, here))  # (N, H, 1, d_head)
        key = self._heads(part.k_proj, normed)  # (N, H_kv, T, d_head)
        value = self._heads(part.v_proj, normed)
        if hasattr(part, "q_norm"):
            query, key = part.q_norm(query), part.k_norm(key)
        turn = (cos[0, self._last].unsqueeze(1), sin[0, self._last].unsqueeze(1))
        found = F.scaled_dot_product_attention(
            rotated(query, *turn),
            rotated(key, cos, sin),
            value,
            attn_mask=self._seen(normed.shape[1]),
            scale=part.scaling,
            enable_gqa=key.shape[1] != query.shape[1],
        )
        return part.o_proj(found.transpose(1, 2).flatten(2))  # (N, 1, d)

    def _heads(self, projection: nn.Module, x: Tensor) -> Tensor:
        """Return the projected inputs of all samples, cut into heads: (N, H, T, d_head)."""
        m = self._num_samples
        if m > 1 and isinstance(projection, AdaptedLinear):
            out = projection.of_shared(x, m)
        else:
            out = self._folded(projection(x))
        return out.unflatten(-1, (-1, self._layer.self_attn.head_dim)).transpose(1, 2)

    def _folded(self, x: Tensor) -> Tensor:
        return x if self._num_samples == 1 else fold(x, self._num_samples)

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


def _at(x: Tensor, here: Tensor) -> Tensor:
    """Return one position of each row, (B, T, d) to (B, 1, d)."""
    return x[torch.arange(len(here), device=here.device), here].unsqueeze(1)


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return (N, H, T, d_head) turned by the angles of its positions, (N, T, d_head)."""
    first, second = x.chunk(2, dim=-1)
    turned = torch.cat([-second, first], dim=-1)
    return x * cos.unsqueeze(1) + turned * sin.unsqueeze(1)
