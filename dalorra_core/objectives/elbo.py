"""The training loss every method shares: mean NLL over the label subset plus weighted KLs."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["KlTerm", "label_log_probs", "mean_nll", "neg_elbo", "weighted_sum"]


@dataclass(frozen=True)
class KlTerm:
    """One divergence and its factor in the loss.

    Attributes:
        value: KL in nats, unweighted, a scalar with gradient.
        weight: Its factor; 1/N makes ``mean NLL + weight * value`` the negative ELBO per example.
    """

    value: Tensor
    weight: float


def label_log_probs(logits: Tensor, allowed: Tensor | None = None) -> Tensor:
    """Return log-probabilities normalised over the labels of each row, not the vocabulary.

    Args:
        logits: Label logits (..., B, C), float32 or wider.
        allowed: (B, C) booleans, False where a row has no such choice; None allows all.

    Returns:
        (..., B, C); exactly -inf where not allowed.
    """
    if allowed is not None:
        logits = logits.masked_fill(~allowed, float("-inf"))
    return logits.log_softmax(-1)


def mean_nll(logits: Tensor, labels: Tensor, allowed: Tensor | None = None) -> Tensor:
    """Return the negative log-likelihood in nats per example, averaged over samples and batch.

    Log-likelihoods are averaged over the samples, never logits or probabilities (Eq. 4 of the
    paper): that is what makes the sum with KL/N a bound.

    Args:
        logits: (S, B, C).
        labels: (B,) label indices.
        allowed: (B, C) or None.
    """
    log_probs = label_log_probs(logits, allowed)  # (S, B, C)
    index = labels.view(1, -1, 1).expand(log_probs.shape[0], -1, 1)
    return -log_probs.gather(-1, index).mean()


def weighted_sum(kl_terms: Mapping[str, KlTerm]) -> Tensor:
    """Return ``sum_g weight_g * KL_g`` in nats per example; a zero where there are no terms."""
    return sum((term.weight * term.value for term in kl_terms.values()), torch.zeros(()))


def neg_elbo(nll: Tensor, kl_terms: Mapping[str, KlTerm]) -> Tensor:
    """Return ``nll + sum_g weight_g * KL_g``, nats per example.

    Source:
        docs/method.md, eq. (3).
    """
    return nll + weighted_sum(kl_terms).to(nll.device)
