"""The same M passes with PEFT: a loop over M masked adapters, and one batch that names them."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

from dalorra_core.adapters.inject import lm_head_name_of, lm_head_of
from dalorra_core.adapters.plain_lora import plain_loras, with_full_head
from dalorra_core.artifact.peft_io import write_peft
from dalorra_core.base_models.loading import load_model
from dalorra_core.base_models.resolve import resolve_base_model
from dalorra_core.data.collate import EncodedExample, TokenBatch, collate
from dalorra_core.predictive.predictor import Predictor, SamplingPlan

__all__ = ["Way", "differences", "peer_ways"]

Way = Callable[[], Tensor]
"""Answers all rows; returns log-probabilities (M, B, C)."""


def peer_ways(
    predictor: Predictor, rows: Sequence[EncodedExample], m: int, base: str | None
) -> dict[str, Way]:
    """Return the peers, and ours at their M, under the same masks.

    Args:
        predictor: The adapter.
        rows: Encoded rows.
        m: M.
        base: Base model; None for the adapter's.

    Raises:
        ConfigError: The method's samples are more than plain LoRA.
    """
    peer, ids = masked_peft(predictor, m, base)
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


def differences(ways: Mapping[str, Way], num_samples: int) -> dict[str, float]:
    """Return how far the peers' probabilities are from ours, at the most: the same masks."""
    ours = ways[f"ours, iid {num_samples}"]().exp()
    return {
        name: float((way().exp() - ours).abs().max())
        for name, way in ways.items()
        if name.startswith("PEFT")
    }
