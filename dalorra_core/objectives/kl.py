"""Closed-form divergences between adapter posteriors and their priors."""

import math

import torch
import torch.nn.functional as F  # noqa: N812
from jaxtyping import Float
from torch import Tensor

from dalorra_core.errors import ConfigError

__all__ = ["gate_kl", "mask_kl", "normal_kl", "normal_kl_reversed"]


def mask_kl(phi: Float[Tensor, "L r"], prior_prob: float) -> Float[Tensor, ""]:
    """Return KL(q || p) between the gate posterior and its prior, in nats, summed over all gates.

    The posterior keeps rank j of module l with probability sigmoid(phi[l, j]); the prior keeps
    every rank with probability p0. Both tails go through log-sigmoids, so a saturated gate
    (|phi| = 100) still has a finite value and a finite gradient.

    Args:
        phi: Gate logits, any real value.
        prior_prob: p0, strictly between 0 and 1.

    Returns:
        Scalar in nats, per posterior and not per example: the objective divides by N.

    Raises:
        ConfigError: If ``prior_prob`` is not strictly between 0 and 1.

    Source:
        docs/method.md, eq. (4).

    Example:
        >>> import torch
        >>> float(mask_kl(torch.zeros(2, 4), prior_prob=0.5))
        0.0
    """
    if not 0.0 < prior_prob < 1.0:
        raise ConfigError(f"prior_prob must lie strictly between 0 and 1, got {prior_prob}")
    keep, drop = phi.sigmoid(), (-phi).sigmoid()  # (L, r); 1 - keep would round to 0
    kl = keep * (F.logsigmoid(phi) - math.log(prior_prob)) + drop * (
        F.logsigmoid(-phi) - math.log1p(-prior_prob)
    )  # (L, r)
    return kl.sum()


def normal_kl(mean: Tensor, log_sigma: Tensor, prior_sigma: float) -> Tensor:
    """Return KL(N(mean, sigma^2) || N(0, prior_sigma^2)) in nats, summed over the last axis.

    Worked out in float64: a sum over millions of weights loses no digits, and its gradient comes
    back in the dtype of the arguments. With t = 2 (log sigma - log prior_sigma) one entry is
    ``(exp(t) - 1 - t) / 2 + mean^2 / (2 prior_sigma^2)``, whose first part is never negative.

    Args:
        mean: (..., k).
        log_sigma: Logarithm of the standard deviation, broadcast against ``mean``.
        prior_sigma: Standard deviation of the prior, positive.

    Returns:
        (...), float64, per posterior and not per example.

    Raises:
        ConfigError: If ``prior_sigma`` is not positive.

    Source:
        docs/method.md, eq. (B2).

    Example:
        >>> zero = torch.zeros(2, 4)
        >>> normal_kl(zero, zero, prior_sigma=1.0).tolist()
        [0.0, 0.0]
    """
    wide, log_ratio = _in_float64(mean, log_sigma, prior_sigma)
    spread = torch.expm1(2 * log_ratio) - 2 * log_ratio
    return (0.5 * (spread + (wide / prior_sigma).square())).sum(-1)


def normal_kl_reversed(mean: Tensor, log_sigma: Tensor, prior_sigma: float) -> Tensor:
    """Return KL(N(0, prior_sigma^2) || N(mean, sigma^2)) in nats, summed over the last axis.

    The divergence the other way round, which one published code uses in place of ``normal_kl``. It
    is no term of a bound.

    Args:
        mean: (..., k).
        log_sigma: Logarithm of the standard deviation, broadcast against ``mean``.
        prior_sigma: Standard deviation of the prior, positive.

    Returns:
        (...), float64.

    Raises:
        ConfigError: If ``prior_sigma`` is not positive.
    """
    wide, log_ratio = _in_float64(mean, log_sigma, prior_sigma)
    spread = torch.expm1(-2 * log_ratio) + 2 * log_ratio
    distance = (wide / prior_sigma).square() * torch.exp(-2 * log_ratio)  # (mean / sigma)^2
    return (0.5 * (spread + distance)).sum(-1)


def _in_float64(mean: Tensor, log_sigma: Tensor, prior_sigma: float) -> tuple[Tensor, Tensor]:
    """Return the mean and log(sigma / prior_sigma), of one shape."""
    if not prior_sigma > 0.0:
        raise ConfigError(f"prior_sigma must be positive, got {prior_sigma}")
    wide, log_ratio = torch.broadcast_tensors(
        mean.double(), log_sigma.double() - math.log(prior_sigma)
    )
    return wide, log_ratio


def gate_kl(phi: Tensor, prior_phi: Tensor) -> Tensor:
    """Return KL(Bern(sigmoid(phi)) || Bern(sigmoid(prior_phi))) of every gate, in nats.

    As stable as ``mask_kl``: both tails go through log-sigmoids.

    Args:
        phi: Gate logits (..., r), any real value.
        prior_phi: Logits of the prior, broadcast against ``phi``.

    Returns:
        The shape of both together, at least 0 up to rounding.

    Example:
        >>> import torch
        >>> gate_kl(torch.tensor([0.0, 100.0]), torch.tensor([0.0, 100.0]))
        tensor([0., 0.])
    """
    kept = phi.sigmoid() * (F.logsigmoid(phi) - F.logsigmoid(prior_phi))
    dropped = (-phi).sigmoid() * (F.logsigmoid(-phi) - F.logsigmoid(-prior_phi))
    return kept + dropped
