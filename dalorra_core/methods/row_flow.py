"""A small masked autoregressive flow over the last axis.

Every number of a row is scaled and shifted by those before it, so that a product of Gaussians
becomes a distribution with dependence along rows. One residual network gives all shifts and scales
at once; masks keep a number from seeing itself and what comes after. The parameters are one vector.
"""

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dalorra_core.sampling.designs import uniform_weights

__all__ = ["flow_size", "init_flow", "row_flow"]

_HIDDEN = 16
_BLOCKS = 2


def flow_size(features: int) -> int:
    """Return the number of parameters of a flow over rows of this many numbers."""
    return sum(rows * (columns + 1) for rows, columns in _layers(features))


def init_flow(key: tuple[str | int, ...], features: int) -> Tensor:
    """Return the parameters (flow_size,) of a flow that changes nothing yet.

    All layers but the last are uniform in +-1/sqrt(inputs); the last one is zero.

    Args:
        key: Name of the random stream.
        features: Numbers of one row.
    """
    draw = uniform_weights(key, (flow_size(features),), 1)
    parts, layers, start = [], _layers(features), 0
    for rows, columns in layers:
        size = rows * (columns + 1)
        parts.append(draw[start : start + size] / math.sqrt(columns))
        start += size
    return torch.cat([*parts[:-1], torch.zeros_like(parts[-1])])


def row_flow(x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
    """Return what the flow makes of every row, and the logarithm of its determinant there.

    Number j becomes ``x_j exp(a_j) + b_j`` with a_j in (-1, 1); both depend on x_1 .. x_{j-1}.

    Args:
        x: (..., k).
        params: (flow_size(k),), in the dtype of ``x``.

    Returns:
        (..., k) and (...).

    Source:
        docs/method.md, eq. (I6).
    """
    features = x.shape[-1]
    layers, masks, start = _layers(features), _masks(features), 0
    weights = []
    for (rows, columns), mask in zip(layers, masks, strict=True):
        flat = params[start : start + rows * (columns + 1)].view(rows, columns + 1)
        weights.append((flat[:, 1:] * torch.from_numpy(mask).to(flat), flat[:, 0]))
        start += flat.numel()
    (first, first_bias), *inner, (last, last_bias) = weights
    hidden = x @ first.T + first_bias
    for (a, a_bias), (b, b_bias) in zip(inner[::2], inner[1::2], strict=True):
        hidden = hidden + (hidden.relu() @ a.T + a_bias).relu() @ b.T + b_bias
    shift, raw = (hidden @ last.T + last_bias).split(features, dim=-1)
    log_scale = raw.tanh()
    return x * log_scale.exp() + shift, log_scale.sum(-1)


def _layers(features: int) -> list[tuple[int, int]]:
    """Return (outputs, inputs) of every layer."""
    inner = [(_HIDDEN, _HIDDEN)] * (2 * _BLOCKS)
    return [(_HIDDEN, features), *inner, (2 * features, _HIDDEN)]


def _masks(features: int) -> list[NDArray[np.bool_]]:
    """Return which output of every layer may see which input."""
    numbers = np.arange(1, features + 1)
    seen = np.arange(_HIDDEN) % max(1, features - 1) + 1  # a hidden unit sees numbers up to this
    inner = [seen[:, None] >= seen[None, :]] * (2 * _BLOCKS)
    outputs = np.tile(numbers, 2)
    return [seen[:, None] >= numbers[None, :], *inner, outputs[:, None] > seen[None, :]]
