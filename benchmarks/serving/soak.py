"""A server at 70 % of its capacity for twenty minutes: nothing leaks and it gets no slower.

Each quarter of the time has the same requests at the same moments: at this load the waiting of a
Poisson process differs from quarter to quarter by more than the drift that is looked for.

    python -m benchmarks.serving.soak --minutes 20 --load 0.7 --output soak.json

Memory, open files and threads are read from ``/proc``. Objects are counted in a run of its own
(``--objects``): the app on the fake engine in this process, asked in rounds, its garbage collected
and its objects counted after each.
"""

import argparse
import asyncio
import gc
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx

from benchmarks.serving.load import OK, capacity, count, made_texts, open_loop, percentile, watch
from benchmarks.serving.process import ServerProcess, Usage, serving
from benchmarks.serving.report import Verdict, below, conclude, equals
from benchmarks.serving.subject import Subject, add_options, subject_of
from benchmarks.serving.wire import Reply, Wire

__all__ = ["judge", "main", "object_growth", "soak"]

MAX_DRIFT = 1.10
MAX_MEMORY = 1.05
MAX_MORE_FILES = 8
MAX_MORE_THREADS = 2
MAX_OBJECTS_PER_REQUEST = 0.05
PASSING_OBJECTS = 600
"""Timers that were cancelled and not swept up yet come and go by some hundred objects."""


def main(arguments: list[str] | None = None) -> int:
    """Run the soak, print and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--load", type=float, default=0.7, help="share of the capacity")
    parser.add_argument("--clients", type=int, nargs="+", default=[8, 16], help="for the capacity")
    parser.add_argument("--capacity-seconds", type=float, default=20.0)
    parser.add_argument("--objects", type=int, default=2000, help="requests; 0 leaves it out")
    add_options(parser)
    options = parser.parse_args(arguments)
    subject = subject_of(options)
    # first, since it is short: nothing may fail after the long part
    objects = asyncio.run(object_growth(options.objects)) if options.objects else None
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "server.log"
        with serving(subject.command, log, environment=subject.environment) as server:
            found = asyncio.run(soak(server, subject, options))
    found["subject"] = subject.says
    if objects is not None:
        found["objects"] = objects
    return conclude("soak", found, judge(found), options.output)


async def soak(
    server: ServerProcess, subject: Subject, options: argparse.Namespace
) -> dict[str, Any]:
    """Load the server for the time; return what was found."""
    wire = Wire(server.port)
    peak = await capacity(
        wire, subject.body, clients=options.clients, seconds=options.capacity_seconds
    )
    rate = options.load * peak["requests_per_s"]
    seconds = 60 * options.minutes
    samples: list[Usage] = []
    watching = asyncio.create_task(watch(server, samples, min(5.0, seconds / 40)))
    began_s = time.monotonic()
    quarters = [
        await open_loop(wire, subject.body, rate=rate, seconds=seconds / 4, seed=7)
        for _ in range(4)
    ]
    watching.cancel()
    replies = [reply for quarter in quarters for reply in quarter]
    await wire.close()
    return {
        "capacity": peak,
        "arrivals_per_s": rate,
        "seconds": seconds,
        "answers": count(replies),
        "minutes": _minutes(replies, began_s, seconds),
        "latency": {
            "first_p50_s": percentile([reply.took_s for reply in quarters[0]], 0.5),
            "last_p50_s": percentile([reply.took_s for reply in quarters[-1]], 0.5),
        },
        "usage": _growth(samples),
    }


def _minutes(replies: Sequence[Reply], began_s: float, seconds: float) -> list[dict[str, float]]:
    """Return the latencies of each minute (or tenth, if that is shorter)."""
    step_s = min(60.0, seconds / 10)
    found = []
    for number in range(round(seconds / step_s)):
        start_s = began_s + number * step_s
        took_s = [r.took_s for r in replies if start_s <= r.sent_s < start_s + step_s]
        found.append(
            {
                "requests": len(took_s),
                "p50_s": percentile(took_s, 0.5),
                "p95_s": percentile(took_s, 0.95),
                "p99_s": percentile(took_s, 0.99),
            }
        )
    return found


def _growth(samples: Sequence[Usage]) -> dict[str, dict[str, float]]:
    """Return medians of the second quarter, when all is warm, and of the last."""
    quarter = max(1, len(samples) // 4)
    early, late = samples[quarter : 2 * quarter], samples[-quarter:]
    return {
        name: {
            "early": statistics.median(getattr(s, name) for s in early),
            "late": statistics.median(getattr(s, name) for s in late),
        }
        for name in ("rss_mb", "files", "threads")
    }


async def object_growth(requests: int, rounds: int = 5) -> dict[str, float]:
    """Return how many objects live after a round of requests to the app in this process, and later.

    Args:
        requests: In one round.
        rounds: Counted ones; one more goes before them to warm up.
    """
    from server.app import create_app  # noqa: PLC0415 - not in the process that drives the load
    from server.settings import Settings  # noqa: PLC0415
    from tests.support.fake_engine import FakeEngine  # noqa: PLC0415

    app = create_app(FakeEngine, Settings(feedback_url="off", batch_wait_ms=0))  # type: ignore[arg-type]
    transport = httpx.ASGITransport(app)
    counts = []
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url="http://localhost") as client,
    ):
        await app.state.service.lifecycle.loaded()
        for number in range(rounds + 1):
            for text in made_texts(requests, seed=number):
                answer = await client.post("/v1/classify", json={"input": text})
                if answer.status_code != OK:
                    raise RuntimeError(f"the app answered {answer.status_code}")
            app.state.service.lifecycle.engine.batches.clear()  # the fake engine's own memory
            gc.collect()
            counts.append(len(gc.get_objects()))
    grown = max(0, counts[-1] - counts[1] - PASSING_OBJECTS)
    per_request = grown / (requests * (rounds - 1))
    return {"first": counts[1], "last": counts[-1], "per_request": per_request}


def judge(found: dict[str, Any]) -> list[Verdict]:
    """Return the verdicts on what was found."""
    usage, latency = found["usage"], found["latency"]
    failed = sum(n for status, n in found["answers"].items() if status != str(OK))
    verdicts = [
        equals("failed requests", failed, 0),
        below(
            "latency p50, last quarter / first",
            latency["last_p50_s"] / latency["first_p50_s"],
            MAX_DRIFT,
        ),
        below(
            "memory, last quarter / second",
            usage["rss_mb"]["late"] / usage["rss_mb"]["early"],
            MAX_MEMORY,
        ),
        below("more open files", usage["files"]["late"] - usage["files"]["early"], MAX_MORE_FILES),
        below(
            "more threads", usage["threads"]["late"] - usage["threads"]["early"], MAX_MORE_THREADS
        ),
    ]
    if "objects" in found:
        grown = found["objects"]["per_request"]
        verdicts.append(below("objects kept per request", grown, MAX_OBJECTS_PER_REQUEST))
    return verdicts


if __name__ == "__main__":
    sys.exit(main())
