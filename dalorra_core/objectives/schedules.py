"""Weights of divergences that change while a run goes on."""

import math

from dalorra_core.errors import ConfigError

__all__ = ["cycle_length", "cyclic_weight"]


def cycle_length(num_examples: int, batch_size: int, gamma: float = 8.0) -> int:
    """Return the number of steps after which BLoB's schedule starts again, at least 1.

    ``floor(100 n^(pi / gamma) / b)`` with n = b floor(N / b), the rows of the full batches of one
    epoch.

    Args:
        num_examples: N, training rows.
        batch_size: b, rows of one optimiser step.
        gamma: Positive; larger means shorter cycles.

    Source:
        docs/method.md, section 9 (BLoB); Wang et al. 2024, in the form of the official code.

    Example:
        >>> cycle_length(640, 4), cycle_length(9427, 4)
        (316, 909)
    """
    if gamma <= 0:
        raise ConfigError(f"gamma must be positive, got {gamma}")
    seen = batch_size * (num_examples // batch_size)
    return max(1, int(100 * seen ** (math.pi / gamma) / batch_size))


def cyclic_weight(step: int, cycle: int) -> float:
    """Return the share of a divergence that falls to one step of BLoB's cycle.

    The weight doubles from step to step, ``2^i / (2^(cycle + 1) - 1)`` at step i = 1 .. cycle: half
    of the divergence falls to the last step, and a whole cycle adds up to almost exactly 1. Written
    with negative powers, so that no cycle is too long for a float.

    Args:
        step: Optimiser steps already taken, from 0.
        cycle: Steps of one cycle, at least 1.

    Source:
        docs/method.md, section 9 (BLoB); Blundell et al. 2015, section 3.4, reversed.

    Example:
        >>> [round(7 * cyclic_weight(step, 2)) for step in range(4)]
        [2, 4, 2, 4]
    """
    if cycle < 1:
        raise ConfigError(f"cycle must be at least 1, got {cycle}")
    place = step % cycle + 1
    return 2.0 ** (place - cycle - 1) / (1.0 - 2.0 ** -(cycle + 1))
