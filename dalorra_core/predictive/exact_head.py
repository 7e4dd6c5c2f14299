"""The label head's gates summed out: all 2^r masks of ``lm_head`` for each sample of the others.

The gates of ``lm_head`` touch nothing but the C label logits, which are linear in them, so their
part of the average over masks needs no sampling and no further pass.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dalorra_core.adapters.inject import LM_HEAD
from dalorra_core.adapters.pack import SamplePack
from dalorra_core.data.collate import EncodedExample, collate
from dalorra_core.errors import ConfigError
from dalorra_core.objectives.elbo import label_log_probs
from dalorra_core.predictive.forward import LabelModel, PackedRows, last_hidden
from dalorra_core.predictive.label_head import LabelHead
from dalorra_core.predictive.scoring import plan_chunks
from dalorra_core.predictive.trunk import RowStates

__all__ = ["MOST_HEAD_GATES", "HeadAnswers", "score_exact_head", "sum_over_head_masks"]

MOST_HEAD_GATES = 8
"""2^r masks of each row and sample: 256 sums of C numbers; each gate more doubles them."""

_NUMBERS_AT_ONCE = 2**21
"""Logits of all masks that stand in memory together, in float64."""


@dataclass(frozen=True, eq=False)
class HeadAnswers:
    """Answers of M samples of the gates below the head, averaged over all masks of the head.

    Attributes:
        probs: Mean probabilities over the head's masks, (M, B, C) float64.
        entropy: Mean entropy over the head's masks, (M, B) float64, in nats.
        log_probs: Of the same M samples with their own gates of the head, (M, B, C) float32: what
            ``score_rows`` gives.
    """

    probs: Tensor
    entropy: Tensor
    log_probs: Tensor

    def first(self, num_samples: int) -> "HeadAnswers":
        """Return the answers of the first samples."""
        return HeadAnswers(*(x[:num_samples] for x in (self.probs, self.entropy, self.log_probs)))

    @property
    def mean_probs(self) -> Tensor:
        """(B, C)."""
        return self.probs.mean(0)

    @property
    def mutual_information(self) -> Tensor:
        """(B,) in nats, between the label and all gates, those of the head included.

        The entropies in (7) are those of single masks, so the head's share of the disagreement
        counts although no two samples of it were drawn.
        """
        total = torch.special.entr(self.mean_probs).sum(-1)
        return (total - self.entropy.mean(0)).clamp(min=0.0)


def sum_over_head_masks(
    head: LabelHead, hidden: Tensor, pack: SamplePack, keep: Tensor, allowed: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return mean probabilities (M, B, C) and mean entropy (M, B) over the head's 2^r masks.

    Args:
        head: The label head.
        hidden: Last hidden states (M, B, d).
        pack: M samples, with an ``lm_head`` module.
        keep: Probability of each gate of the head, (r,) in [0, 1].
        allowed: (B, C) booleans; None allows all labels.

    Returns:
        float64, on the device of ``hidden``.

    Source:
        docs/method.md, eq. (J9).
    """
    shape = hidden.shape[:2]
    off, parts = head.gate_parts(hidden.flatten(0, 1), pack)  # (N, C), (N, r, C)
    weights = _mask_weights(keep.double().to(hidden.device))  # (2^r,)
    choices = None if allowed is None else allowed.repeat(shape[0], 1).unsqueeze(1)  # (N, 1, C)
    size = max(1, _NUMBERS_AT_ONCE // (len(weights) * off.shape[1]))
    probs, entropy = [], []
    for start in range(0, len(off), size):
        some = slice(start, start + size)
        logits = head.cap(_mask_logits(off[some], parts[some]))
        p = label_log_probs(logits.double(), None if choices is None else choices[some]).exp()
        probs.append(torch.einsum("z,nzc->nc", weights, p))  # p is (n, 2^r, C)
        entropy.append(torch.special.entr(p).sum(-1) @ weights)
    return torch.cat(probs).unflatten(0, shape), torch.cat(entropy).unflatten(0, shape)


def _mask_weights(keep: Tensor) -> Tensor:
    """Return the probability of every mask, (2^r,); gate j is on where bit j of its place is."""
    weights = keep.new_ones(1)
    for p in keep:
        weights = torch.cat([weights * (1 - p), weights * p])
    return weights


def _mask_logits(off: Tensor, parts: Tensor) -> Tensor:
    """Return the logits under every mask, (n, 2^r, C), in the order of ``_mask_weights``."""
    logits = off.unsqueeze(1)
    for part in parts.unbind(1):
        logits = torch.cat([logits, logits + part.unsqueeze(1)], dim=1)
    return logits


@torch.inference_mode()
def score_exact_head(
    model: LabelModel,
    pack: SamplePack,
    rows: Sequence[EncodedExample],
    *,
    keep: Tensor,
    max_padded_tokens: int,
    stems: RowStates | None = None,
) -> HeadAnswers:
    """Return the answers of M samples for every row, with the head's gates summed out.

    As many forward passes as ``score_rows`` takes, and 2^r C numbers more for each sample and row.

    Args:
        model: The adapted model.
        pack: M samples, on the model's device, whose gates of ``lm_head`` are independent of the
            others (``independent_gates``).
        rows: At least one encoded row.
        keep: Probability of each gate of ``lm_head``, (r,).
        max_padded_tokens: Size of one forward pass.
        stems: See ``RowsToScore``.

    Returns:
        On the CPU, in the rows' order.

    Raises:
        ConfigError: The head is not adapted, or has more gates than ``MOST_HEAD_GATES``.
    """
    if LM_HEAD not in pack.modules:
        raise ConfigError(f"the exact head needs an adapter with {LM_HEAD} among its modules")
    if len(keep) > MOST_HEAD_GATES:
        raise ConfigError(
            f"the exact head sums over 2^r masks: r may be at most {MOST_HEAD_GATES}, "
            f"got {len(keep)}"
        )
    m = pack.num_samples
    probs = torch.full((m, len(rows), model.num_labels), math.nan, dtype=torch.float64)
    found = HeadAnswers(probs, probs[..., 0].clone(), probs.float())
    for places, step in plan_chunks([len(row.token_ids) for row in rows], m, max_padded_tokens):
        batch = collate([rows[i] for i in places], num_labels=model.num_labels)
        if stems is not None:
            batch = replace(batch, stem=stems.of(places))
        batch = batch.to(model.head.weight.device)
        for start in range(0, m, step):
            stop = min(start + step, m)
            with model.trunk.turns:
                part = PackedRows(model, pack.narrow(start, stop), batch)
                hidden, (settled,) = last_hidden((part,))
            logits = model.head(hidden.flatten(0, 1), settled).unflatten(0, hidden.shape[:2])
            own = label_log_probs(logits, batch.allowed)
            summed = sum_over_head_masks(model.head, hidden, settled, keep, batch.allowed)
            found.probs[start:stop, places] = summed[0].cpu()
            found.entropy[start:stop, places] = summed[1].cpu()
            found.log_probs[start:stop, places] = own.cpu()
    return found
