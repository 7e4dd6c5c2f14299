"""When requests come and how long their rows are. A Poisson process is the load driver's own."""

import csv
import json
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path

__all__ = ["Arrival", "bursty", "of_lengths", "recorded"]


@dataclass(frozen=True, slots=True)
class Arrival:
    """One request.

    Attributes:
        at_s: When it comes, in seconds from the start.
        lengths: Tokens of each of its rows.
    """

    at_s: float
    lengths: tuple[int, ...]


def of_lengths(moments: Iterable[float], lengths: Sequence[int]) -> Iterator[Arrival]:
    """Give each moment a request of one row; the lengths come in turn, again and again."""
    for at_s, length in zip(moments, cycle(lengths), strict=False):
        yield Arrival(at_s, (length,))


def bursty(
    rate: float,
    seconds: float,
    seed: int = 0,
    *,
    factor: float = 4.0,
    share: float = 0.1,
    burst_s: float = 5.0,
) -> Iterator[float]:
    """Yield the moments of a Markov-modulated Poisson process of two states.

    Bursts of exponential length come at ``factor`` times the mean rate; between them it is so much
    lower that the mean is kept.

    Args:
        rate: Requests a second, on average over both states.
        seconds: How long.
        seed: Of all draws.
        factor: Rate in a burst over the mean rate, at least 1.
        share: Share of the time that is in bursts, in (0, 1); ``factor * share`` is at most 1.
        burst_s: Mean length of a burst, in seconds.

    Raises:
        ValueError: The bursts alone would exceed the mean rate.
    """
    if factor < 1 or not 0 < share < 1 or factor * share > 1:
        raise ValueError(f"bursts of {factor} times the rate cannot take {share} of the time")
    draw = random.Random(seed)  # noqa: S311 - no secret
    calm = rate * (1 - factor * share) / (1 - share)
    states = ((calm, burst_s * (1 - share) / share), (factor * rate, burst_s))
    state = int(draw.random() < share)
    at_s = 0.0
    while at_s < seconds:
        rate_now, mean_s = states[state]
        end_s = min(seconds, at_s + draw.expovariate(1 / mean_s))
        while rate_now and (at_s := at_s + draw.expovariate(rate_now)) < end_s:
            yield at_s
        at_s = end_s  # the process has no memory: what was drawn beyond the state's end is void
        state = 1 - state


def recorded(path: Path, lengths: Sequence[int]) -> list[Arrival]:
    """Return the requests of a record, in order of time, the first of them at 0.

    Args:
        path: CSV with a header or JSONL with one object a line: ``at_s`` in seconds from any
            start and, where it is known, ``tokens``: of its one row, or a list, one a row.
        lengths: Tokens of those that do not say, in turn.

    Raises:
        KeyError: A line has no ``at_s``.
        ValueError: A value is no number.
    """
    with path.open(encoding="utf-8", newline="") as file:
        lines = csv.DictReader(file) if path.suffix == ".csv" else map(json.loads, file)
        found = [(float(line["at_s"]), line.get("tokens")) for line in lines]
    found.sort(key=lambda one: one[0])
    others = cycle(lengths)
    return [
        Arrival(at_s - found[0][0], _tokens(tokens) or (next(others),)) for at_s, tokens in found
    ]


def _tokens(said: object) -> tuple[int, ...]:
    """Return the tokens of every row; none where nothing is said."""
    if isinstance(said, list):
        return tuple(int(one) for one in said)
    return (int(str(said)),) if said else ()
