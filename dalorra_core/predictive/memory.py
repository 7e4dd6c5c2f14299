"""How much memory the activations of a forward pass take, and how many tokens fit."""

from typing import Any

from torch import nn

__all__ = ["activation_bytes", "tokens_within"]


def activation_bytes(model: nn.Module) -> int:
    """Return about the most that one token of a forward pass takes, in bytes.

    ``(11 d + 5 f)`` numbers of the model's precision, with the width d and the MLP's width f: the
    states before and after a layer, its queries, keys, values and what they attend to, and the
    three tensors of its MLP, each once more while it is computed, and what is kept below the layer
    where samples begin to differ. Layers follow each other without gradients, so their number does
    not count. On SmolLM2-135M in float32 that is 55 KiB; the peak of a process rose by 12 to 50 KiB
    a token, the most with rows of 512 (docs/performance.md).

    Args:
        model: A causal LM.
    """
    config: Any = model.config
    numbers = 11 * config.hidden_size + 5 * config.intermediate_size
    return numbers * next(model.parameters()).element_size()


def tokens_within(model: nn.Module, megabytes: int) -> int:
    """Return how many padded tokens (M * B * T) fit into so many MiB, at least 1.

    Args:
        model: A causal LM.
        megabytes: Of activations alone.
    """
    return max(1, megabytes * 2**20 // activation_bytes(model))
