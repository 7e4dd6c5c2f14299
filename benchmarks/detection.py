"""Does a sampling plan keep what mutual information is for: telling unknown questions apart?

Area under the ROC curve of out-of-scope against in-scope rows, by mutual information and by
predictive entropy, under the adapter's own plan, ten independent samples and a reference of many.
Each half of the reference stands beside the whole, which shows its own noise. Differences to the
reference are paired over rows, with 95 % percentile intervals of a bootstrap within each side.

    python -m benchmarks.detection adapters/clinc150-fast --texts data/clinc150/test.jsonl
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.hardware import describe_run
from benchmarks.output import publish
from dalorra_core.cli.console import row_progress
from dalorra_core.data.collate import EncodedExample
from dalorra_core.data.examples import Example, gold_label
from dalorra_core.data.readers import read_jsonl
from dalorra_core.metrics import auroc, summarise
from dalorra_core.predictive.predictor import Predictor, SamplingPlan

REFERENCE = "reference"
SCORES = ("mutual_information", "predictive_entropy")


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("adapter", type=Path)
    parser.add_argument("--texts", type=Path, required=True, help="JSONL file of labelled rows")
    parser.add_argument("--base", help="base model; default: the adapter's")
    parser.add_argument("--rows", type=int, default=600, help="in-scope rows, evenly spaced")
    parser.add_argument("--outside", type=int, default=400, help="out-of-scope rows, likewise")
    parser.add_argument("--reference", type=int, default=256, help="samples of the reference, even")
    parser.add_argument("--resamples", type=int, default=2000)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args(arguments)
    publish(measured(options), options.output)
    return 0


def measured(options: argparse.Namespace) -> dict[str, Any]:
    """Return the areas under every plan and their differences to the reference."""
    predictor = Predictor.load(
        options.adapter, base=options.base, device=options.device, dtype=options.dtype
    )
    label = predictor.manifest.labels.out_of_scope_label
    examples = read_jsonl(options.texts)
    sides = [
        _encoded(predictor, [e for e in examples if gold_label(e) != label], options.rows),
        _encoded(predictor, [e for e in examples if gold_label(e) == label], options.outside),
    ]
    plans = {
        "plan": predictor.default_plan,
        "iid 10": SamplingPlan(10, 1),
        "half": SamplingPlan(options.reference // 2, 2),
        "other half": SamplingPlan(options.reference // 2, 3),
    }
    answers = {name: _answers(predictor, sides, plan, name) for name, plan in plans.items()}
    halves = zip(answers["half"], answers["other half"], strict=True)
    answers[REFERENCE] = [torch.cat(both) for both in halves]
    scores = {name: _scores(found) for name, found in answers.items()}
    return describe_run(predictor) | {
        "rows": len(sides[0]),
        "outside": len(sides[1]),
        "reference": options.reference,
        "plan": vars(predictor.default_plan),
        "auroc": {
            name: {score: auroc(outside, inside) for score, (inside, outside) in found.items()}
            for name, found in scores.items()
        },
        "less_the_reference": {
            name: {
                score: _difference(found[score], scores[REFERENCE][score], options.resamples)
                for score in SCORES
            }
            for name, found in scores.items()
            if name != REFERENCE
        },
    }


def _encoded(predictor: Predictor, examples: Sequence[Example], limit: int) -> list[EncodedExample]:
    limit = min(limit, len(examples))
    return [predictor.encode(examples[i * len(examples) // limit], "end") for i in range(limit)]


def _answers(
    predictor: Predictor, sides: Sequence[Sequence[EncodedExample]], plan: SamplingPlan, name: str
) -> list[Tensor]:
    """Return the log-probabilities (M, n, C) of each side's rows."""
    with row_progress(f"{name}, {plan.num_samples} samples", sum(map(len, sides))) as advance:
        return [
            predictor.predict(rows, plan, label_mass=False, on_progress=advance).log_probs
            for rows in sides
        ]


def _scores(answers: Sequence[Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """Return each score of the in-scope and of the out-of-scope rows; higher is less familiar."""
    found = [summarise(log_probs) for log_probs in answers]
    return {score: (getattr(found[0], score), getattr(found[1], score)) for score in SCORES}


def _difference(
    ours: tuple[Tensor, Tensor], reference: tuple[Tensor, Tensor], resamples: int
) -> dict[str, Any]:
    """Return area less the reference's, with an interval over rows drawn anew on either side."""
    generator = torch.Generator().manual_seed(0)
    sizes = [len(side) for side in ours]

    def gap(places: Sequence[Tensor]) -> float:
        areas = [auroc(s[1][places[1]], s[0][places[0]]) for s in (ours, reference)]
        return areas[0] - areas[1]

    values = torch.tensor(
        [
            gap([torch.randint(n, (n,), generator=generator) for n in sizes])
            for _ in range(resamples)
        ],
        dtype=torch.float64,
    )
    low, high = values.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return {"value": gap([torch.arange(n) for n in sizes]), "low": low, "high": high, "level": 0.95}


if __name__ == "__main__":
    sys.exit(main())
