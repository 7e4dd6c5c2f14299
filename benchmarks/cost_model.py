"""What an answer costs, from shapes, FLOP/s and bandwidth; measured beside predicted in one run.

A forward pass takes no less than its arithmetic at the rate of matrix products, and no less than
reading its weights once: the larger of the two is the bound. Here the rate is that of the model's
own products at the pass's number of tokens, and the bandwidth that of reading a large tensor, both
measured in the same minutes as the answers.

    python -m benchmarks.cost_model adapters/clinc150
    python -m benchmarks.cost_model --planning
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import nn

from benchmarks.hardware import describe_run
from benchmarks.interleaved import interleaved_times
from benchmarks.output import publish
from dalorra_core.base_models.packed import pack_linears
from dalorra_core.data.collate import EncodedExample
from dalorra_core.predictive.predictor import Predictor, SamplingPlan
from dalorra_core.predictive.scoring import plan_runs
from dalorra_core.sampling.streams import uniforms


@dataclass(frozen=True)
class Shape:
    """Sizes of a Llama-like decoder and of the adapter on it.

    Attributes:
        layers: L.
        width: d.
        heads: Query heads.
        kv_heads: Key and value heads.
        head_width: Of one head.
        hidden: Width of the MLP.
        vocabulary: V.
        labels: C.
        rank: r.
        adapted: Name, d_in and d_out of the adapted modules of one layer.
        first_sampled: Layer from which samples differ; below it they share their states.
        adapted_below: Adapted layers below that one, whose modules are the same in all samples.
    """

    layers: int
    width: int
    heads: int
    kv_heads: int
    head_width: int
    hidden: int
    vocabulary: int
    labels: int = 5
    rank: int = 8
    adapted: tuple[tuple[str, int, int], ...] = ()
    first_sampled: int = 0
    adapted_below: int = 0

    @classmethod
    def of(cls, predictor: Predictor) -> Self:
        """Return the shape of a loaded adapter and its base model."""
        config: Any = predictor.model.trunk.model.config
        layers: Any = predictor.model.decoder.layers
        modules = [m for m in predictor.manifest.modules if m.layer is not None]
        adapted = min(m.layer for m in modules if m.layer is not None)
        pack = predictor.pack(predictor.default_plan)
        with predictor.model.trunk.turns:
            sampled = predictor.model.fold_layer_of(pack) or 0
        return cls(
            config.num_hidden_layers,
            config.hidden_size,
            config.num_attention_heads,
            config.num_key_value_heads,
            layers[0].self_attn.head_dim,
            config.intermediate_size,
            config.vocab_size,
            len(predictor.labels),
            predictor.manifest.r,
            tuple(
                (m.name.rpartition(".")[2], m.d_in, m.d_out) for m in modules if m.layer == adapted
            ),
            sampled,
            sampled - adapted,
        )

    @property
    def products(self) -> tuple[tuple[int, int], ...]:
        """(d_in, d_out) of the products of one layer."""
        q, kv = self.heads * self.head_width, self.kv_heads * self.head_width
        return (
            (self.width, q),
            (self.width, kv),
            (self.width, kv),
            (q, self.width),
            (self.width, self.hidden),
            (self.width, self.hidden),
            (self.hidden, self.width),
        )

    @property
    def layer_weights(self) -> int:
        """Weights of one layer's products."""
        return sum(a * b for a, b in self.products)


@dataclass(frozen=True)
class Work:
    """What one forward pass does.

    Attributes:
        flops: Additions and multiplications.
        attention: Those of them that are scores of attention and sums by them.
        weights: Weights that are read.
        tokens: Largest number of tokens in one product.
    """

    flops: int
    attention: int
    weights: int
    tokens: int


def pass_work(
    shape: Shape,
    rows: int,
    length: int,
    samples: int,
    *,
    label_mass: bool = False,
    begun: bool = False,
) -> Work:
    """Return the work of M samples of rows of T tokens in one pass.

    The layers below the first one where samples differ see each row once; the last layer computes
    its keys and values for all tokens, the rest of it and the head at the last one only.

    Args:
        shape: Of model and adapter.
        rows: B.
        length: T.
        samples: M; 1 for a deterministic pass.
        label_mass: Also the logits of the whole vocabulary.
        begun: The states that samples share are known: ``stem_work`` was done.
    """
    shared, folded, last = rows * length, samples * rows * length, samples * rows
    below, adapted_below = (0, 0) if begun else (shape.first_sampled, shape.adapted_below)
    above = shape.layers - 1 - shape.first_sampled
    # where samples first differ in the last layer, what its inputs alone decide is computed once
    kv_tokens, query_tokens = (folded, last) if above else (shared, rows)
    q_products = shape.width * shape.heads * shape.head_width
    kv_products = 2 * shape.width * shape.kv_heads * shape.head_width
    adapters = {name: 2 * shape.rank * (a + b) for name, a, b in shape.adapted}
    kv_adapters = sum(adapters.get(name, 0) for name in ("k_proj", "v_proj"))
    adapter = sum(adapters.values())
    head = shape.width * (shape.labels + (shape.vocabulary if label_mass else 0))
    queries = below * shared + above * folded + last
    attention = 4 * length * shape.heads * shape.head_width * queries
    products = (
        2 * shape.layer_weights * (below * shared + above * folded)
        + adapter * (adapted_below * shared + above * folded)
        + 2 * kv_products * kv_tokens
        + kv_adapters * folded
        + 2 * q_products * query_tokens
        + (2 * (shape.layer_weights - kv_products - q_products) + adapter - kv_adapters) * last
        + 2 * head * last
    )
    return Work(
        products + attention,
        attention,
        (below + above + 1) * shape.layer_weights + head,
        folded if above else shared,
    )


