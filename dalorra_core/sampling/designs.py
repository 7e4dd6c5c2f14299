"""How the M samples of gates and of noise are drawn together, and the weights nets start from.

Gates and noise are independent from sample to sample; which component of a mixture a sample has is
spread over the components. Either way M = 4 uses the first four samples of M = 10.
"""

import math

import numpy as np
import torch
from torch import Tensor

from dalorra_core.sampling.streams import normals, uniforms

__all__ = ["iid_normals", "iid_uniforms", "spread_uniforms", "uniform_weights"]


def iid_uniforms(key: tuple[str | int, ...], num_samples: int, num_modules: int, r: int) -> Tensor:
    """Return independent uniforms (M, L, r) in float64, one stream per sample.

    Args:
        key: What the draw is for, such as (adapter sha256, seed, "z").
        num_samples: M.
        num_modules: L.
        r: Rank.
    """
    draws = [uniforms((*key, m), num_modules * r) for m in range(num_samples)]
    return torch.from_numpy(np.stack(draws)).view(num_samples, num_modules, r)  # (M, L, r)


def iid_normals(key: tuple[str | int, ...], num_samples: int, shape: tuple[int, ...]) -> Tensor:
    """Return independent standard normals (M, *shape) in float32, one stream per sample.

    Args:
        key: What the draw is for, such as (adapter sha256, seed, "noise", module).
        num_samples: M.
        shape: Of one sample.
    """
    size = math.prod(shape)
    draws = [torch.from_numpy(normals((*key, m), size)).float() for m in range(num_samples)]
    return torch.stack(draws).view(num_samples, *shape)


def uniform_weights(key: tuple[str | int, ...], shape: tuple[int, ...], fan_in: int) -> Tensor:
    """Return weights uniform in +-1/sqrt(fan_in), where linear layers start, float32.

    Args:
        key: Name of the stream.
        shape: Of the result.
        fan_in: Inputs of the layer.
    """
    draw = torch.from_numpy(uniforms(key, math.prod(shape)))
    return ((2 * draw - 1) * (1.0 / math.sqrt(fan_in))).float().view(shape)


def spread_uniforms(key: tuple[str | int, ...], num_samples: int, strata: int) -> Tensor:
    """Return M uniforms that spread over (0, 1), (M,) in float64; a longer draw begins with it.

    Each one alone is uniform, so an average over them is unbiased for every M. Of the first K, the
    second K and so on one lies in each K-th of the interval: van der Corput's sequence in base K,
    all of it shifted by one uniform number, modulo 1.

    Args:
        key: What the draw is for.
        num_samples: M.
        strata: K.

    Example:
        >>> (3 * spread_uniforms(("a",), 6, 3)).long().sort().values.tolist()
        [0, 0, 1, 1, 2, 2]
    """
    points = [_mirrored(m, max(2, strata)) for m in range(num_samples)]
    return (torch.tensor(points, dtype=torch.float64) + float(uniforms(key, 1)[0])) % 1.0


def _mirrored(number: int, base: int) -> float:
    """Return the digits of a number behind the point, the last one first."""
    value, place = 0.0, 1.0
    while number:
        number, digit = divmod(number, base)
        place /= base
        value += digit * place
    return value
