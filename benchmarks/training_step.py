"""Seconds and memory of one training step, every method against PEFT's own LoRA loop.

The peer is what published code runs: a PEFT model on q_proj, v_proj and lm_head, the logits of the
whole vocabulary at every position, the loss over the label tokens at the last one, AdamW. Ours are
steps of ``dalorra train``. All take the same batches in turn, in one process, in one precision;
reported are medians over the rounds, their quartiles, and ratios to the peer. Peak memory is each
contender's own, measured in a process of its own.

    python -m benchmarks.training_step --data-root data --output step.json
    python -m benchmarks.training_step --count       # parameters on the shapes of Llama-3.1-8B only
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.serving.report import Verdict, below, conclude
from dalorra_core.adapters.inject import count_parameters, find_targets
from dalorra_core.adapters.state import factor_shapes, label_rows_only
from dalorra_core.base_models.loading import load_model, load_tokenizer, pick_device, pick_dtype
from dalorra_core.base_models.resolve import resolve_base_model
from dalorra_core.config import AdapterConfig, OptimConfig
from dalorra_core.data.collate import TokenBatch, collate
from dalorra_core.data.encode import encode
from dalorra_core.data.labels import LabelSet, collect_labels, resolve_label_tokens
from dalorra_core.data.prompts import prompt_template
from dalorra_core.data.readers import read_source
from dalorra_core.methods import METHODS
from dalorra_core.predictive.forward import LabelModel
from dalorra_core.predictive.trunk import Trunk
from dalorra_core.training.processes import Processes
from dalorra_core.training.step import TrainStep
from dalorra_core.training.updates import Updater

PEER = "peft"
COMPILED = ", compiled layers"
TARGETS = ("q_proj", "v_proj", "lm_head")
BATCHES = {"short rows": ("trec", "text", 32, 0.7), "OpenBookQA": ("openbookqa", "choice", 4, 0.85)}
"""Name to data set, form, rows of a batch, and the largest ratio to the peer that is asked for."""

Step = Callable[[TokenBatch], None]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-root", type=Path, help="directory with trec/ and openbookqa/")
    parser.add_argument("--base", default="smollm2-135m-instruct")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--methods", nargs="+", default=["mle", "dalorra"], choices=sorted(METHODS))
    parser.add_argument(
        "--compiled", action="store_true", help="each method also with torch.compile on its layers"
    )
    parser.add_argument("--rounds", type=int, default=15, help="steps of each contender")
    parser.add_argument("--count", action="store_true", help="count parameters, measure nothing")
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)
    parser.add_argument("--batch", choices=BATCHES, default="short rows", help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args(arguments)
    if options.count:
        sys.stdout.write(json.dumps(parameters_8b(), indent=1) + "\n")
        return 0
    if options.data_root is None:
        parser.error("--data-root is needed to measure")
    if options.peak_of is not None:
        sys.stdout.write(f"{_peak_mb(options.peak_of, options):.1f}\n")
        return 0
    found: dict[str, Any] = {"parameters_llama_3_1_8b": parameters_8b(), "batches": {}}
    verdicts: list[Verdict] = []
    for name, (*_, limit) in BATCHES.items():
        values = _timed(name, options)
        found["batches"][name] = values
        if "mle" in options.methods:
            ratio = values["contenders"]["mle"]["ratio_to_peft"]
            verdicts.append(below(f"step / PEFT's, {name}, mle", ratio, limit))
    found |= {"device": str(_device(options)), "torch": torch.__version__, "base": options.base}
    return conclude("training_step", found, verdicts, options.output)


def parameters_8b() -> dict[str, dict[str, int]]:
    """Return trained parameters of every method on the shapes of Llama-3.1-8B, and how many more.

    ``lm_head`` counts all its rows, as published tables do, although four label rows are trained.
    """
    config = LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
    )
    with torch.device("meta"):
        specs = find_targets(LlamaForCausalLM(config), TARGETS)
    plain = count_parameters(specs, 8)
    found = {}
    for name, method in METHODS.items():
        settings = method.settings(name=name)
        shapes = method.shapes(specs, 8, settings)
        total = sum(int(torch.Size(shape).numel()) for shape in shapes.values())
        found[name] = {"stored": total, "more_than_lora": total - plain}
    assert plain == sum(int(torch.Size(s).numel()) for s in factor_shapes(specs, 8).values())  # noqa: S101
    return {"lora": {"stored": plain, "more_than_lora": 0}, **found}


def _device(options: argparse.Namespace) -> torch.device:
    return pick_device(options.device)


def _batches(name: str, options: argparse.Namespace) -> tuple[list[TokenBatch], LabelSet]:
    folder, kind, size, _ = BATCHES[name]
    tokenizer = load_tokenizer(resolve_base_model(options.base))
    examples = read_source(options.data_root / folder, "train")[: size * options.rounds]
    label_set = resolve_label_tokens(collect_labels(examples), tokenizer)
    rows = [
        encode(
            example,
            tokenizer=tokenizer,
            template=prompt_template("text" if kind == "text" else "choice"),
            label_set=label_set,
            max_tokens=300,
        )
        for example in examples
    ]
    device = _device(options)
    chunks = [rows[i : i + size] for i in range(0, len(rows) - size + 1, size)]
    return [collate(c, num_labels=len(label_set)).to(device) for c in chunks], label_set


def contender(name: str, label_set: LabelSet, options: argparse.Namespace) -> Step:
    """Return the step of one contender on a base model of its own."""
    device = _device(options)
    dtype = pick_dtype(options.precision, device)
    model = load_model(resolve_base_model(options.base), device, dtype, "sdpa")
    if name == PEER:
        return _peft_step(model, label_set)
    if name.endswith(COMPILED):
        for layer in model.model.layers:
            layer.compile(dynamic=True)  # batches have many lengths
    name = name.removesuffix(COMPILED)
    specs = label_rows_only(find_targets(model, TARGETS), len(label_set))
    settings = METHODS[name].settings(name=name)
    module = TrainStep(
        LabelModel(Trunk(model), specs, label_set),
        specs,
        AdapterConfig(),
        METHODS[name].trained_as(settings),
        optim=OptimConfig(),
        num_examples=640,
        seed=1,
    ).to(device)
    return _our_step(module)


def _our_step(module: TrainStep) -> Step:
    from accelerate import Accelerator  # noqa: PLC0415  reads the environment when imported

    accelerator = Accelerator(
        cpu=module.label_model.head.weight.device.type == "cpu", step_scheduler_with_optimizer=False
    )
    updater = Updater(module, OptimConfig(), accelerator, Processes.of(accelerator))
    updater.prepare(0)
    taken = 0

    def step(batch: TokenBatch) -> None:
        nonlocal taken
        with accelerator.accumulate(module):
            updater.apply(module(batch, taken), taken)
        taken += 1

    return step


def _peft_step(model: Any, label_set: LabelSet) -> Step:
    config = LoraConfig(r=8, lora_alpha=16, target_modules=list(TARGETS), task_type="CAUSAL_LM")
    adapted: Any = get_peft_model(model, config)
    trained = [p for p in adapted.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, eps=1e-6, fused=True)
    ids = torch.tensor(label_set.token_ids, device=model.device)

    def step(batch: TokenBatch) -> None:
        length = torch.arange(batch.input_ids.shape[1], device=batch.input_ids.device)
        mask = (length <= batch.last_index[:, None]).long()
        logits = adapted(input_ids=batch.input_ids, attention_mask=mask, use_cache=False).logits
        last = logits[torch.arange(len(mask)), batch.last_index][:, ids].float()
        if batch.allowed is not None:
            last = last.masked_fill(~batch.allowed, float("-inf"))
        torch.nn.functional.cross_entropy(last, batch.labels).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _timed(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Return seconds a step of every contender, interleaved, and peak memory."""
    batches, label_set = _batches(name, options)
    compiled = tuple(name + COMPILED for name in options.methods if options.compiled)
    contenders = (PEER, *options.methods, *compiled)
    steps = {who: contender(who, label_set, options) for who in contenders}
    seconds: dict[str, list[float]] = {who: [] for who in contenders}
    for who in contenders:
        began_s = time.perf_counter()
        for batch in batches[:3] if who in compiled else batches[:1]:  # allocates, compiles
            steps[who](batch)
        sys.stderr.write(f"{name}: {who} was ready after {time.perf_counter() - began_s:.1f} s\n")
    for number in range(options.rounds):
        for who in contenders:
            _finish(options)
            began_s = time.perf_counter()
            steps[who](batches[number % len(batches)])
            _finish(options)
            seconds[who].append(time.perf_counter() - began_s)
    del steps
    peer = statistics.median(seconds[PEER])
    found = {}
    for who, values in seconds.items():
        low, middle, high = statistics.quantiles(values, n=4)
        found[who] = {
            "seconds": middle,
            "quartiles": [low, high],
            "ratio_to_peft": middle / peer,
            "peak_mb": _peak_of(who, name, options),
        }
        sys.stderr.write(f"{name}: {who} {middle:.3f} s, {middle / peer:.3f} of PEFT's\n")
    return {
        "rows": len(batches[0].labels),
        "padded_tokens": statistics.mean(batch.padded_tokens for batch in batches),
        "rounds": options.rounds,
        "contenders": found,
    }


def _finish(options: argparse.Namespace) -> None:
    if _device(options).type == "cuda":
        torch.cuda.synchronize()


def _peak_of(who: str, batch: str, options: argparse.Namespace) -> float:
    """Return the peak memory of one contender, measured in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.training_step", "--peak-of", who, "--batch", batch]
    command += ["--data-root", str(options.data_root), "--base", options.base, "--rounds", "3"]
    command += ["--device", options.device, "--precision", options.precision]
    done = subprocess.run(command, check=True, capture_output=True, text=True)  # noqa: S603
    return float(done.stdout.split()[-1])


def _peak_mb(who: str, options: argparse.Namespace) -> float:
    batches, label_set = _batches(options.batch, options)
    step = contender(who, label_set, options)
    for batch in batches:
        step(batch)
    if _device(options).type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    # Not ru_maxrss, which a process inherits from the one that started it.
    (line,) = (x for x in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in x)
    return int(line.split()[1]) / 1024


if __name__ == "__main__":
    sys.exit(main())
