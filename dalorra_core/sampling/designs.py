"""How the M samples of gates and of noise are drawn together, and the weights nets start from.

Under every design one sample alone is a draw from the posterior: its numbers are independent and
uniform. What a design fixes is how the M values of one number, such as those of one gate, lie to
each other; different numbers stay independent. So the mean over the samples of anything is unbiased
for every M, and only its variance depends on the design. Which component of a mixture a sample has
is always spread over the components.

iid and antithetic samples are the first of a larger M; stratified ones are a set of their own for
each M.
"""

import math
from collections.abc import Callable, Iterable
from typing import get_args

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import ndtri
from torch import Tensor

from dalorra_core.config import Design
from dalorra_core.sampling.streams import LARGEST, uniforms

__all__ = [
    "DESIGNS",
    "iid_normals",
    "iid_uniforms",
    "sample_normals",
    "sample_uniforms",
    "spread_uniforms",
    "uniform_weights",
]

DESIGNS: tuple[Design, ...] = get_args(Design)
"""The names of all designs."""

_Key = tuple[str | int, ...]
_Rows = Iterable[NDArray[np.float64]]


def sample_uniforms(key: _Key, num_samples: int, shape: tuple[int, ...], design: Design) -> Tensor:
    """Return M samples of numbers that are uniform in (0, 1), (M, *shape) in float64.

    iid: M independent streams. stratified: of each number one sample lies in every interval
    (k/M, (k+1)/M), in an order of its own, so that a gate of probability p is on in M p samples,
    rounded down or up. antithetic: samples come in pairs v and 1 - v; an odd one is left single.

    Args:
        key: What the draw is for, such as (adapter sha256, seed, "z").
        num_samples: M.
        shape: Of one sample.
        design: How the samples lie to each other.

    Source:
        docs/method.md, eq. (J1) and (J2).

    Example:
        >>> (4 * sample_uniforms(("a",), 4, (1,), "stratified")).long().flatten().sort().values
        tensor([0, 1, 2, 3])
    """
    rows = _ROWS_OF[design](key, num_samples, math.prod(shape))
    return torch.stack([torch.from_numpy(row) for row in rows]).view(num_samples, *shape)


def sample_normals(key: _Key, num_samples: int, shape: tuple[int, ...], design: Design) -> Tensor:
    """Return M samples of standard normal numbers, (M, *shape) in float32.

    They are the quantiles of ``sample_uniforms``, number by number. Stratified, each single number
    therefore takes one value from every M-th of the normal distribution, and the mean over the
    samples loses its variance as far as what is computed is a sum of functions of single numbers,
    such as a weighted sum of many; what needs two numbers together keeps it. Antithetic samples are
    eps and -eps: they cancel what is odd in the noise, and of what is even a pair is worth one.

    Args:
        key: What the draw is for, such as (adapter sha256, seed, "noise", module).
        num_samples: M.
        shape: Of one sample.
        design: How the samples lie to each other.
    """
    rows = _ROWS_OF[design](key, num_samples, math.prod(shape))
    return torch.stack([_quantiles(row) for row in rows]).view(num_samples, *shape)


def _quantiles(row: NDArray[np.float64]) -> Tensor:
    drawn: NDArray[np.float64] = ndtri(row)
    return torch.from_numpy(drawn).float()


def _independent_rows(key: _Key, num_samples: int, size: int) -> _Rows:
    return (uniforms((*key, m), size) for m in range(num_samples))


def _stratified_rows(key: _Key, num_samples: int, size: int) -> _Rows:
    """Return a Latin hypercube: in every column each M-th of (0, 1) holds one of the M numbers."""
    # M is a part of the name, so that packs of several sizes are independent of each other.
    streams = [(*key, "stratified", num_samples, m) for m in range(num_samples)]
    drawn = np.stack([uniforms(name, 2 * size).reshape(2, size) for name in streams])  # (M, 2, n)
    stratum = drawn[:, 0].argsort(axis=0, kind="stable")  # (M, n), a permutation in each column
    return np.minimum((stratum + drawn[:, 1]) / num_samples, LARGEST)  # 1 is what it may round to


def _antithetic_rows(key: _Key, num_samples: int, size: int) -> _Rows:
    for m in range(num_samples):
        row = uniforms((*key, "antithetic", m // 2), size)
        yield np.minimum(1.0 - row, LARGEST) if m % 2 else row


_ROWS_OF: dict[Design, Callable[[_Key, int, int], _Rows]] = {
    "iid": _independent_rows,
    "stratified": _stratified_rows,
    "antithetic": _antithetic_rows,
}


def iid_uniforms(key: tuple[str | int, ...], num_samples: int, num_modules: int, r: int) -> Tensor:
    """Return independent uniforms (M, L, r) in float64, one stream per sample.

    Args:
        key: What the draw is for, such as (adapter sha256, seed, "z").
        num_samples: M.
        num_modules: L.
        r: Rank.
    """
    return sample_uniforms(key, num_samples, (num_modules, r), "iid")


def iid_normals(key: tuple[str | int, ...], num_samples: int, shape: tuple[int, ...]) -> Tensor:
    """Return independent standard normals (M, *shape) in float32, one stream per sample.

    Args:
        key: What the draw is for, such as (adapter sha256, seed, "noise", module).
        num_samples: M.
        shape: Of one sample.
    """
    return sample_normals(key, num_samples, shape, "iid")


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
