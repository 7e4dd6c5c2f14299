"""Predictions beside what a real server does on this machine.

Only how long a batch takes and what a request costs besides are measured, with one client on an
idle server. Everything else is predicted before it is measured: what the server carries, and its
latencies at several loads, for the very moments and rows of the run.
"""

import argparse
import asyncio
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from benchmarks.queue_simulation.arrivals import of_lengths
from benchmarks.queue_simulation.calibration import calibrated, front_of
from benchmarks.queue_simulation.capacity import highest_rate, saturated_rate
from benchmarks.queue_simulation.outcomes import Fate, Outcome, summarise
from benchmarks.queue_simulation.simulation import BALANCERS, ReplicaModel, simulate
from benchmarks.serving.load import poisson, replay
from benchmarks.serving.process import ServerProcess, serving
from benchmarks.serving.report import Verdict, above, below
from benchmarks.serving.subject import Subject, subject_of
from benchmarks.serving.wire import Reply, Wire

__all__ = ["add_check_options", "check", "judge", "two_replicas"]

MAX_ERROR = {"answered_per_s": 0.1, "p50_s": 0.25, "p95_s": 0.35}
MAX_SHED_ERROR = 0.1
MIN_RATIO = 1.7
OVERLOADED = 1.0  # loads from here on are judged by what is answered and what is shed
LOWEST = 19  # of the priorities; more is cut to it
_SKIPPED = 0.1  # of a run, while the queue fills
_FATES: dict[int, Fate] = {200: "answered", 429: "shed", 504: "late"}


def add_check_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that say how to measure."""
    parser.add_argument("--loads", type=float, nargs="+", default=[0.3, 0.6, 0.9, 2.0])
    parser.add_argument("--seconds", type=float, default=60.0, help="of each load")
    parser.add_argument("--deadline-ms", type=int, default=8000, help="of every request")
    parser.add_argument("--texts-used", type=int, default=48, help="different texts, in turn")
    parser.add_argument("--sizes", type=int, nargs="+", default=[2, 4, 8], help="rows, calibration")
    parser.add_argument("--repeats", type=int, default=4, help="of each size")
    parser.add_argument("--requests", type=int, default=5000, help="at every rate, two replicas")
    parser.add_argument("--front-seconds", type=float, default=8.0, help="without a model")


def check(options: argparse.Namespace) -> dict[str, Any]:
    """Measure a server and return every prediction beside its measurement."""
    subject = subject_of(options)
    with tempfile.TemporaryDirectory() as folder:
        front = front_of(options, Path(folder) / "front.log")
        with serving(
            subject.command, Path(folder) / "server.log", environment=subject.environment
        ) as server:
            if options.fake is None:  # a paced one needs no processor
                os.nice(LOWEST)
            found = asyncio.run(_measure(server, subject, options, front["cpu_s"]))
    return {"subject": subject.says, "front": front, **found}


async def _measure(
    server: ServerProcess, subject: Subject, options: argparse.Namespace, front_s: float
) -> dict[str, Any]:
    wire = Wire(server.port)
    model, lengths, calibration = await calibrated(wire, subject, options, front_s)
    carries = saturated_rate(model, lengths)
    headers = {"X-Request-Timeout-Ms": str(options.deadline_ms)}
    loads: list[dict[str, Any]] = []
    for number, load in enumerate(options.loads):
        moments = list(poisson(load * carries, options.seconds, seed=number))
        run = simulate(of_lengths(moments, lengths), model)
        replies = await replay(wire, _cycled(subject, len(lengths)), moments, headers=headers)
        measured = [
            Outcome(at_s, reply.took_s, _fate(reply))
            for at_s, reply in zip(moments, replies, strict=True)
        ]
        skip_s = _SKIPPED * options.seconds
        predicted = summarise(run.outcomes, options.seconds, skip_s)
        loads.append(
            {
                "load": load,
                "predicted": predicted | _inside(run.utilisation, run.rows_per_batch),
                "measured": summarise(measured, options.seconds, skip_s),
            }
        )
        sys.stderr.write(f"load {load}: {len(replies)} requests\n")
    await wire.close()
    return {
        "calibration": calibration,
        "replica": asdict(model),
        "seconds": options.seconds,
        "deadline_s": options.deadline_ms / 1000,
        "lengths": lengths,
        "saturated_per_s": carries,
        "loads": loads,
        "replicas": two_replicas(model, lengths, options.requests),
    }


def _inside(utilisation: float, rows_per_batch: float) -> dict[str, float]:
    return {"utilisation": utilisation, "rows_per_batch": rows_per_batch}


def _cycled(subject: Subject, count: int) -> Any:
    return lambda number: subject.body(number % count)


def _fate(reply: Reply) -> Fate:
    """Return how a request ended.

    Raises:
        RuntimeError: Not as requests end that meet no fault.
    """
    if reply.status not in _FATES:
        raise RuntimeError(f"the server answered {reply.status} {reply.error}{reply.body[:300]!r}")
    return _FATES[reply.status]


def two_replicas(
    model: ReplicaModel, lengths: Sequence[int], requests: int = 5000
) -> dict[str, Any]:
    """Return how much more two replicas carry than one, each with a machine like this one.

    At one bound on the slowest hundredth: five times what a request takes alone, so that there
    is room for a queue.
    """
    alone_s = model.front_s + model.delay_s + model.service([max(lengths)], model.samples)
    model = replace(model, deadline_s=max(model.deadline_s, 20 * alone_s))
    p99_s = 5 * alone_s
    one = highest_rate(model, lengths, p99_s, requests=requests)
    found: dict[str, Any] = {"p99_s": p99_s, "one_per_s": one}
    for name, balancer in BALANCERS.items():
        two = highest_rate(model, lengths, p99_s, replicas=2, balancer=balancer, requests=requests)
        found[name] = {"two_per_s": two, "ratio": two / one}
    return found


def judge(found: dict[str, Any]) -> list[Verdict]:
    """Return the verdicts on predictions: how far they are from what was measured."""
    verdicts: list[Verdict] = []
    for one in found["loads"]:
        predicted, measured, load = one["predicted"], one["measured"], one["load"]
        overloaded = load >= OVERLOADED
        for name, limit in MAX_ERROR.items():
            if overloaded and name != "answered_per_s":
                continue
            error = abs(predicted[name] / measured[name] - 1)
            verdicts.append(below(f"load {load}: error of {name}", error, limit))
        if overloaded:
            error = abs(predicted["shed"] - measured["shed"])
            verdicts.append(below(f"load {load}: error of the share shed", error, MAX_SHED_ERROR))
    ratios = [found["replicas"][name]["ratio"] for name in BALANCERS]
    verdicts.append(above("two replicas / one, simulated", min(ratios), MIN_RATIO))
    return verdicts