def stem_work(shape: Shape, rows: int, length: int) -> Work:
    """Return the work of the layers that all samples share by themselves.

    Args:
        shape: Of model and adapter.
        rows: B.
        length: T.
    """
    tokens, layers = rows * length, shape.first_sampled
    attention = 4 * length * shape.heads * shape.head_width * layers * tokens
    weights = layers * shape.layer_weights
    adapters = sum(2 * shape.rank * (a + b) for _, a, b in shape.adapted) * shape.adapted_below
    return Work((2 * weights + adapters) * tokens + attention, attention, weights, tokens)


def bound_s(work: Work, flops_per_s: float, bytes_per_s: float, bytes_per_weight: int) -> float:
    """Return the least seconds a pass takes: arithmetic or reading the weights."""
    return max(work.flops / flops_per_s, work.weights * bytes_per_weight / bytes_per_s)


# -- measured -----------------------------------------------------------------------------------


@torch.inference_mode()
def product_rate(shape: Shape, tokens: int, device: torch.device, dtype: torch.dtype) -> float:
    """Return the FLOP/s of one layer's products at a number of tokens."""
    layers = nn.ModuleList(
        nn.Linear(a, b, bias=False, device=device, dtype=dtype) for a, b in shape.products
    )
    pack_linears(layers)
    inputs = [torch.randn(tokens, a, device=device, dtype=dtype) for a, _ in shape.products]

    def run() -> None:
        for layer, x in zip(layers, inputs, strict=True):
            layer(x)

    return 2.0 * shape.layer_weights * tokens / _median_s(run, device)


@torch.inference_mode()
def read_rate(device: torch.device) -> float:
    """Return how many bytes a second are read from a tensor that no cache holds."""
    large = torch.ones(2**27, device=device)
    return large.nbytes / _median_s(large.sum, device)


def _median_s(run: Callable[[], object], device: torch.device, repeats: int = 9) -> float:
    times: list[float] = []
    for _ in range(repeats + 2):
        began_s = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began_s)
    return statistics.median(times[2:])


def measured(options: argparse.Namespace) -> dict[str, Any]:
    """Return bound and measured time of every batch and M."""
    predictor = Predictor.load(options.adapter, base=options.base, device=options.device)
    shape = Shape.of(predictor)
    size = predictor.model.head.weight.new_empty(0, dtype=predictor.dtype).element_size()
    reading = read_rate(predictor.device)
    batches: list[dict[str, Any]] = []
    for rows, length in options.batches:
        encoded = random_rows(rows, length, shape.vocabulary)
        plans = {"mean_mask": SamplingPlan(estimator="mean_mask")}
        plans |= {f"iid {m}": SamplingPlan(m) for m in options.num_samples}
        ways = {
            name: lambda plan=plan, encoded=encoded: predictor.predict(
                encoded, plan, label_mass=False
            )
            for name, plan in plans.items()
        }
        times = interleaved_times(ways, options.repeats)
        for name, plan in plans.items():
            m = predictor.num_functions(plan)
            works = works_of(shape, [length] * rows, m, predictor.max_padded_tokens)
            rates = {
                work.tokens: product_rate(shape, work.tokens, predictor.device, predictor.dtype)
                for work in works
            }
            bound = sum(bound_s(w, rates[w.tokens], reading, size) for w in works)
            taken = statistics.median(times[name])
            flops = sum(work.flops for work in works)
            batches.append(
                {
                    "rows": rows,
                    "tokens": length,
                    "way": name,
                    "ms": 1000 * taken,
                    "quartiles_ms": [1000 * q for q in statistics.quantiles(times[name], n=4)[::2]],
                    "bound_ms": 1000 * bound,
                    "of_bound": bound / taken,
                    "gflop": flops / 1e9,
                    "gflop_per_s": flops / taken / 1e9,
                    "product_gflop_per_s": max(rates.values()) / 1e9,
                }
            )
    return {
        **describe_run(predictor),
        "read_gb_per_s": reading / 1e9,
        "repeats": options.repeats,
        "batches": batches,
    }


