"""The four numbers a server is judged by: throughput, added latency, start, idleness.

Throughput at saturation and that of the offline predictor on the same rows alternate in one run,
with the same threads; the ratio is of medians. Added latency is what a client waits beyond
tokenising and the forward pass, which the answer's ``Server-Timing`` tells.

    python -m benchmarks.serving.targets --output targets.json
"""

import argparse
import asyncio
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.serving.load import OK, percentile
from benchmarks.serving.process import ServerProcess, serving
from benchmarks.serving.report import Verdict, above, below, conclude
from benchmarks.serving.subject import Subject, add_options, subject_of
from benchmarks.serving.wire import Reply, Wire

__all__ = ["judge", "main", "server_timing"]

MIN_THROUGHPUT = 0.9
MAX_ADDED_MS = 5.0
MAX_START_S = 15.0
MAX_IDLE_PERCENT = 1.0


def main(arguments: list[str] | None = None) -> int:
    """Measure, print and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clients", type=int, default=48, help="at saturation")
    parser.add_argument("--block-rows", type=int, default=96, help="rows of one block")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--single", type=int, default=60, help="requests at low load")
    parser.add_argument("--idle-seconds", type=float, default=30.0)
    parser.add_argument("--starts", type=int, default=3)
    add_options(parser)
    options = parser.parse_args(arguments)
    subject = subject_of(options)
    with tempfile.TemporaryDirectory() as folder:
        found = _measure(subject, options, Path(folder))
    found["subject"] = subject.says
    return conclude("targets", found, judge(found), options.output)


def _measure(subject: Subject, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    starts_s = []
    for number in range(options.starts):
        log = folder / f"start-{number}.log"
        with serving(subject.command, log, environment=subject.environment) as server:
            starts_s.append(server.ready_s)
    log = folder / "server.log"
    with serving(subject.command, log, environment=subject.environment) as server:
        starts_s.append(server.ready_s)
        idle = _idle_percent(server, options.idle_seconds)
        added = asyncio.run(_added_latency(server, subject, options.single))
        rates = asyncio.run(_throughput(server, subject, options))
    return {"starts_s": starts_s, "idle_percent": idle, "added_latency": added, "rates": rates}


def _idle_percent(server: ServerProcess, seconds: float) -> float:
    time.sleep(2.0)  # what the start left behind
    before = server.usage()
    time.sleep(seconds)
    after = server.usage()
    return 100 * (after.cpu_s - before.cpu_s) / (after.at_s - before.at_s)


def server_timing(reply: Reply) -> dict[str, float]:
    """Return the stages of an answer in milliseconds."""
    parts = reply.headers.get("server-timing", "").split(",")
    pairs = (part.strip().partition(";dur=") for part in parts if ";dur=" in part)
    return {name: float(value) for name, _, value in pairs}


async def _added_latency(server: ServerProcess, subject: Subject, requests: int) -> dict[str, Any]:
    wire = Wire(server.port)
    added, waited = [], []
    for number in range(requests + 5):
        reply = await wire.ask("POST", "/v1/classify", subject.body(number))
        if reply.status != OK:
            raise RuntimeError(f"the server answered {reply.status}")
        stages = server_timing(reply)
        if number >= 5:  # noqa: PLR2004 - the first ones warm up
            wall_ms = 1000 * reply.took_s
            added.append(wall_ms - stages["tokenize"] - stages["forward"])
            waited.append(stages.get("queue", 0.0))
        await asyncio.sleep(0.02)
    await wire.close()
    return {
        "p50_ms": percentile(added, 0.5),
        "p99_ms": percentile(added, 0.99),
        "queue_p50_ms": percentile(waited, 0.5),
    }


async def _throughput(
    server: ServerProcess, subject: Subject, options: argparse.Namespace
) -> dict[str, Any]:
    """Return rows a second of both, block by block."""
    texts = [subject.body(number)["input"] for number in range(options.block_rows)]
    offline = None if options.fake is not None else _offline(options, texts)
    wire = Wire(server.port)
    online_rates, offline_rates = [], []
    if offline is not None:
        offline()  # warm-up
    for repeat in range(options.repeats + 1):
        rate = await _online(wire, subject, options)
        if repeat:  # the first one warms up
            online_rates.append(rate)
            if offline is not None:
                offline_rates.append(len(texts) / offline())
        sys.stderr.write(f"{repeat}/{options.repeats}: {rate:.2f} rows/s served\n")
    await wire.close()
    found: dict[str, Any] = {"server_rows_per_s": online_rates, "offline_rows_per_s": offline_rates}
    if offline_rates:
        found["ratio"] = statistics.median(online_rates) / statistics.median(offline_rates)
    return found


async def _online(wire: Wire, subject: Subject, options: argparse.Namespace) -> float:
    """Return rows a second when all rows of a block are asked for by so many clients."""
    numbers = iter(range(options.block_rows))
    failed: list[Reply] = []

    async def client() -> None:
        for number in numbers:
            reply = await wire.ask("POST", "/v1/classify", subject.body(number))
            if reply.status != OK:
                failed.append(reply)

    began_s = time.monotonic()
    await asyncio.gather(*(client() for _ in range(options.clients)))
    if failed:
        raise RuntimeError(f"{len(failed)} requests failed, one with {failed[0].status}")
    return options.block_rows / (time.monotonic() - began_s)


def _offline(options: argparse.Namespace, texts: list[str]) -> Callable[[], float]:
    """Return a function that answers the texts without a server, in seconds."""
    from dalorra_core.data.examples import TextExample  # noqa: PLC0415 - slow, not for the fake
    from dalorra_core.metrics.uncertainty import summarise  # noqa: PLC0415
    from dalorra_core.predictive.predictor import Predictor, SamplingPlan  # noqa: PLC0415

    predictor = Predictor.load(options.adapter, base=options.base)
    samples = options.num_samples
    plan = None if samples is None else SamplingPlan(samples)
    size = 32  # as max_batch_rows

    def run() -> float:
        began_s = time.perf_counter()
        for start in range(0, len(texts), size):
            part = texts[start : start + size]
            rows = [predictor.encode(TextExample(str(n), text)) for n, text in enumerate(part)]
            summarise(predictor.predict(rows, plan).log_probs)
        return time.perf_counter() - began_s

    return run


def judge(found: dict[str, Any]) -> list[Verdict]:
    """Return the verdicts on what was found."""
    verdicts = [
        below("added latency p50, ms", found["added_latency"]["p50_ms"], MAX_ADDED_MS),
        below("start to ready, s", statistics.median(found["starts_s"]), MAX_START_S),
        below("idle CPU, %", found["idle_percent"], MAX_IDLE_PERCENT),
    ]
    if "ratio" in found["rates"]:
        ratio = above("server / offline throughput", found["rates"]["ratio"], MIN_THROUGHPUT)
        verdicts.insert(0, ratio)
    return verdicts


if __name__ == "__main__":
    sys.exit(main())
