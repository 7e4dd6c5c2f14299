"""Load on a server: closed loops that find its capacity, open loops that do not care about it."""

import asyncio
import json
import random
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.serving.process import ServerProcess, Usage
from benchmarks.serving.wire import Reply, Wire

__all__ = [
    "OK",
    "capacity",
    "closed_loop",
    "count",
    "made_texts",
    "open_loop",
    "percentile",
    "poisson",
    "read_texts",
    "replay",
    "watch",
]

OK = 200
Body = Callable[[int], dict[str, Any]]
"""From the number of a request to its body."""

_WORDS = (
    *("please", "transfer", "money", "from", "my", "savings", "account", "to", "the", "other"),
    *("what", "is", "balance", "of", "card", "why", "was", "it", "declined", "book", "flight"),
    *("hotel", "for", "two", "in", "march", "set", "an", "alarm", "at", "seven", "tell", "joke"),
    *("about", "cats", "how", "much", "does", "insurance", "cost", "cancel", "order", "late"),
)


def made_texts(count: int, seed: int = 0, words: tuple[int, int] = (4, 16)) -> list[str]:
    """Return made-up questions, all different, of some ten words and four digits each."""
    draw = random.Random(seed)  # noqa: S311 - no secret
    return [
        " ".join(draw.choices(_WORDS, k=draw.randint(*words))) + f" {number:04d}"
        for number in range(count)
    ]


def read_texts(path: Path) -> list[str]:
    """Return the texts of a JSONL file with a ``text`` field."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["text"] for line in lines if line.strip()]


def percentile(values: Sequence[float], share: float) -> float:
    """Return the smallest value that the share of all values does not exceed; NaN for none."""
    if not values:
        return float("nan")
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def count(replies: Sequence[Reply]) -> dict[str, int]:
    """Return how many replies have each status; ``0`` are those without an answer."""
    return {str(status): n for status, n in sorted(Counter(r.status for r in replies).items())}


async def closed_loop(
    wire: Wire,
    body: Body,
    *,
    clients: int,
    seconds: float,
    headers: Mapping[str, str] | None = None,
) -> list[Reply]:
    """Let clients ask, each again as soon as it has its answer; return all replies."""
    end_s = time.monotonic() + seconds
    numbers = iter(range(10**9))
    replies: list[Reply] = []

    async def client() -> None:
        while time.monotonic() < end_s:
            replies.append(await wire.ask("POST", "/v1/classify", body(next(numbers)), headers))

    await asyncio.gather(*(client() for _ in range(clients)))
    return replies


def poisson(rate: float, seconds: float, seed: int = 0) -> Iterator[float]:
    """Yield the moments of a Poisson process of so many a second, in seconds from its start."""
    draw = random.Random(seed)  # noqa: S311 - no secret
    at_s = draw.expovariate(rate)
    while at_s < seconds:
        yield at_s
        at_s += draw.expovariate(rate)


async def replay(
    wire: Wire,
    body: Body,
    moments: Iterable[float],
    *,
    headers: Mapping[str, str] | None = None,
) -> list[Reply]:
    """Send one request at each moment, whatever comes back; return all replies in order.

    Args:
        wire: Connections to the server.
        body: Makes the body of a request.
        moments: In seconds from now, in order.
        headers: Of every request.
    """
    tasks: list[asyncio.Task[Reply]] = []
    began_s = time.monotonic()
    for number, at_s in enumerate(moments):
        due_s = began_s + at_s
        await asyncio.sleep(max(0.0, due_s - time.monotonic()))
        sending = wire.ask("POST", "/v1/classify", body(number), headers, due_s=due_s)
        tasks.append(asyncio.create_task(sending))
    return list(await asyncio.gather(*tasks))


async def open_loop(
    wire: Wire,
    body: Body,
    *,
    rate: float,
    seconds: float,
    headers: Mapping[str, str] | None = None,
    seed: int = 0,
) -> list[Reply]:
    """Send requests at the moments of a Poisson process, whatever comes back; return all replies.

    Args:
        wire: Connections to the server.
        body: Makes the body of a request.
        rate: Requests a second, on average.
        seconds: How long to send; it returns when the last answer is there.
        headers: Of every request.
        seed: Of the moments.
    """
    return await replay(wire, body, poisson(rate, seconds, seed), headers=headers)


async def capacity(
    wire: Wire, body: Body, *, clients: Sequence[int], seconds: float
) -> dict[str, float]:
    """Return answers a second at the best number of clients, and the median latency of one.

    Raises:
        RuntimeError: A request failed although nothing was wrong.
    """
    found: dict[str, float] = {"requests_per_s": 0.0}
    for number in (1, *clients):
        began_s = time.monotonic()
        replies = await closed_loop(wire, body, clients=number, seconds=seconds)
        elapsed_s = time.monotonic() - began_s
        failed = [reply for reply in replies if reply.status != OK]
        if failed:
            why = f"{failed[0].error}{failed[0].body[:300]!r}"
            raise RuntimeError(f"with {number} clients the answers were {count(replies)}: {why}")
        if number == 1:
            found["p50_s"] = statistics.median(reply.took_s for reply in replies)
        if len(replies) / elapsed_s > found["requests_per_s"]:
            found |= {"requests_per_s": len(replies) / elapsed_s, "clients": float(number)}
    return found


async def watch(server: ServerProcess, into: list[Usage], every_s: float = 1.0) -> None:
    """Note what the server holds, again and again, until cancelled."""
    while True:
        into.append(server.usage())
        await asyncio.sleep(every_s)
