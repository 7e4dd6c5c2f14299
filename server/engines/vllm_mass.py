"""The share of the label tokens in the full vocabulary, which vLLM does not say by itself.

Asked without ``allowed_token_ids``, it gives the most probable tokens only, and no label need be
among them. With ``LABEL_BIAS`` added to the logits of all labels their share P becomes

    P' = e^b S / (e^b S + R),   so that   P = S / (S + R)   has the odds   e^-b P' / (1 - P'),

S and R being the sums over labels and other tokens. One label in the answer gives P': its
log-probability there, less that among the labels alone.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["LABEL_BIAS", "label_mass"]

LABEL_BIAS = 8.0
"""b: large enough that a label is among the answers unless P is below e^-8, and small enough that
the rest, 1 - P', keeps three digits in float32 at the shares that are usual."""

_MOST = 1 - 1e-7


def label_mass(within: Tensor, biased: Sequence[Sequence[Sequence[float | None]]]) -> Tensor:
    """Return the probability of the label tokens under the full vocabulary, the mean over M.

    Args:
        within: Log-probabilities (M, B, C) normalised over all labels, float64.
        biased: Log-probabilities (M, B, C) of the label tokens with ``LABEL_BIAS``; None for those
            that are not among the answers.

    Returns:
        (B,) float32; a sample without any label among its answers counts 0.
    """
    shown = torch.tensor(
        [[[-math.inf if x is None else x for x in row] for row in sample] for sample in biased],
        dtype=torch.float64,
    )  # (M, B, C)
    found = shown.isfinite()
    best = within.masked_fill(~found, -math.inf).argmax(-1, keepdim=True)
    share = (shown - within).gather(-1, best).squeeze(-1).exp().clamp(max=_MOST)  # P', (M, B)
    odds = share / (1 - share) * math.exp(-LABEL_BIAS)
    mass = torch.where(found.any(-1), odds / (1 + odds), torch.zeros_like(odds))
    return mass.mean(0).float()
