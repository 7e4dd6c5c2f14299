"""What a check measures beforehand: one client on an idle server, and a server without a model."""

import argparse
import asyncio
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.queue_simulation.service import Linear
from benchmarks.queue_simulation.simulation import ReplicaModel
from benchmarks.serving.load import OK, closed_loop
from benchmarks.serving.process import ServerProcess, serving
from benchmarks.serving.subject import Subject, subject_of
from benchmarks.serving.targets import server_timing
from benchmarks.serving.wire import Wire
from server.app import admission_limits
from server.batching import AdmissionLimits, BatchLimits, Ticket, next_batch
from server.engine_run import batch_limits
from server.ports import BatchKey, EncodedRow, Sampling
from server.settings import Settings

__all__ = ["calibrated", "cut", "front_of", "replica_of"]

_FRONT_CLIENTS = 8


def front_of(options: argparse.Namespace, log: Path) -> dict[str, float]:
    """Return what a request costs a server whose engine takes no time."""
    command = [sys.executable, "-m", "tests.support.serve_fake"]
    subject = subject_of(argparse.Namespace(**{**vars(options), "fake": 0.0, "set": []}))

    async def load(server: ServerProcess) -> dict[str, float]:
        wire = Wire(server.port)
        await closed_loop(wire, subject.body, clients=_FRONT_CLIENTS, seconds=1.0)  # warm-up
        before = server.usage()
        replies = await closed_loop(
            wire, subject.body, clients=_FRONT_CLIENTS, seconds=options.front_seconds
        )
        after = server.usage()
        await wire.close()
        return {
            "cpu_s": (after.cpu_s - before.cpu_s) / len(replies),
            "requests_per_s": len(replies) / (after.at_s - before.at_s),
        }

    with serving(command, log) as server:
        return asyncio.run(load(server))


@dataclass(frozen=True)
class _Solo:
    """One request on an idle server.

    Attributes:
        tokens: Of all its rows.
        samples: M.
        engine_s: In the engine.
        besides_s: The rest of what its client waited.
    """

    tokens: int
    samples: int
    engine_s: float
    besides_s: float


async def _alone(wire: Wire, body: dict[str, Any]) -> _Solo:
    reply = await wire.ask("POST", "/v1/classify", body)
    if reply.status != OK:
        raise RuntimeError(f"the server answered {reply.status} {reply.body[:300]!r}")
    tokens = int(reply.json()["usage"]["prompt_tokens"])
    stages = server_timing(reply)
    engine_s = (stages["forward"] + stages["uq"]) / 1000
    samples = int(reply.headers["x-compute-tokens"]) // tokens
    return _Solo(tokens, samples, engine_s, reply.took_s - engine_s)


async def calibrated(
    wire: Wire, subject: Subject, options: argparse.Namespace, front_s: float
) -> tuple[ReplicaModel, list[int], dict[str, Any]]:
    """Return the model of the server, the lengths of its texts, and how it was fitted."""
    bodies = [subject.body(number) for number in range(options.texts_used)]
    for body in bodies[:3]:  # warm-up
        await _alone(wire, body)
    solos = [await _alone(wire, body) for body in bodies]
    lengths = [solo.tokens for solo in solos]
    samples = solos[0].samples
    batch, pass_tokens = _limits(options, subject.says["settings"])
    unpadded = options.fake is None  # an engine on a CPU; the fake one charges for padding
    counts = [Linear.counts([length], samples, pass_tokens) for length in lengths]
    seconds = [solo.engine_s for solo in solos]
    for size in options.sizes:
        for repeat in range(options.repeats):
            places = [(size * repeat + n) % len(bodies) for n in range(size)]
            together = {**bodies[0], "input": [bodies[place]["input"] for place in places]}
            seconds.append((await _alone(wire, together)).engine_s)
            own = [lengths[place] for place in places]
            parts = cut(own, samples, batch, unpadded=unpadded)
            each = [Linear.counts(p, samples, pass_tokens, unpadded=unpadded) for p in parts]
            counts.append((sum(one for one, _ in each), sum(other for _, other in each)))
    service = Linear.fit(counts, seconds, pass_tokens, unpadded=unpadded)
    besides_s = statistics.median(solo.besides_s for solo in solos)
    model = ReplicaModel(
        service,
        batch,
        admission_limits(Settings.model_validate(subject.says["settings"])),
        samples,
        deadline_s=options.deadline_ms / 1000,
        front_s=front_s,
        delay_s=max(0.0, besides_s - front_s),
        unpadded=unpadded,
    )
    fitted = [service.pass_s * passes + service.token_s * tokens for passes, tokens in counts]
    errors = [abs(one / other - 1) for one, other in zip(fitted, seconds, strict=True)]
    return (
        model,
        lengths,
        {
            "besides_s": besides_s,
            "solo_engine_s": statistics.median(seconds[: len(lengths)]),
            "median_error": statistics.median(errors),
            "largest_error": max(errors),
        },
    )


def _limits(options: argparse.Namespace, said: Mapping[str, str]) -> tuple[BatchLimits, int]:
    """Return the bounds of a batch and of a pass, as the server that was started has them."""
    settings = Settings.model_validate(said)
    if options.fake is None:
        from server.engines.local import LocalEngine  # noqa: PLC0415 - slow, not for the fake

        engine = LocalEngine([])
    else:
        from tests.support.fake_engine import FakeEngine  # noqa: PLC0415 - not installed

        engine = FakeEngine()
    return batch_limits(engine, settings), engine.preferred_batch_tokens


def cut(
    lengths: Sequence[int], samples: int, limits: BatchLimits, *, unpadded: bool = False
) -> list[list[int]]:
    """Return the batches in which the rows of one request go when nobody else is there."""
    rows = tuple(EncodedRow(length, truncated=False, payload=None) for length in lengths)
    ticket = Ticket(
        BatchKey("", Sampling(samples), unpadded=unpadded), rows, deadline_s=float("inf")
    )
    waiting = ticket.pending(0.0)
    found: list[list[int]] = []
    while waiting:
        plan, _ = next_batch(waiting, limits, now_s=0.0, num_inside=1, stopping=True)
        found.append([row.num_tokens for row in plan.rows])
        waiting = list(plan.remaining)
    return found


def replica_of(document: Mapping[str, Any]) -> ReplicaModel:
    """Return a replica from the ``replica`` of a check's result."""
    parts = {
        "service": Linear(**document["service"]),
        "batch": BatchLimits(**document["batch"]),
        "admission": AdmissionLimits(**document["admission"]),
    }
    return ReplicaModel(**{**document, **parts})
