"""How many tokens a forward pass should take on this machine: tried on the model itself."""

import time
from collections.abc import Callable, Sequence

import torch

from dalorra_core.predictive.trunk import Trunk

__all__ = ["fastest_size", "tried_tokens"]

_SIZES = (256, 512, 1024, 2048)
_MARGIN = 0.95
_ROW_TOKENS = 32
_LAYERS = 4


def fastest_size(
    run: Callable[[int], object],
    *,
    default: int,
    sizes: Sequence[int] = _SIZES,
    budget_s: float = 3.0,
    clock: Callable[[], float] = time.perf_counter,
) -> int:
    """Return the size of a pass that does the most tokens a second.

    Each size runs twice while there is time, and its better run counts: other work on the machine
    makes passes slower, never faster. The default stays unless another size takes at least a
    twentieth less for a token, and where the default itself does not fit into the time.

    Args:
        run: Runs a pass of so many tokens.
        default: One of ``sizes``.
        sizes: Tokens, in ascending order.
        budget_s: No run begins that is expected to end later, in seconds; a token is taken to need
            as long as in the first run, which also warms up.
        clock: Seconds from any start.
    """

    def seconds_per_token(size: int) -> float:
        began_s = clock()
        run(size)
        return (clock() - began_s) / size

    end_s = clock() + budget_s
    expected = seconds_per_token(sizes[0])
    best: dict[int, float] = {}
    for size in (*sizes, *sizes):
        if clock() + expected * size <= end_s:
            taken = seconds_per_token(size)
            best[size] = min(taken, best.get(size, taken))
    if default not in best:
        return default
    fastest = min(best, key=lambda size: best[size])
    return fastest if best[fastest] <= _MARGIN * best[default] else default


@torch.inference_mode()
def tried_tokens(trunk: Trunk, default: int) -> int:
    """Return the size of a pass that suits the model on its device; takes some 3 seconds.

    The lowest four layers are run, on rows of 32 tokens: all layers are alike.

    Args:
        trunk: A base model that nobody uses yet.
        default: What is returned where nothing is clearly faster.
    """
    device = next(trunk.decoder.parameters()).device
    layers = trunk.decoder.get_submodule("layers")
    top = min(_LAYERS, len(list(layers.children())) - 1)

    def run(size: int) -> None:
        ids = torch.ones(size // _ROW_TOKENS, _ROW_TOKENS, dtype=torch.int64, device=device)
        with trunk.turns:
            trunk.stem(ids, top)

    return fastest_size(run, default=default)
