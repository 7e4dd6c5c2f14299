"""Times of several ways to do the same, taken in turn, so that a slow minute slows all of them."""

import time
from collections.abc import Callable, Mapping

import torch

__all__ = ["interleaved_times"]


def interleaved_times(
    ways: Mapping[str, Callable[[], object]], repeats: int
) -> dict[str, list[float]]:
    """Return ``repeats`` wall times of every way, in seconds, after one warm-up of each."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for way in ways.values():
        way()  # warm-up
    for _ in range(repeats):
        for name, way in ways.items():
            began_s = time.perf_counter()
            way()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            times[name].append(time.perf_counter() - began_s)
    return times
