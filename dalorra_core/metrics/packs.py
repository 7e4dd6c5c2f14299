"""Spread and mutual information from R packs of M samples that were drawn independently.

The samples of one pack may depend on each other, as stratified ones do, so what one pack says of
its own spread cannot be corrected from itself: how much its mean varies is seen between packs only.
Every function takes ``log_probs`` of shape (R, M, B, C), natural logarithms as in ``uncertainty``,
from R packs of one size and design with different seeds.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from dalorra_core.metrics.uncertainty import mutual_information

__all__ = [
    "PackInformation",
    "pack_information",
    "pack_mean_variance",
    "pack_variance",
]


@dataclass(frozen=True, eq=False)
class PackInformation:
    """An estimate of the mutual information of infinitely many samples, in nats.

    Attributes:
        mutual_information: The estimate, at least 0, higher is less known. Its average is right to
            second order in the spread; one value may lie above log C.
        correction: What it is above the mutual information of the R M samples as one mixture.
    """

    mutual_information: Float[Tensor, " B"]
    correction: Float[Tensor, " B"]


def pack_mean_variance(log_probs: Float[Tensor, "R M B C"]) -> Float[Tensor, "B C"]:
    """Return an unbiased estimate of the variance of the mean probabilities of one pack.

    Args:
        log_probs: Shape (R, M, B, C), R at least 2.

    Returns:
        Shape (B, C), float64: the variance between the packs' means, over R - 1.

    Raises:
        ValueError: There are fewer than two packs.
    """
    if log_probs.shape[0] < 2:  # noqa: PLR2004  one has nothing to differ from
        raise ValueError(f"at least 2 packs are needed, got {log_probs.shape[0]}")
    return log_probs.double().exp().mean(dim=1).var(dim=0)


def pack_variance(log_probs: Float[Tensor, "R M B C"]) -> Float[Tensor, "B C"]:
    """Return an unbiased estimate of the variance of each probability over the posterior.

    Within a pack the mean squared distance from the pack's own mean is low by the variance of that
    mean, under every design; the packs' distances from each other say how much that is.

    Args:
        log_probs: Shape (R, M, B, C), R at least 2; M may be 1.

    Returns:
        Shape (B, C), float64.

    Raises:
        ValueError: There are fewer than two packs.

    Source:
        docs/method.md, eq. (J4).
    """
    within = log_probs.double().exp().var(dim=1, correction=0).mean(dim=0)  # (B, C)
    return within + pack_mean_variance(log_probs)


def pack_information(log_probs: Float[Tensor, "R M B C"]) -> PackInformation:
    """Return the mutual information of gates and label with the bias of finite M taken off.

    ``mutual_information`` itself stays what it is: that of the samples at hand.

    Args:
        log_probs: Shape (R, M, B, C), R at least 2; M may be 1.

    Returns:
        The estimate and the correction in it, float64; 0 for a label without probability.

    Raises:
        ValueError: There are fewer than two packs.

    Source:
        docs/method.md, eq. (J5).

    Example:
        >>> one_of_each = torch.tensor([[[[0.9, 0.1]]], [[[0.7, 0.3]]]]).log()
        >>> round(float(pack_information(one_of_each).correction), 3)
        0.031
    """
    variance = pack_mean_variance(log_probs) / log_probs.shape[0]  # (B, C), of the mean of all
    mean = log_probs.double().exp().mean(dim=(0, 1))  # (B, C)
    each = torch.where(mean == 0, torch.zeros_like(mean), variance / (2 * mean))
    correction = each.sum(dim=-1)
    found = mutual_information(log_probs.flatten(0, 1))
    return PackInformation(found + correction, correction)
