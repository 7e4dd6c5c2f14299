"""How many GPUs a rate of requests takes: the numbers of docs/scaling.md.

A replica is the cost model's bound on GPUs that hold the weights, behind the queue of
``benchmarks.queue_simulation`` with the server's default settings. What a request takes of the
event loop is the one thing that was measured, on another machine than any of these, and taken for
the latency that ``benchmarks.serving.targets`` found besides tokenising and the forward pass.

    python -m benchmarks.scaling_plan --output benchmarks/results/scaling-plan.json
    python -m benchmarks.scaling_tables
"""

import argparse
import json
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.cost_model import FILLED, GPUS, MODELS, REACHED, Shape, gpus_for, weight_bytes
from benchmarks.cost_model import pass_work as work_of
from benchmarks.output import publish
from benchmarks.queue_simulation.capacity import highest_rate, saturated_rate
from benchmarks.queue_simulation.check import two_replicas
from benchmarks.queue_simulation.service import Bound
from benchmarks.queue_simulation.simulation import ReplicaModel
from benchmarks.vllm_cost import crossover, late, shared_layers_ratio
from dalorra_core.predictive.plan import BYTES_KEPT, SAMPLES_KEPT
from server.batching import AdmissionLimits, BatchLimits
from server.settings import Settings

__all__ = ["adapter_bytes", "adapters", "bottlenecks", "cell", "main", "replica"]

RESULTS = Path(__file__).parent / "results"
TARGETS = RESULTS / "serving" / "targets.json"
RATES = (1, 10, 1000)
SHARED = ((0, 1), (1, 3), (1, 2), (2, 3))  # of the layers, below the adapter
PASS_TOKENS = 65_536  # of a GPU, see padded_token_limit
MAX_PADDING = 0.5  # see LocalEngine.worthwhile_padding
PATIENCE = 5.0  # the bound on the slowest hundredth over the time of one request alone, at least
MOST_USED = 0.9  # a simulated run is too short to see what a queue does nearer to its limit


def replica(shape: Shape, gpu: str, samples: int, front_s: float) -> ReplicaModel:
    """Return the model of one replica on as many GPUs as hold the weights."""
    flops, bandwidth, memory = GPUS[gpu]
    reached = REACHED * gpus_for(shape, memory)
    fields = Settings.model_fields  # the defaults, whatever the environment says
    limits = {
        name: fields[name].default
        for name in ("max_requests", "max_queued_rows", "max_queued_tokens", "max_batch_rows")
    }
    return ReplicaModel(
        Bound(shape, reached * flops, reached * bandwidth, 2, PASS_TOKENS),
        BatchLimits(
            max_rows=limits["max_batch_rows"],
            max_tokens=PASS_TOKENS,
            max_padding=MAX_PADDING,
            wait_s=fields["batch_wait_ms"].default / 1000,
            mix_adapters=True,
        ),
        AdmissionLimits(
            limits["max_requests"], limits["max_queued_rows"], limits["max_queued_tokens"]
        ),
        samples,
        front_s=front_s,
    )


def cell(model: str, gpu: str, samples: int, options: argparse.Namespace) -> dict[str, Any]:
    """Return what one replica carries, and the GPUs for each rate of requests."""
    shape = MODELS[model]
    one = replica(shape, gpu, samples, options.front_s)
    lengths = [options.tokens]
    alone_s = one.service(lengths, samples)
    p99_s = max(options.p99_s, PATIENCE * alone_s)
    most = saturated_rate(one, lengths)
    carries = min(highest_rate(one, lengths, p99_s, requests=options.requests), MOST_USED * most)
    each = gpus_for(shape, GPUS[gpu][2])
    gpus = {str(rate): each * math.ceil(rate / carries) for rate in RATES}
    return {
        "model": model,
        "gpu": gpu,
        "samples": samples,
        "gpus_per_replica": each,
        "alone_s": alone_s,
        "p99_s": p99_s,
        "saturated_per_s": most,
        "carries_per_s": carries,
        "gpus": gpus,
        "gpu_hours_per_million": {
            rate: count * 1e6 / float(rate) / 3600 for rate, count in gpus.items()
        },
    }


def adapter_bytes(shape: Shape, own_per_sample: int) -> int:
    """Return what an adapter takes on a GPU, see ``Predictor.memory_bytes``.

    Float32 factors, the label rows of the projection in bf16, and what kept samples may take.

    Args:
        shape: Of model and adapter.
        own_per_sample: Bytes of one sample's own tensors.
    """
    adapted = shape.layers - shape.first_sampled
    factors = 4 * shape.rank * sum(a + b for _, a, b in shape.adapted) * adapted
    kept = max(10 * own_per_sample, min(SAMPLES_KEPT * own_per_sample, BYTES_KEPT))
    return factors + 2 * shape.labels * shape.width + kept


