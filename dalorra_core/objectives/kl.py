"""Closed-form divergences between adapter posteriors and their priors."""

import math

import torch.nn.functional as F  # noqa: N812
from jaxtyping import Float
from torch import Tensor

from dalorra_core.errors import ConfigError

__all__ = ["mask_kl"]


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
