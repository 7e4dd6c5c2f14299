"""Ten times the load a server can carry: nobody is lost, nothing grows, and it recovers.

The server runs in a process of its own. Its capacity is measured closed-loop, before and after,
since a shared machine is not equally fast all the time; in between requests arrive as a Poisson
process at a multiple of it, whatever comes back. Clients would be other machines, so here they get
what the server leaves of this one: they run at the lowest priority.

    python -m benchmarks.serving.overload --seconds 120 --factor 10 --output overload.json
"""

import argparse
import asyncio
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.serving.load import OK, capacity, count, open_loop, percentile, watch
from benchmarks.serving.process import ServerProcess, Usage, serving
from benchmarks.serving.report import Verdict, above, below, conclude, equals
from benchmarks.serving.subject import Subject, add_options, subject_of
from benchmarks.serving.wire import LOST, Reply, Wire

__all__ = ["judge", "main", "overload", "recovered"]

DEADLINE_SLACK = 1.2
MIN_THROUGHPUT = 0.9
MAX_MEMORY = 1.05
RECOVERY_S = 5.0
_ANSWERS = frozenset({200, 429, 503, 504})
LOWEST = 19  # of the priorities; more is cut to it
_PATIENT = 20
_RETURNING = 8  # fewer than fit into half of a deadline


