"""Exported adapters loaded by PEFT itself, against our own forward pass."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from dalorra_core.adapters.pack import SamplePack
from dalorra_core.artifact.export_record import Parity
from dalorra_core.base_models.loading import load_model
from dalorra_core.data.collate import EncodedExample, collate
from dalorra_core.errors import ConfigError, ParityError
from dalorra_core.objectives.elbo import label_log_probs
from dalorra_core.predictive.predictor import Predictor

__all__ = ["PARITY_LIMIT", "Expected", "check_parity", "expected_answers", "measured_parity"]

PARITY_LIMIT = {torch.float32: 1e-4, torch.bfloat16: 0.1}
"""Largest accepted difference, by dtype: of probabilities, and of logits relative to the largest.

Both programs sum the same products in another order. In float32 that moves the last digits
(docs/export.md); in bfloat16, which keeps 8 bits, what golden probes are allowed too.
"""


@dataclass(frozen=True)
class Expected:
    """Our answers to some questions, and what is needed to ask PEFT the same.

    Attributes:
        rows: n encoded questions.
        source: Where they come from.
        logits: Label logits (M, n, C), float32 on the CPU.
        allowed: (n, C) bool, or None where every label is allowed.
        token_ids: Token of each label.
        base: Directory of the base model.
        device: Where it is to run.
        dtype: Its precision.
    """

    rows: tuple[EncodedExample, ...]
    source: str
    logits: Tensor
    allowed: Tensor | None
    token_ids: tuple[int, ...]
    base: Path
    device: torch.device
    dtype: torch.dtype


@torch.inference_mode()
def expected_answers(
    predictor: Predictor,
    pack: SamplePack,
    rows: Sequence[EncodedExample],
    source: str,
    base: Path,
) -> Expected:
    """Return what our own forward pass answers, row by row.

    Args:
        predictor: Adapter and base model.
        pack: M samples.
        rows: At least one question.
        source: Where they come from, for the report.
        base: Directory of the base model.

    Raises:
        ConfigError: PEFT is not installed; said before anything is computed.
    """
    _peft()
    batches = [collate([row], num_labels=len(predictor.labels)) for row in rows]
    logits = [predictor.model(batch.to(predictor.device), pack).logits.cpu() for batch in batches]
    masks = [batch.allowed for batch in batches if batch.allowed is not None]
    return Expected(
        tuple(rows),
        source,
        torch.cat(logits, dim=1),
        torch.cat(masks) if masks else None,
        predictor.manifest.labels.token_ids,
        base,
        predictor.device,
        predictor.dtype,
    )


@torch.inference_mode()
def measured_parity(
    expected: Expected,
    directories: Sequence[Path],
    average: Literal["probabilities", "logits"] = "probabilities",
) -> Parity:
    """Return the largest differences of exported adapters, loaded by PEFT, to our answers.

    The base model is loaded anew, without any layer of ours, and holds one adapter at a time.

    Args:
        expected: Our answers.
        directories: M adapters, in the order of the samples.
        average: What an answer averages over them.

    Raises:
        ConfigError: PEFT is not installed.
        BaseModelError: The base model cannot be loaded.
    """
    peft = _peft()
    model: Any = load_model(expected.base, expected.device, expected.dtype)
    found = []
    for directory in directories:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of merging into a tied head, and nothing is merged
            adapted = peft.PeftModel.from_pretrained(model, str(directory)).eval()
            found.append(
                torch.stack([_label_logits(adapted, row, expected) for row in expected.rows])
            )
            model = adapted.unload()
    theirs, ours = torch.stack(found), expected.logits  # (M, n, C)
    scale = max(1.0, float(ours.abs().max()))
    log_probs = [label_log_probs(x, expected.allowed) for x in (theirs, ours)]
    means = [_averaged(x, average) for x in log_probs]
    return Parity(
        rows=len(expected.rows),
        source=expected.source,
        dtype=str(expected.dtype).removeprefix("torch."),
        peft=peft.__version__,
        logits=_largest(theirs, ours) / scale,
        probabilities=_largest(log_probs[0].exp(), log_probs[1].exp()),
        mean_probabilities=_largest(*means),
        limit=PARITY_LIMIT[expected.dtype],
    )


def check_parity(parity: Parity) -> None:
    """Refuse adapters that answer otherwise.

    Raises:
        ParityError: A difference is above the limit, or not a number.
    """
    found = (parity.logits, parity.probabilities, parity.mean_probabilities)
    if not all(value <= parity.limit for value in found):
        raise ParityError(
            f"loaded by PEFT {parity.peft}, the exported adapters answer otherwise: label logits "
            f"differ by {parity.logits:.3g} of the largest, probabilities by "
            f"{parity.probabilities:.3g}, their average by {parity.mean_probabilities:.3g}; the "
            f"limit in {parity.dtype} is {parity.limit:g}. Nothing was written"
        )


def _peft() -> Any:
    try:
        import peft  # noqa: PLC0415  an extra, and slow to import
    except ImportError:
        raise ConfigError(
            "verify compares with PEFT, which is not installed: install the extra `peft`, or pass "
            "--no-verify to export without a parity report"
        ) from None
    return peft


def _label_logits(model: Any, row: EncodedExample, expected: Expected) -> Tensor:
    ids = torch.tensor([row.token_ids], device=expected.device)
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
    return logits[0, -1, list(expected.token_ids)].float().cpu()  # (C,)


def _averaged(log_probs: Tensor, average: Literal["probabilities", "logits"]) -> Tensor:
    """Return the probabilities (n, C) of the answer that M samples give together."""
    if average == "logits":
        return log_probs.double().mean(0).softmax(-1)
    return log_probs.double().exp().mean(0)


def _largest(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max())
