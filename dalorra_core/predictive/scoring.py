"""Run many rows through the fused forward in chunks of bounded size."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dalorra_core.adapters.pack import SamplePack
from dalorra_core.data.collate import EncodedExample, collate
from dalorra_core.objectives.elbo import label_log_probs
from dalorra_core.predictive.forward import LabelModel

__all__ = ["Prediction", "joined", "padded_token_limit", "plan_chunks", "score_rows"]


@dataclass(frozen=True)
class Prediction:
    """The answer of M samples for B rows, on the CPU.

    Attributes:
        log_probs: (M, B, C) float32, normalised over each row's labels; -inf where not allowed.
        label_mass: (B,) probability of the label tokens under the full vocabulary, mean over M;
            None when it was not asked for.
    """

    log_probs: Tensor
    label_mass: Tensor | None


def joined(parts: Sequence[Prediction]) -> Prediction:
    """Return the rows of several predictions of the same M as one, in order."""
    masses = [part.label_mass for part in parts if part.label_mass is not None]
    return Prediction(
        torch.cat([part.log_probs for part in parts], dim=1), torch.cat(masses) if masses else None
    )


def padded_token_limit(device: torch.device) -> int:
    """Return how many padded tokens (M * B * T) one forward pass takes at most.

    On a CPU the activations of a larger pass leave the caches: SmolLM2-135M in float32 ran twice
    as fast at 128 to 512 tokens as at 2,048 (docs/results.md). On a GPU the limit bounds memory.
    """
    return 512 if device.type == "cpu" else 65536


def plan_chunks(
    lengths: Sequence[int], num_samples: int, max_padded_tokens: int
) -> Iterator[tuple[list[int], int]]:
    """Cut rows into forward passes of similar length.

    Args:
        lengths: Tokens of each row.
        num_samples: M.
        max_padded_tokens: Limit on M * rows * longest; one sample of one row always goes through.

    Yields:
        (row indices, samples per pass): every index once, shortest rows first.
    """
    order = sorted(range(len(lengths)), key=lambda i: (lengths[i], i))
    start = 0
    while start < len(order):
        stop = start + 1
        while (
            stop < len(order)
            and (stop + 1 - start) * lengths[order[stop]] * num_samples <= max_padded_tokens
        ):
            stop += 1
        rows = order[start:stop]
        per_sample = len(rows) * lengths[rows[-1]]
        passes = -(-num_samples // max(1, max_padded_tokens // per_sample))
        yield rows, -(-num_samples // passes)  # samples spread evenly over the passes
        start = stop


@torch.inference_mode()
def score_rows(  # noqa: PLR0913  one call says all that decides the answer
    model: LabelModel,
    pack: SamplePack,
    rows: Sequence[EncodedExample],
    *,
    num_labels: int,
    max_padded_tokens: int,
    label_mass: bool = False,
    on_progress: Callable[[int], None] | None = None,
) -> Prediction:
    """Return the label log-probabilities of every sample for every row, in the rows' order.

    Args:
        model: The adapted model.
        pack: M samples, on the model's device.
        rows: At least one encoded row.
        num_labels: C.
        max_padded_tokens: Size of one forward pass.
        label_mass: Also compute that diagnostic.
        on_progress: Called with the number of rows finished since the last call.
    """
    m = pack.num_samples
    log_probs = torch.empty(m, len(rows), num_labels)  # (M, B, C)
    mass = torch.zeros(len(rows), dtype=torch.float64) if label_mass else None
    for indices, step in plan_chunks([len(r.token_ids) for r in rows], m, max_padded_tokens):
        batch = collate([rows[i] for i in indices], num_labels=num_labels)
        batch = batch.to(model.head.weight.device)
        for start in range(0, m, step):
            part = pack if step >= m else pack.narrow(start, min(start + step, m))
            out = model(batch, part, label_mass=label_mass)
            log_probs[start : start + part.num_samples, indices] = label_log_probs(
                out.logits, batch.allowed
            ).cpu()
            if mass is not None and out.label_mass is not None:
                mass[indices] += out.label_mass.double().sum(0).cpu()
        if on_progress is not None:
            on_progress(len(indices))
    return Prediction(log_probs, None if mass is None else (mass / m).float())