def adapters(model: str, gpu: str) -> dict[str, Any]:
    """Return how many adapters fit beside the weights, with gates and with dense noise."""
    shape, memory = MODELS[model], GPUS[gpu][2]
    count = gpus_for(shape, memory)
    room = FILLED * count * memory - weight_bytes(shape)
    adapted = shape.layers - shape.first_sampled
    gates = 4 * shape.rank * len(shape.adapted) * adapted
    noise = 4 * shape.rank * sum(a for _, a, _ in shape.adapted) * adapted  # as large as A
    sizes = {"gates": adapter_bytes(shape, gates), "noise": adapter_bytes(shape, noise)}
    return {
        "model": model,
        "gpu": gpu,
        "gpus": count,
        "room_bytes": room,
        "adapter_bytes": sizes,
        "adapters": {name: int(room // size) for name, size in sizes.items()},
    }


def bottlenecks(model: str, gpu: str, samples: int, options: argparse.Namespace) -> dict[str, Any]:
    """Return the requests a second at which each part of a replica is used up by itself."""
    shape = MODELS[model]
    one = replica(shape, gpu, samples, options.front_s)
    service = one.service
    if not isinstance(service, Bound):
        raise TypeError("a plan knows rates, not seconds")
    single = work_of(shape, 1, options.tokens, samples, label_mass=True)
    return {
        "model": model,
        "gpu": gpu,
        "samples": samples,
        "weights_per_s": service.bytes_per_s / (single.weights * service.bytes_per_weight),
        "arithmetic_per_s": service.flops_per_s / single.flops,
        "event_loop_per_s": 1 / options.front_s,
    }


def sharing(tokens: int, samples: Sequence[int]) -> Iterator[dict[str, Any]]:
    """Yield where vLLM overtakes us, by the share of layers below the adapter and by M."""
    shape = MODELS["8B (Llama-3.1-8B)"]
    for above, below in SHARED:
        layers = shape.layers * above // below
        for m in samples:
            yield {
                "below": layers,
                "layers": shape.layers,
                "samples": m,
                "layers_alone": shared_layers_ratio(shape.layers, layers, m),
                "crossover": crossover(late(shape, layers), tokens, m),
                "crossover_label_mass": crossover(late(shape, layers), tokens, m, label_mass=True),
            }


def pair(options: argparse.Namespace) -> dict[str, Any]:
    """Return how much more two replicas carry than one, for one model on one GPU."""
    model, gpu, samples = "8B (Llama-3.1-8B)", "H100 SXM", max(options.samples)
    one = replica(MODELS[model], gpu, samples, options.front_s)
    found = two_replicas(one, [options.tokens], options.requests)
    return {"model": model, "gpu": gpu, "samples": samples, **found}


def plan(options: argparse.Namespace) -> dict[str, Any]:
    """Return all numbers of the page but those that the check has measured."""
    cells: list[dict[str, Any]] = []
    for model in MODELS:
        for gpu in GPUS:
            for m in options.samples:
                cells.append(cell(model, gpu, m, options))
                sys.stderr.write(f"{model} on {gpu}, M = {m}\n")
    return {
        "tokens": options.tokens,
        "p99_s": options.p99_s,
        "front_s": options.front_s,
        "requests": options.requests,
        "cells": cells,
        "replicas": pair(options),
        "adapters": [adapters(model, gpu) for model in MODELS for gpu in GPUS],
        "bottlenecks": [
            bottlenecks(model, gpu, m, options)
            for model in MODELS
            for gpu in ("L4", "H100 SXM")
            for m in options.samples
        ],
        "vllm": list(sharing(options.tokens, [1, *options.samples])),
    }


def parser() -> argparse.ArgumentParser:
    """Return the parser of the program."""
    found = argparse.ArgumentParser(description=__doc__)
    found.add_argument("--samples", type=int, nargs="+", default=[4, 10])
    found.add_argument("--tokens", type=int, default=64, help="of a prompt")
    found.add_argument(
        "--p99-ms", type=float, default=250.0, help="least bound on the slowest hundredth"
    )
    found.add_argument(
        "--front-ms", type=float, help="of the event loop; the last check's if unset"
    )
    found.add_argument("--requests", type=int, default=3000, help="at every rate that is tried")
    found.add_argument("--output", type=Path)
    return found


def main(arguments: list[str] | None = None) -> int:
    """Plan, print and write the result."""
    options = parser().parse_args(arguments)
    options.p99_s = options.p99_ms / 1000
    if options.front_ms is None:
        measured = json.loads(TARGETS.read_text(encoding="utf-8"))
        options.front_s = measured["added_latency"]["p50_ms"] / 1000
    else:
        options.front_s = options.front_ms / 1000
    publish(plan(options), options.output)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
