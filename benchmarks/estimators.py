"""Error and cost of every estimator of one adapter's answers, side by side in one run.

Estimators are the deterministic pass and M samples under every design of the method. Errors are
squared distances to the answers of infinitely many samples (docs/method.md, section 6), costs are
medians over interleaved repetitions, as ratios to the deterministic pass and in ms per row. The
peers do the same M passes with PEFT: a loop over M masked adapters, and one batch in which each row
names its adapter, both with the logits of the whole vocabulary at every position.

    python -m benchmarks.estimators adapters/clinc150 --texts data/clinc150/test.jsonl
"""

import argparse
import statistics
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

from benchmarks.hardware import describe_run
from benchmarks.interleaved import interleaved_times
from benchmarks.output import publish
from dalorra_core.adapters.inject import lm_head_name_of, lm_head_of
from dalorra_core.adapters.plain_lora import plain_loras, with_full_head
from dalorra_core.artifact.peft_io import write_peft
from dalorra_core.base_models.loading import load_model
from dalorra_core.base_models.resolve import resolve_base_model
from dalorra_core.calibration.estimator_errors import reference_answers
from dalorra_core.calibration.plan_measurement import check_plannable, measure_answers
from dalorra_core.calibration.sampling_plan import PlanRequest, choose_plan, mean_mask_row
from dalorra_core.data.collate import EncodedExample, TokenBatch, collate
from dalorra_core.data.readers import read_jsonl
from dalorra_core.metrics.uncertainty import mean_probs
from dalorra_core.predictive.predictor import Predictor, SamplingPlan

DETERMINISTIC = "mean_mask"

Way = Callable[[], Tensor]
"""Answers all rows; returns log-probabilities (M, B, C)."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("adapter", type=Path)
    parser.add_argument("--texts", type=Path, required=True, help="JSONL file of rows")
    parser.add_argument("--base", help="base model; default: the adapter's")
    parser.add_argument("--rows", type=int, default=64, help="rows that errors are measured on")
    parser.add_argument("--reference", type=int, default=512, help="samples of the reference")
    parser.add_argument("--packs", type=int, default=8, help="packs of every M and design")
    parser.add_argument("--sizes", type=int, nargs="+", default=[2, 4, 10], help="M to show")
    parser.add_argument("--timed-rows", type=int, default=8, help="rows of a timed batch")
    parser.add_argument("--peer-samples", type=int, default=10, help="M of the peers")
    parser.add_argument("--repeats", type=int, default=20)
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
    timed = rows[: options.timed_rows]
    ways = our_ways(predictor, timed, options.sizes) | peer_ways(predictor, timed, options)
    return {
        **describe_run(predictor),
        "errors": errors(predictor, rows, options),
        "cost": cost(ways, options.repeats, len(timed)),
        "largest_difference": differences(ways, options.peer_samples),
    }


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


def peer_ways(
    predictor: Predictor, rows: Sequence[EncodedExample], options: argparse.Namespace
) -> dict[str, Way]:
    """Return the peers, and ours at their M, under the same masks.

    Raises:
        ConfigError: The method's samples are more than plain LoRA.
    """
    m = options.peer_samples
    peer, ids = masked_peft(predictor, m, options.base)
    batch = collate(list(rows), num_labels=len(predictor.labels)).to(predictor.device)
    plan = SamplingPlan(m)
    return {
        f"ours, iid {m}": lambda: (
            predictor.predict(rows, plan, label_mass=False, calibrated=False).log_probs
        ),
        f"PEFT loop, {m}": lambda: _looped(peer, batch, ids, m),
        f"PEFT mixed batch, {m}": lambda: _mixed(peer, batch, ids, m),
    }


def masked_peft(predictor: Predictor, num_samples: int, base: str | None) -> tuple[Any, Tensor]:
    """Return a PEFT model with one adapter for each mask, and the label tokens (C,).

    The adapters are those of ``dalorra export --mask samples:M``, at the adapter's own rank.

    Raises:
        ConfigError: The method's samples are more than plain LoRA.
    """
    manifest, model = predictor.manifest, predictor.model.trunk.model
    tokens, head = manifest.labels.token_ids, lm_head_name_of(model)
    num_tokens = lm_head_of(model).out_features
    path = resolve_base_model(base if base is not None else manifest.base.id)
    peer: Any = load_model(path, predictor.device, predictor.dtype)
    with TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT warns of tied heads; nothing is merged here
        for m, lora in enumerate(plain_loras(predictor.pack(SamplingPlan(num_samples)))):
            place = Path(folder) / f"m{m}"
            write_peft(place, with_full_head(lora, tokens, num_tokens, head), manifest.base.id)
            if m == 0:
                peer = PeftModel.from_pretrained(peer, str(place), f"m{m}")
            else:
                peer.load_adapter(str(place), f"m{m}")
    return peer.eval(), torch.tensor(tokens, device=predictor.device)


@torch.inference_mode()
def _looped(peer: Any, batch: TokenBatch, ids: Tensor, num_samples: int) -> Tensor:
    found = []
    for m in range(num_samples):
        peer.set_adapter(f"m{m}")
        found.append(_label_answers(peer, batch, ids, 1, {}))
    return torch.cat(found)


@torch.inference_mode()
def _mixed(peer: Any, batch: TokenBatch, ids: Tensor, num_samples: int) -> Tensor:
    names = [f"m{m}" for m in range(num_samples) for _ in range(len(batch.input_ids))]
    return _label_answers(peer, batch, ids, num_samples, {"adapter_names": names})


def _label_answers(
    peer: Any, batch: TokenBatch, ids: Tensor, copies: int, extra: Mapping[str, object]
) -> Tensor:
    """Return log-probabilities of the labels (copies, B, C) of a batch repeated row by row."""
    inputs = batch.input_ids.repeat(copies, 1)
    last = batch.last_index.repeat(copies)
    mask = (torch.arange(inputs.shape[1], device=inputs.device) <= last[:, None]).long()
    logits = peer(input_ids=inputs, attention_mask=mask, use_cache=False, **extra).logits
    chosen = logits[torch.arange(len(inputs), device=inputs.device), last][:, ids].float()
    if batch.allowed is not None:
        chosen = chosen.masked_fill(~batch.allowed.repeat(copies, 1), float("-inf"))
    return chosen.log_softmax(-1).unflatten(0, (copies, -1)).cpu()


def cost(ways: Mapping[str, Way], repeats: int, rows: int) -> dict[str, Any]:
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


def differences(ways: Mapping[str, Way], num_samples: int) -> dict[str, float]:
    """Return how far the peers' probabilities are from ours, at the most: the same masks."""
    ours = ways[f"ours, iid {num_samples}"]().exp()
    return {
        name: float((way().exp() - ours).abs().max())
        for name, way in ways.items()
        if name.startswith("PEFT")
    }


def _name(design: str, num_samples: int) -> str:
    return f"{design} {num_samples}"


if __name__ == "__main__":
    raise SystemExit(main())
