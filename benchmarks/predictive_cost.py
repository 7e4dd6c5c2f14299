"""Cost of the M-sample predictive relative to one deterministic pass, in one interleaved run.

Three ways to answer the same rows with the same adapter: the mean-mask pass, the fused forward of
M samples, and a loop of M single-sample forwards. Reported are medians over interleaved
repetitions, their quartiles, and ratios to the mean-mask pass.

    python benchmarks/predictive_cost.py adapters/clinc150 --texts data/clinc150/test.jsonl
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from hardware import describe_hardware
from interleaved import interleaved_times

from dalorra_core.data.readers import read_jsonl
from dalorra_core.predictive.predictor import Predictor, SamplingPlan
from dalorra_core.predictive.scoring import padded_token_limit, score_rows


def main() -> None:
    """Parse the arguments, measure, print and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("adapter", type=Path)
    parser.add_argument("--texts", type=Path, required=True, help="JSONL file of text rows")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--num-samples", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    predictor = Predictor.load(options.adapter, dtype=options.dtype)
    examples = read_jsonl(options.texts, require_labels=False)
    examples = examples[:: max(1, len(examples) // 512)]
    encoded = [predictor.encode(example) for example in examples]
    plan = SamplingPlan(options.num_samples)
    report: dict[str, Any] = {
        "hardware": describe_hardware(),
        "device": str(predictor.device),
        "dtype": str(predictor.dtype),
        "torch": torch.__version__,
        "num_samples": options.num_samples,
        "repeats": options.repeats,
        "batches": {},
    }
    for count in options.rows:
        rows = encoded[:count]
        ways: dict[str, Callable[[], object]] = {
            "mean_mask": lambda r=rows: predictor.predict(
                r, SamplingPlan(estimator="mean_mask"), label_mass=False
            ),
            "fused": lambda r=rows: predictor.predict(r, plan, label_mass=False),
            "loop": lambda r=rows: _loop(predictor, plan, r),
        }
        report["batches"][str(count)] = _measure(ways, options.repeats)
    text = json.dumps(report, indent=1)
    sys.stdout.write(text + "\n")
    if options.output is not None:
        options.output.write_text(text + "\n", encoding="utf-8")


def _loop(predictor: Predictor, plan: SamplingPlan, rows: list[Any]) -> None:
    pack = predictor.pack(plan)
    for m in range(plan.num_samples):
        score_rows(
            predictor.model,
            pack.narrow(m, m + 1),
            rows,
            num_labels=len(predictor.labels),
            max_padded_tokens=padded_token_limit(predictor.device),
        )


def _measure(ways: dict[str, Callable[[], object]], repeats: int) -> dict[str, Any]:
    times = interleaved_times(ways, repeats)
    medians = {name: statistics.median(values) for name, values in times.items()}
    return {
        "median_s": medians,
        "quartiles_s": {n: statistics.quantiles(v, n=4)[::2] for n, v in times.items()},
        "ratio_to_mean_mask": {n: medians[n] / medians["mean_mask"] for n in medians},
    }


if __name__ == "__main__":
    main()
