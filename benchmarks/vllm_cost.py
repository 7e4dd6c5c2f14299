"""What the same answer costs when vLLM computes the samples, each as a LoRA adapter of its own.

vLLM shares nothing between adapters: every sample runs the whole prompt through all layers, all
tokens of it through the last one, and gets the logits of the whole vocabulary. Its batches have no
padding. The label mass takes a second request for every sample (docs/vllm.md), of which the blocks
that are full come from its prefix cache.
"""

from dataclasses import replace

from benchmarks.cost_model import Shape, Work, pass_work

__all__ = ["BLOCK_TOKENS", "crossover", "late", "shared_layers_ratio", "vllm_work"]

BLOCK_TOKENS = 16
"""Tokens of a block of vLLM's cache."""


def vllm_work(
    shape: Shape, rows: int, length: int, samples: int, *, label_mass: bool = False
) -> Work:
    """Return the work of M samples of B prompts of T tokens in one step of vLLM.

    Args:
        shape: Of model and adapter.
        rows: B.
        length: T.
        samples: M.
        label_mass: Also the second requests.
    """
    prompts = samples * rows
    again = length - BLOCK_TOKENS * ((length - 1) // BLOCK_TOKENS) if label_mass else 0
    tokens = prompts * (length + again)
    adapter = sum(2 * shape.rank * (a + b) for _, a, b in shape.adapted)
    adapted = shape.layers - shape.first_sampled
    attention = 4 * length * shape.heads * shape.head_width * tokens * shape.layers
    head = shape.width * shape.vocabulary
    flops = (
        2 * shape.layer_weights * tokens * shape.layers
        + adapter * tokens * adapted
        + 2 * head * prompts * (2 if label_mass else 1)
        + attention
    )
    return Work(flops, attention, shape.layers * shape.layer_weights + head, tokens)


def crossover(shape: Shape, length: int, samples: int, *, label_mass: bool = False) -> float:
    """Return how much more of the rate vLLM must reach than we do to be as fast, in full batches.

    Above it vLLM is cheaper, below it we are: the arithmetic of its answer over that of ours.
    """
    ours = pass_work(shape, 1, length, samples, label_mass=label_mass)
    return vllm_work(shape, 1, length, samples, label_mass=label_mass).flops / ours.flops


def shared_layers_ratio(layers: int, below: int, samples: int) -> float:
    """Return M L / (l + M (L - l)): what sharing the l layers below the adapter saves by itself."""
    return samples * layers / (below + samples * (layers - below))


def late(shape: Shape, below: int) -> Shape:
    """Return the same model with an adapter on the layers from ``below`` on only."""
    return replace(shape, first_sampled=below)
