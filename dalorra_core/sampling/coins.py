"""Coins by the million, tossed where they are needed: number i is a hash of its seed and i.

For noise on every feature of every token, which is too much to draw on the CPU and send to a GPU,
and too much to keep. Whole numbers only, so that every device finds the same ones.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["coins", "random_words"]


def _signed(word: int) -> int:
    """Return the 64 bits of a word as torch's signed integer has them."""
    return word - 2**64 if word >= 2**63 else word


_STEP = _signed(0x9E3779B97F4A7C15)
_ROUNDS = ((30, _signed(0xBF58476D1CE4E5B9)), (27, _signed(0x94D049BB133111EB)))
_LAST_SHIFT = 31


def random_words(seeds: Sequence[int], size: int, device: torch.device, start: int = 0) -> Tensor:
    """Return words of SplitMix64 streams that follow one another, all at once.

    Args:
        seeds: M of them, 0 to 2^64 - 1, such as from ``stream_seed``.
        size: Words of each stream; a longer draw begins with the shorter one.
        device: Where to.
        start: Words of each stream before the first one.

    Returns:
        (M, size) int64, the 64 bits of each word.

    Source:
        Steele, Lea and Flood 2014, Fast splittable pseudorandom number generators, section 5.
    """
    starts = torch.tensor([_signed(seed) for seed in seeds], device=device).unsqueeze(1)
    words = (
        starts + torch.arange(start + 1, start + size + 1, device=device) * _STEP
    )  # wraps, as it should
    for shift, factor in _ROUNDS:
        words = (words ^ _shifted(words, shift)) * factor
    return words ^ _shifted(words, _LAST_SHIFT)


def coins(
    seeds: Sequence[int], size: int, prob: float, device: torch.device, start: int = 0
) -> Tensor:
    """Return independent coins that are True with probability ``prob``, to within 2^-33.

    Args:
        seeds: M of them, one for each stream.
        size: Coins of each stream; a longer draw begins with the shorter one.
        prob: In [0, 1).
        device: Where to; the same coins everywhere.
        start: Coins of each stream before the first one.

    Returns:
        (M, size) bool.
    """
    odd = start % 2  # a word is two coins
    words = random_words(seeds, -(-(size + odd) // 2), device, start // 2)
    halves = words.view(torch.int32)
    return halves[:, odd : odd + size] < round(prob * 2**32) - 2**31


def _shifted(words: Tensor, places: int) -> Tensor:
    """Shift to the right without the sign."""
    return (words >> places) & ((1 << (64 - places)) - 1)
