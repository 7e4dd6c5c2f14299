"""``dalorra predict``."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from dalorra_core.cli.console import errors_as_exit
from dalorra_core.cli.options import (
    AdapterArgument,
    BaseOption,
    DesignOption,
    DeviceOption,
    DtypeOption,
    EstimatorOption,
    SamplesOption,
    SeedOption,
    plan_from,
)
from dalorra_core.data.examples import Example, TextExample
from dalorra_core.data.readers import read_jsonl
from dalorra_core.errors import ConfigError
from dalorra_core.metrics.uncertainty import summarise
from dalorra_core.predictive.predictor import Predictor, SamplingPlan

__all__ = ["predict_command"]

_ROWS_AT_ONCE = 64


def predict_command(  # noqa: PLR0913, PLR0917  one parameter per option
    adapter: AdapterArgument,
    text: Annotated[list[str] | None, typer.Argument(help="Texts to classify.")] = None,
    input_file: Annotated[
        Path | None,
        typer.Option("--input", "-i", help="JSONL file of rows; labels are not needed."),
    ] = None,
    num_samples: SamplesOption = None,
    seed: SeedOption = None,
    estimator: EstimatorOption = None,
    design: DesignOption = None,
    truncate: Annotated[
        str, typer.Option(help="Longer prompts: none refuses, start or end cuts there.")
    ] = "none",
    base: BaseOption = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
) -> None:
    """Classify texts or a JSONL file, one JSON answer a line on stdout.

    Each line has `id`, `label`, `confidence`, `probs` (in the order of `labels` as
    `dalorra inspect` shows them), `label_mass`, `truncated` and `uncertainty`: predictive entropy,
    expected entropy (aleatoric) and mutual information (epistemic estimate), all in nats. Point
    methods and `--estimator mean_mask` have no epistemic part: `null`.

    The masks are fixed by adapter, seed, number of samples and design: the same question has the
    same answer every time, alone or in a file, here or on the server.

    **Examples**

    `dalorra predict adapters/clinc150 "move 100 dollars to my savings"`

    `dalorra predict adapters/clinc150 --input questions.jsonl > answers.jsonl`

    Exit status: 0 done, 1 the adapter, the base model or a row cannot be used, 2 wrong usage.
    """
    with errors_as_exit():
        examples = _examples(text or [], input_file)
        cut = _truncation(truncate)
        predictor = Predictor.load(adapter, base=base, device=device, dtype=dtype)
        plan = plan_from(predictor, num_samples, seed, estimator, design)
        rows = [predictor.encode(example, truncate=cut) for example in examples]
        for start in range(0, len(rows), _ROWS_AT_ONCE):
            for answer in _answers(predictor, rows[start : start + _ROWS_AT_ONCE], plan):
                sys.stdout.write(json.dumps(answer, ensure_ascii=False) + "\n")
            sys.stdout.flush()


def _examples(texts: list[str], input_file: Path | None) -> list[Example]:
    if bool(texts) == (input_file is not None):
        raise ConfigError("give either texts or --input FILE, one of the two")
    if input_file is not None:
        return read_jsonl(input_file, require_labels=False)
    return [TextExample(str(i), text, None) for i, text in enumerate(texts)]


def _truncation(value: str) -> Any:
    if value not in ("none", "start", "end"):
        raise ConfigError(f"truncate must be none, start or end, got {value!r}")
    return value


def _answers(predictor: Predictor, rows: list[Any], plan: SamplingPlan) -> Iterator[dict[str, Any]]:
    prediction = predictor.predict(rows, plan)
    allowed = [len(r.allowed) if r.allowed is not None else len(predictor.labels) for r in rows]
    summary = summarise(prediction.log_probs, torch.tensor(allowed))
    stochastic = predictor.num_functions(plan) > 1
    for i, row in enumerate(rows):
        probs = summary.mean_probs[i]
        mass = prediction.label_mass
        yield {
            "id": row.id,
            "label": predictor.labels[int(summary.predicted[i])],
            "confidence": float(summary.confidence[i]),
            "probs": [float(p) for p in probs],
            "label_mass": None if mass is None else float(mass[i]),
            "truncated": row.truncated,
            "uncertainty": {
                "predictive_entropy": float(summary.predictive_entropy[i]),
                "expected_entropy": float(summary.expected_entropy[i]) if stochastic else None,
                "mutual_information": float(summary.mutual_information[i]) if stochastic else None,
                "unit": "nats",
            },
        }
