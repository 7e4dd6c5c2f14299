"""Counter-based random streams: every draw is named, none is remembered.

A stream is keyed by what it is for (adapter hash, seed, sample, tensor ...), hashed into the key
of a Philox generator. The same name gives the same numbers on every machine, in any order, in any
batch, before and after a restart; nothing about randomness has to be stored in a checkpoint.
"""

import hashlib

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtri

__all__ = ["LARGEST", "normals", "permutation", "stream_seed", "uniforms"]

_MANTISSA_BITS = 53
_WORDS_AT_ONCE = 4
"""Words that Philox makes of one value of its counter."""

LARGEST = 1.0 - 0.5**_MANTISSA_BITS
"""The largest number below 1, and so of all uniforms."""


def _bit_generator(key: tuple[str | int, ...]) -> np.random.Philox:
    digest = hashlib.sha256("\x1f".join(str(part) for part in key).encode()).digest()
    return np.random.Philox(key=int.from_bytes(digest[:16], "little"))


def uniforms(key: tuple[str | int, ...], size: int, start: int = 0) -> NDArray[np.float64]:
    """Return ``size`` independent uniform numbers from the open interval (0, 1).

    Built from the raw 64-bit words of Philox, whose sequence NumPy promises never to change:
    the upper 53 bits plus one half, over 2^53. The half keeps 0 out; the bound keeps 1 out, to
    which the largest word would round.

    Args:
        key: Name of the stream; different tuples are independent streams.
        size: How many numbers; a longer draw begins with the shorter one.
        start: Numbers of the stream before the first one.

    Example:
        >>> bool((uniforms(("a", 1), 3) == uniforms(("a", 1), 5)[:3]).all())
        True
    """
    generator = _bit_generator(key)
    skipped = generator.advance(start // _WORDS_AT_ONCE)
    words = np.atleast_1d(skipped.random_raw(start % _WORDS_AT_ONCE + size))
    words = words[start % _WORDS_AT_ONCE :]
    counts = (words >> np.uint64(64 - _MANTISSA_BITS)).astype(np.float64)
    return np.minimum((counts + 0.5) / 2**_MANTISSA_BITS, LARGEST)


def normals(key: tuple[str | int, ...], size: int, start: int = 0) -> NDArray[np.float64]:
    """Return ``size`` independent standard normal numbers: the quantiles of ``uniforms``.

    Args:
        key: Name of the stream; shares its numbers with ``uniforms`` of the same name.
        size: How many numbers; a longer draw begins with the shorter one.
        start: Numbers of the stream before the first one.
    """
    drawn: NDArray[np.float64] = ndtri(uniforms(key, size, start))
    return drawn


def permutation(key: tuple[str | int, ...], size: int) -> NDArray[np.intp]:
    """Return a uniformly random permutation of 0 .. size-1, fixed by ``key``.

    Ranks of raw 64-bit words; a tie (probability below size^2 / 2^65) is broken by position.
    """
    words = np.atleast_1d(_bit_generator(key).random_raw(size))
    return np.argsort(words, kind="stable")


def stream_seed(key: tuple[str | int, ...]) -> int:
    """Return the seed, in 0 .. 2^64 - 1, of a stream that is drawn elsewhere than here.

    Args:
        key: Name of the stream.
    """
    return int(np.atleast_1d(_bit_generator(key).random_raw(1))[0])
