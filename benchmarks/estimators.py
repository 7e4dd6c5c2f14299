"""Error and cost of every estimator of one adapter's answers, side by side in one run.

Estimators are the deterministic pass, M samples under every design of the method, and those of
``benchmarks/estimators_further.py``. Errors are squared distances to the answers of infinitely many
samples (docs/method.md, section 6), costs are medians over interleaved repetitions, as ratios to
the deterministic pass and in ms per row. The peers do the same M passes with PEFT, with the logits
of the whole vocabulary at every position.

    python -m benchmarks.estimators adapters/clinc150 --texts data/clinc150/test.jsonl
"""

import argparse
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.estimator_peers import Way, differences, peer_ways
from benchmarks.estimators_further import FURTHER, Request, applicable, further_errors, further_ways
from benchmarks.hardware import describe_run
from benchmarks.interleaved import interleaved_times
from benchmarks.output import publish
from dalorra_core.calibration.estimator_errors import reference_answers
from dalorra_core.calibration.plan_measurement import check_plannable, measure_answers
from dalorra_core.calibration.sampling_plan import PlanRequest, choose_plan, mean_mask_row
from dalorra_core.data.collate import EncodedExample
from dalorra_core.data.readers import read_jsonl
from dalorra_core.metrics.uncertainty import mean_probs
from dalorra_core.predictive.predictor import Predictor, SamplingPlan
from dalorra_core.sampling.designs import DESIGNS as DESIGN_NAMES

DETERMINISTIC = "mean_mask"
DESIGNS = "designs"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("adapter", type=Path)
    parser.add_argument("--texts", type=Path, required=True, help="JSONL file of rows")
    parser.add_argument("--base", help="base model; default: the adapter's")
    parser.add_argument(
        "--estimators",
        nargs="+",
        choices=(DESIGNS, *FURTHER),
        help="default: the designs, and of the others all that are cheap for this adapter",
    )
    parser.add_argument("--rows", type=int, default=64, help="rows that errors are measured on")
    parser.add_argument("--reference", type=int, default=512, help="samples of the reference")
    parser.add_argument("--packs", type=int, default=8, help="packs of every M and design")
    parser.add_argument("--sizes", type=int, nargs="+", default=[2, 4, 10], help="M to show")
    parser.add_argument(
        "--designs",
        nargs="*",
        choices=DESIGN_NAMES,
        default=[],
        help="designs that the further estimators are tried with, beside independent samples",
    )
    parser.add_argument(
        "--thresholds",
        type=float,
        nargs="*",
        default=[0.5, 0.8],
        help="confidences that an adaptive M keeps decisions at",
    )
    parser.add_argument("--timed-rows", type=int, default=8, help="rows of a timed batch")
    parser.add_argument("--peer-samples", type=int, default=10, help="M of the peers")
    parser.add_argument("--repeats", type=int, default=20, help="0: costs are not measured")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args(arguments)
    publish(measured(options), options.output)
    return 0


def measured(options: argparse.Namespace) -> dict[str, Any]:
    """Return errors, costs and what they were measured with."""
    predictor = Predictor.load(
        options.adapter, base=options.base, device=options.device, dtype=options.dtype
    )
    check_plannable(predictor)
    examples = read_jsonl(options.texts, require_labels=False)
    step = max(1, len(examples) // options.rows)
    rows = [predictor.encode(example, "end") for example in examples[::step][: options.rows]]
    names = options.estimators or (DESIGNS, *applicable(predictor))
    request = Request(
        tuple(name for name in names if name != DESIGNS),
        options.reference,
        options.packs,
        tuple(sorted(options.sizes)),
        tuple(options.thresholds),
        tuple(options.designs),
    )
    found: dict[str, Any] = describe_run(predictor)
    if DESIGNS in names:
        found["errors"] = errors(predictor, rows, options)
    if request.names:
        found["on_equal_samples"] = further_errors(predictor, rows, request)
    if options.repeats > 0:
        timed = rows[: options.timed_rows]
        ours = our_ways(predictor, timed, options.sizes)
        more = further_ways(predictor, timed, request)
        peers = peer_ways(predictor, timed, options.peer_samples, options.base)
        found["cost"] = cost(ours | more | peers, options.repeats, len(timed))
        found["largest_difference"] = differences(ours | peers, options.peer_samples)
    return found


def errors(
    predictor: Predictor, rows: Sequence[EncodedExample], options: argparse.Namespace
) -> dict[str, Any]:
    """Return the squared errors of every estimator, with standard errors, and the sizes."""
    request = PlanRequest(len(rows), options.reference, options.packs)
    found = measure_answers(predictor, rows, request)
    inside = torch.zeros(len(rows), dtype=torch.bool)
    choice = choose_plan(found.reference, found.packs, inside)
    deterministic = mean_mask_row(reference_answers(found.reference), mean_probs(found.mean_mask))
    shown = [c for c in choice.candidates if c.num_samples in options.sizes]
    names = ("mean_error", "mean_error_se", "information_error", "information_error_se")
    return {
        "rows": request.rows,
        "reference": request.reference,
        "packs": request.packs,
        "plan": _name(*choice.option),
        "estimators": {
            DETERMINISTIC if c is deterministic else _name(c.design, c.num_samples): {
                name: getattr(c, name) for name in names
            }
            for c in (deterministic, *shown)
        },
    }


def our_ways(
    predictor: Predictor, rows: Sequence[EncodedExample], sizes: Sequence[int]
) -> dict[str, Way]:
    """Return the deterministic pass and the fused M passes of every design."""
    plans = {DETERMINISTIC: SamplingPlan(estimator="mean_mask")}
    for design in predictor.designs:
        plans |= {_name(design, m): SamplingPlan(m, 0, "monte_carlo", design) for m in sizes}
    return {
        name: lambda plan=plan: (
            predictor.predict(rows, plan, label_mass=False, calibrated=False).log_probs
        )
        for name, plan in plans.items()
    }


def cost(ways: Mapping[str, Callable[[], object]], repeats: int, rows: int) -> dict[str, Any]:
    """Return median, quartiles and ratio of every way, measured in turn."""
    times = interleaved_times(ways, repeats)
    single = statistics.median(times[DETERMINISTIC])
    return {
        "rows": rows,
        "repeats": repeats,
        "ways": {
            name: {
                "ms_per_row": 1000 * statistics.median(values) / rows,
                "quartiles_ms_per_row": [
                    1000 * q / rows for q in statistics.quantiles(values, n=4)[::2]
                ],
                "ratio_to_mean_mask": statistics.median(values) / single,
            }
            for name, values in times.items()
        },
    }


def _name(design: str, num_samples: int) -> str:
    return f"{design} {num_samples}"


if __name__ == "__main__":
    raise SystemExit(main())