def main(arguments: list[str] | None = None) -> int:
    """Run the overload, print and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--factor", type=float, default=10.0)
    parser.add_argument("--deadline-ms", type=int, default=8000, help="of every request")
    parser.add_argument("--clients", type=int, nargs="+", default=[8, 16], help="for the capacity")
    parser.add_argument("--capacity-seconds", type=float, default=15.0)
    add_options(parser)
    options = parser.parse_args(arguments)
    subject = subject_of(options)
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "server.log"
        with serving(subject.command, log, environment=subject.environment) as server:
            if options.fake is None:  # which is paced, and needs no processor
                os.nice(LOWEST)
            found = asyncio.run(overload(server, subject, options))
    found["subject"] = subject.says
    return conclude("overload", found, judge(found), options.output)


async def overload(
    server: ServerProcess, subject: Subject, options: argparse.Namespace
) -> dict[str, Any]:
    """Measure the capacity, overload the server, see it recover; return what was found."""
    wire = Wire(server.port)
    headers = {"X-Request-Timeout-Ms": str(options.deadline_ms)}
    peak = await capacity(
        wire, subject.body, clients=options.clients, seconds=options.capacity_seconds
    )
    rate = options.factor * peak["requests_per_s"]
    samples: list[Usage] = []
    watching = asyncio.create_task(watch(server, samples, min(1.0, options.seconds / 20)))
    began_s = time.monotonic()
    patient = asyncio.create_task(_patient_clients(wire, subject, headers, options.seconds))
    replies = await open_loop(
        wire, subject.body, rate=rate, seconds=options.seconds, headers=headers
    )
    ended_s = began_s + options.seconds
    recovery = await recovered(wire, subject, peak["p50_s"], ended_s)
    watching.cancel()
    patient_replies, admitted = await patient
    last = await _last_refused(wire, subject, headers, options)
    after = await capacity(
        wire, subject.body, clients=options.clients, seconds=options.capacity_seconds
    )
    await wire.close()
    return {
        "capacity": peak,
        "capacity_after": after,
        "arrivals_per_s": rate,
        "seconds": options.seconds,
        "deadline_s": options.deadline_ms / 1000,
        "answers": count(replies),
        "errors": sorted({reply.error for reply in replies if reply.error})[:5],
        "other_statuses": sum(r.status not in _ANSWERS and r.status != LOST for r in replies),
        "refused_with_advice": _advised(replies),
        "latency": _latency(replies),
        "answered_per_s": _throughput([*replies, *patient_replies], began_s, ended_s),
        "memory_mb": _memory(samples, began_s, ended_s),
        "recovery": recovery,
        "came_back_after_retry_after_under_load": admitted,
        "came_back_after_retry_after_at_the_end": last,
    }


def _throughput(replies: Sequence[Reply], began_s: float, ended_s: float) -> float:
    """Return 200s a second that came while the overload was on, its first eighth left out."""
    from_s = began_s + (ended_s - began_s) / 8
    done = [r.sent_s + r.took_s for r in replies if r.status == OK]
    return sum(from_s <= at_s < ended_s for at_s in done) / (ended_s - from_s)


def _latency(replies: Sequence[Reply]) -> dict[str, dict[str, float]]:
    found = {}
    for status in (200, 429, 504):
        took_s = [reply.took_s for reply in replies if reply.status == status]
        if took_s:
            found[str(status)] = {
                "p50_s": percentile(took_s, 0.5),
                "p99_s": percentile(took_s, 0.99),
                "max_s": max(took_s),
            }
    return found


def _advised(replies: Sequence[Reply]) -> float:
    """Return the share of 429s that say when to come back."""
    refused = [reply for reply in replies if reply.status == 429]  # noqa: PLR2004
    told = sum(float(reply.headers.get("retry-after", 0)) >= 1 for reply in refused)
    return told / len(refused) if refused else 1.0


def _memory(samples: Sequence[Usage], began_s: float, ended_s: float) -> dict[str, float]:
    """Return the medians of the first and the last minute (or half, if that is shorter)."""
    window_s = min(60.0, (ended_s - began_s) / 2)
    first = [s.rss_mb for s in samples if s.at_s < began_s + window_s]
    last = [s.rss_mb for s in samples if ended_s - window_s <= s.at_s < ended_s]
    return {"first": statistics.median(first), "last": statistics.median(last)}


async def recovered(
    wire: Wire, subject: Subject, usual_s: float, ended_s: float
) -> dict[str, float]:
    """Return when after the overload a request was answered as fast as usual, in seconds."""
    limit_s = 2 * usual_s + 0.05
    while time.monotonic() < ended_s + 120:
        reply = await wire.ask("POST", "/v1/classify", subject.body(10**6))
        if reply.status == OK and reply.took_s <= limit_s:
            return {"after_s": time.monotonic() - ended_s, "took_s": reply.took_s}
        await asyncio.sleep(0.05)
    return {"after_s": float("inf"), "took_s": float("inf")}


async def _patient_clients(
    wire: Wire, subject: Subject, headers: dict[str, str], seconds: float
) -> tuple[list[Reply], dict[str, float]]:
    """Let some clients heed Retry-After while others do not; they compete with the crowd."""
    replies: list[Reply] = []
    tries = came_back = 0
    end_s = time.monotonic() + seconds
    while time.monotonic() < end_s and tries < _PATIENT:
        reply = await wire.ask("POST", "/v1/classify", subject.body(tries), headers)
        replies.append(reply)
        if reply.status == 429:  # noqa: PLR2004
            wait_s = float(reply.headers["retry-after"])
            if time.monotonic() + wait_s > end_s:
                break
            await asyncio.sleep(wait_s)
            again = await wire.ask("POST", "/v1/classify", subject.body(tries), headers)
            replies.append(again)
            tries += 1
            came_back += again.status == OK
        await asyncio.sleep(seconds / (4 * _PATIENT))
    return replies, {"refused": tries, "admitted_next_time": came_back}


async def _last_refused(
    wire: Wire, subject: Subject, headers: dict[str, str], options: argparse.Namespace
) -> dict[str, float]:
    """Fill the server once more; some of those it refuses wait as told, and are let in."""
    most = int(subject.says["settings"].get("max_requests", 256))
    burst = [
        wire.ask("POST", "/v1/classify", subject.body(number), headers)
        for number in range(most + options.clients[-1])
    ]
    tasks = [asyncio.create_task(one) for one in burst]
    refused = [r for r in await asyncio.gather(*tasks) if r.status == 429]  # noqa: PLR2004
    if not refused:
        return {"refused": 0, "returned": 0, "admitted_next_time": 0}
    wait_s = max(float(r.headers["retry-after"]) - (time.monotonic() - r.sent_s) for r in refused)
    await asyncio.sleep(max(0.0, wait_s))
    returning = refused[:_RETURNING]
    again = [
        wire.ask("POST", "/v1/classify", subject.body(number), headers)
        for number in range(len(returning))
    ]
    admitted = sum(reply.status == OK for reply in await asyncio.gather(*again))
    return {
        "refused": len(refused),
        "returned": len(returning),
        "admitted_next_time": admitted,
    }


def judge(found: dict[str, Any]) -> list[Verdict]:
    """Return the verdicts on what was found."""
    latency, memory = found["latency"], found["memory_mb"]
    limit_s = DEADLINE_SLACK * found["deadline_s"]
    last = found["came_back_after_retry_after_at_the_end"]
    peaks = (found["capacity"], found["capacity_after"])
    peak_per_s = statistics.mean(peak["requests_per_s"] for peak in peaks)
    return [
        equals("requests without an answer", found["answers"].get("0", 0), 0),
        equals("answers other than 200, 429, 503, 504", found["other_statuses"], 0),
        below("p99 of accepted requests, s", latency.get("200", {}).get("p99_s", 0.0), limit_s),
        below("p99 of 504s, s", latency.get("504", {}).get("p99_s", 0.0), limit_s),
        above(
            "throughput / peak",
            found["answered_per_s"] / peak_per_s,
            MIN_THROUGHPUT,
        ),
        below("memory, last minute / first", memory["last"] / memory["first"], MAX_MEMORY),
        above("share of 429s with Retry-After", found["refused_with_advice"], 1.0),
        above(
            "share let in after Retry-After",
            last["admitted_next_time"] / last["returned"] if last["returned"] else 1.0,
            1.0,
        ),
        below("recovery, s", found["recovery"]["after_s"], RECOVERY_S),
    ]


if __name__ == "__main__":
    sys.exit(main())