def works_of(shape: Shape, lengths: Sequence[int], samples: int, limit: int) -> list[Work]:
    """Return the work of every pass that rows are cut into.

    Where rows and samples go in several, the layers that the samples share are a pass of their
    own.
    """
    works: list[Work] = []
    for run in plan_runs(lengths, samples, limit):
        several = len(run) > 1 or run[0][1] < samples
        if several and shape.first_sampled:
            together = [lengths[i] for rows, _ in run for i in rows]
            works.append(stem_work(shape, len(together), max(together)))
        for rows, step in run:
            longest = max(lengths[i] for i in rows)
            works += [
                pass_work(shape, len(rows), longest, min(step, samples - start), begun=several)
                for start in range(0, samples, step)
            ]
    return works


def random_rows(rows: int, length: int, vocabulary: int) -> list[EncodedExample]:
    """Return rows of exactly so many tokens."""
    return [
        EncodedExample(
            f"row-{b}",
            tuple((uniforms(("cost", b), length) * vocabulary).astype(int).tolist()),
            -1,
            None,
            truncated=False,
        )
        for b in range(rows)
    ]


# -- predicted ----------------------------------------------------------------------------------


def _llama(layers: int, width: int, heads: int, kv_heads: int, hidden: int) -> Shape:
    head = width // heads
    adapted = (("q_proj", width, width), ("v_proj", width, kv_heads * head))  # of every layer
    return Shape(
        layers, width, heads, kv_heads, head, hidden, 128256, labels=5, rank=8, adapted=adapted
    )


MODELS = {
    "1B (Llama-3.2-1B)": _llama(16, 2048, 32, 8, 8192),
    "8B (Llama-3.1-8B)": _llama(32, 4096, 32, 8, 14336),
    "70B (Llama-3.1-70B)": _llama(80, 8192, 64, 8, 28672),
}

GPUS = {  # bf16 without sparsity in FLOP/s, memory in bytes/s and bytes: the makers' data sheets
    "L4": (121e12, 0.300e12, 24e9),
    "A100 80 GB": (312e12, 2.04e12, 80e9),
    "H100 SXM": (989e12, 3.35e12, 80e9),
    "H200": (989e12, 4.8e12, 141e9),
}

REACHED = 0.65
"""Share of a data sheet's FLOP/s and bandwidth that is assumed to be reached."""

FILLED = 0.8
"""Share of a GPU's memory for weights and adapters: a fifth for activations and the rest."""


def gpus_for(shape: Shape, memory: float) -> int:
    """Return how many GPUs of so many bytes hold the weights in bf16."""
    return int(-(-weight_bytes(shape) // (FILLED * memory)))


def weight_bytes(shape: Shape) -> int:
    """Return the bytes of the weights in bf16."""
    return 2 * (shape.layers * shape.layer_weights + shape.width * shape.vocabulary)


def planning(rows: int, length: int, samples: Sequence[int]) -> list[dict[str, Any]]:
    """Return predicted times of one pass in bf16 on GPUs that hold the weights."""
    found: list[dict[str, Any]] = []
    for model, shape in MODELS.items():
        for gpu, (flops, bandwidth, memory) in GPUS.items():
            count = gpus_for(shape, memory)
            entry: dict[str, Any] = {"model": model, "gpu": gpu, "gpus": count}
            for m in samples:
                work = pass_work(shape, rows, length, m)
                rate, reading = (REACHED * count * x for x in (flops, bandwidth))
                entry[f"ms at M = {m}"] = 1000 * bound_s(work, rate, reading, 2)
            found.append(entry)
    return found


def _batch(text: str) -> tuple[int, int]:
    rows, _, length = text.partition("x")
    return int(rows), int(length)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure or predict, print, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("adapter", type=Path, nargs="?")
    parser.add_argument("--base", help="base model; default: the adapter's")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--num-samples", type=int, nargs="+", default=[4, 10])
    parser.add_argument(
        "--batches", type=_batch, nargs="+", default=[(1, 12), (16, 12), (8, 64), (4, 128)]
    )
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--planning", action="store_true", help="predict for GPUs, measure nothing")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args(arguments)
    if options.planning == (options.adapter is not None):
        parser.error("give an adapter to measure, or --planning and none")
    found: Any = (
        measured(options)
        if not options.planning
        else {
            f"{rows} rows of {length} tokens": planning(rows, length, [1, *options.num_samples])
            for rows, length in options.batches
        }
    )
    publish(found, options.output)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
