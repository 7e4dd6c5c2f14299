"""Tiny random causal LMs of several families, and adapters for them.

Weights come from a named generator and are large enough that every layer matters; the features
that tell families apart (biases, query-key norms, sliding windows shorter than the prompts,
soft-capped logits, tied embeddings) are all switched on.
"""

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from dalorra_core.adapters.inject import TargetSpec, find_targets
from dalorra_core.adapters.pack import SamplePack
from dalorra_core.adapters.state import AdapterState, label_rows_only, module_packs
from dalorra_core.data.collate import EncodedExample, TokenBatch, collate
from dalorra_core.data.labels import LabelSet
from dalorra_core.methods import METHODS
from dalorra_core.methods.dalorra import DalorraConfig
from dalorra_core.methods.method import TrainingPoint
from dalorra_core.predictive.forward import LabelModel
from dalorra_core.predictive.trunk import Trunk
from tests.support.reference import every_mask
from tests.support.tiny_tokenizer import tiny_tokenizer

__all__ = [
    "FAMILIES",
    "LABEL_TOKENS",
    "TinyAdapter",
    "assert_near",
    "batch_of",
    "gated_pack",
    "merged_label_logits",
    "point_of",
    "probs_of_masks",
    "random_rows",
    "save_tiny_base",
    "tiny_adapter",
    "tiny_model",
    "write_jsonl",
]

FAMILIES = ("llama", "qwen2", "gemma2", "gemma3")
VOCABULARY = 480
LABEL_TOKENS = (301, 17, 455, 92, 260, 33)
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head")

_SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GEMMA: dict[str, Any] = {**_SHAPE, "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 4}
_CAPPED = {"final_logit_softcapping": 8.0, "attn_logit_softcapping": None}


def assert_near(found: Tensor, expected: Tensor) -> None:
    """Assert equality to 1e-5, relative and absolute: the contract of docs/method.md."""
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def tiny_model(family: str = "llama", *, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """Return a frozen random causal LM in float32; equal arguments give equal weights.

    Args:
        family: One of `FAMILIES`.
        seed: Of the weights.
        changes: Settings of the family's configuration to change.
    """
    model: PreTrainedModel
    if family == "llama":
        model = LlamaForCausalLM(LlamaConfig(**{**_SHAPE, "tie_word_embeddings": False} | changes))
    elif family == "qwen2":
        model = Qwen2ForCausalLM(Qwen2Config(**{**_SHAPE, "tie_word_embeddings": True} | changes))
    elif family == "gemma2":
        model = Gemma2ForCausalLM(Gemma2Config(**{**_GEMMA, **_CAPPED} | changes))
    elif family == "gemma3":
        kinds = ["sliding_attention", "full_attention"]
        model = Gemma3ForCausalLM(Gemma3TextConfig(**{**_GEMMA, "layer_types": kinds} | changes))
    else:
        raise ValueError(family)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in sorted(model.named_parameters()):
            noise = torch.randn(value.shape, generator=generator)
            if value.dim() == 1:
                value.add_(0.2 * noise)  # norms around what they start from, biases around 0
            elif "embed" in name:
                value.copy_(noise)
            else:
                value.copy_(noise * 1.5 / value.shape[1] ** 0.5)
    return model.eval().requires_grad_(False)


def save_tiny_base(directory: Path, family: str = "llama", *, seed: int = 0) -> Path:
    """Write a tiny model and the tiny tokenizer as a base model directory, and return it."""
    tiny_model(family, seed=seed).save_pretrained(directory)
    tiny_tokenizer(adds_start=True).save_pretrained(directory)
    return directory


@dataclass(frozen=True)
class TinyAdapter:
    """A tiny model, its adapted copy, and the state of a DALorRA adapter that is no longer zero.

    Attributes:
        base: The untouched model.
        model: Its copy with adapted layers and the label head.
        state: lora_A, lora_B (both random) and phi.
        label_set: C labels.
    """

    base: PreTrainedModel
    model: LabelModel
    state: AdapterState
    label_set: LabelSet

    @property
    def num_gates(self) -> int:
        """L times r."""
        return len(self.state.specs) * self.state.r


def tiny_adapter(  # noqa: PLR0913  all by name, each with a default
    family: str = "llama",
    *,
    r: int = 3,
    targets: Sequence[str] = ("q_proj", "v_proj", "lm_head"),
    layers: tuple[int, int] | None = None,
    num_labels: int = 5,
    seed: int = 0,
    beside: TinyAdapter | None = None,
    **changes: Any,
) -> TinyAdapter:
    """Return a tiny adapted model whose factors and gate logits are random and not small.

    Args:
        family: One of `FAMILIES`.
        r: Rank.
        targets: Adapted modules.
        layers: First and last adapted layer; None for all.
        num_labels: C; the first of one list of six label tokens.
        seed: Of the model (without ``beside``), the factors and the gates.
        beside: Another adapter, on whose model in memory this one is to stand too.
        changes: See `tiny_model`; of no effect with ``beside``.
    """
    if beside is None:
        base = tiny_model(family, seed=seed, **changes)
        trunk = Trunk(tiny_model(family, seed=seed, **changes))
    else:
        base, trunk = beside.base, beside.model.trunk
    specs = label_rows_only(find_targets(base, targets, layers), num_labels)
    label_set = LabelSet(tuple("ABCDEF"[:num_labels]), LABEL_TOKENS[:num_labels])
    params = METHODS["dalorra"].init(specs, r, seed, DalorraConfig())
    generator = torch.Generator().manual_seed(seed + 1)
    for name, value in params.items():
        if not name.endswith("lora_A"):
            scale = 1.0 if name == "phi" else 0.5
            params[name] = scale * torch.randn(value.shape, generator=generator)
    state = AdapterState(specs, r, 2.0, params)
    return TinyAdapter(base, LabelModel(trunk, specs, label_set), state, label_set)


def point_of(num_examples: int, **changes: Any) -> TrainingPoint:
    """Return the first step of a run of ten steps of two of these examples."""
    values: dict[str, Any] = {"step": 0, "num_steps": 10, "batch_size": 2}
    values["num_examples"] = num_examples
    return TrainingPoint(**(values | changes))


def gated_pack(state: AdapterState, z: Tensor | None) -> SamplePack:
    """Return the pack of gates z (M, L, r); None stands for plain LoRA."""
    return SamplePack(1 if z is None else len(z), state.scaling, module_packs(state, z))


def random_rows(
    lengths: Sequence[int],
    *,
    num_labels: int = 5,
    seed: int = 0,
    allowed: Sequence[tuple[int, ...] | None] | None = None,
) -> list[EncodedExample]:
    """Return encoded rows of the given lengths with random tokens and labels."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for i, length in enumerate(lengths):
        tokens = torch.randint(3, VOCABULARY, (length,), generator=generator).tolist()
        choices = None if allowed is None else allowed[i]
        options = choices if choices is not None else tuple(range(num_labels))
        label = options[int(torch.randint(len(options), (), generator=generator))]
        rows.append(EncodedExample(f"row-{i}", tuple(tokens), label, choices, truncated=False))
    return rows


def batch_of(rows: Sequence[EncodedExample], num_labels: int = 5) -> TokenBatch:
    """Return rows as one batch."""
    return collate(rows, num_labels=num_labels)


def merged_label_logits(
    tiny: TinyAdapter, token_ids: Sequence[int], gates: Mapping[str, Tensor] | None
) -> Tensor:
    """Return the (C,) label logits of one row under one mask in float64, without our layers.

    Adds ``s * B diag(z) A`` to the weights of a copy of the plain Hugging Face model, unties its
    output projection, runs it on the one unpadded row and picks the label tokens of the last
    position.

    Args:
        tiny: Model and adapter.
        token_ids: One row.
        gates: Module name to its gates (r,); None leaves the base model as it is.
    """
    model: Any = copy.deepcopy(tiny.base).double()
    head = model.get_output_embeddings()
    assert isinstance(head, torch.nn.Linear)
    head.weight = torch.nn.Parameter(head.weight.detach().clone(), requires_grad=False)
    ids = list(tiny.label_set.token_ids)
    for spec in tiny.state.specs if gates is not None else ():
        delta = _dense_delta(tiny.state, spec, gates or {})
        if spec.name == "lm_head":
            head.weight[ids] += delta
        else:
            model.get_submodule(spec.name).weight.add_(delta)
    with torch.no_grad():
        return model(input_ids=torch.tensor([list(token_ids)])).logits[0, -1, ids]


def _dense_delta(state: AdapterState, spec: TargetSpec, gates: Mapping[str, Tensor]) -> Tensor:
    up = state.params[f"{spec.name}.lora_B"].detach().double()
    down = state.params[f"{spec.name}.lora_A"].detach().double()
    return state.scaling * up @ torch.diag(gates[spec.name].double()) @ down


def write_jsonl(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """Write rows as JSON lines, and return the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def probs_of_masks(tiny: TinyAdapter, rows: Sequence[EncodedExample]) -> Tensor:
    """Return the label probabilities of rows under each of the 2^G masks, (2^G, B, C) in float64.

    Without our layers; the masks are in the order of ``every_mask``.
    """
    found = []
    for mask in every_mask(tiny.num_gates):
        z = torch.tensor(mask).float().view(len(tiny.state.specs), tiny.state.r)
        gates = {spec.name: z[i] for i, spec in enumerate(tiny.state.specs)}
        logits = [merged_label_logits(tiny, row.token_ids, gates) for row in rows]
        found.append(torch.stack(logits).softmax(-1))
    return torch.stack(found)
