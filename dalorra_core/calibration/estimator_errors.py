"""How far the answers of a few samples are from those of infinitely many.

The truth is not known, only a reference of K independent samples. The reference's own error is
estimated from its samples and taken off, so that no error is high because the reference is short.
Packs and reference must have been drawn independently of each other.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from scipy.special import stdtrit
from torch import Tensor

from dalorra_core.errors import ConfigError
from dalorra_core.metrics.uncertainty import log_mean_probs, mutual_information

__all__ = [
    "Estimate",
    "ReferenceAnswers",
    "SquaredErrors",
    "errors_within",
    "estimate",
    "excess_bound",
    "reference_answers",
    "squared_errors",
    "squared_errors_of",
    "squared_mean_errors",
]


_ELEMENTS_AT_ONCE = 2**22


@dataclass(frozen=True, eq=False)
class ReferenceAnswers:
    """What K independent samples say about each row, and how sure that is.

    Attributes:
        mean: Mean probabilities, (B, C), rows sum to 1.
        mean_variance: Variance of ``mean``, summed over the labels, (B,).
        information: Mutual information of infinitely many samples as estimated, (B,) in nats.
        information_variance: Variance of ``information``, (B,) in nats squared.
    """

    mean: Float[Tensor, "B C"]
    mean_variance: Float[Tensor, " B"]
    information: Float[Tensor, " B"]
    information_variance: Float[Tensor, " B"]


@dataclass(frozen=True, eq=False)
class SquaredErrors:
    """Squared error of every pack on every row, the reference's own taken off: may be below 0.

    Attributes:
        mean: Of the mean probabilities, summed over the labels, (R, B).
        information: Of the mutual information, (R, B) in nats squared.
    """

    mean: Float[Tensor, "R B"]
    information: Float[Tensor, "R B"]


@dataclass(frozen=True)
class Estimate:
    """A mean over packs and rows, and its standard error."""

    value: float
    standard_error: float


def reference_answers(log_probs: Float[Tensor, "K B C"]) -> ReferenceAnswers:
    """Return the best estimates that K independent samples give, with their variances.

    Args:
        log_probs: Shape (K, B, C), natural log; the samples are independent (``iid``).

    Returns:
        Everything in float64. The mutual information is free of the bias of finite K to second
        order; what is left of it and of its variance falls with the square of K.

    Raises:
        ConfigError: K is below 2.

    Source:
        docs/method.md, eq. (J6).
    """
    k = log_probs.shape[0]
    if k < 2:  # noqa: PLR2004  one varies from nothing
        raise ConfigError(f"a reference needs at least 2 samples, got {k}")
    log_mean = log_mean_probs(log_probs)  # (B, C)
    mean = log_mean.exp()
    variance = _label_variance(log_probs, mean)  # (B, C)
    gained = _information_of_each(log_probs, mean)  # (K, B)
    bias = torch.where(mean == 0, torch.zeros_like(mean), variance / (2 * k * mean)).sum(-1)
    return ReferenceAnswers(
        mean, variance.sum(-1) / k, mutual_information(log_probs) + bias, gained.var(0) / k
    )


def _label_variance(
    log_probs: Float[Tensor, "K B C"], mean: Float[Tensor, "B C"]
) -> Float[Tensor, "B C"]:
    """Return the variance of each probability over the samples, over K - 1."""
    total = torch.zeros_like(mean)
    for part in _parts(log_probs):
        total += (part.double().exp() - mean).square().sum(0)
    return total / (len(log_probs) - 1)


def _information_of_each(
    log_probs: Float[Tensor, "K B C"], mean: Float[Tensor, "B C"]
) -> Float[Tensor, "K B"]:
    """Return KL(p_k || mean) in nats: their mean is the mutual information of the samples."""
    log_mean = mean.clamp(min=torch.finfo(mean.dtype).tiny).log()  # finite where p_k is 0 as well
    found = []
    for part in _parts(log_probs):
        p = part.double().exp()  # (k, B, C)
        found.append((-torch.special.entr(p) - p * log_mean).sum(-1))
    return torch.cat(found)


def _parts(log_probs: Float[Tensor, "K B C"]) -> tuple[Tensor, ...]:
    """Return the samples in parts whose float64 copies stay small."""
    return log_probs.split(max(1, _ELEMENTS_AT_ONCE // log_probs[0].numel()))


def squared_mean_errors(
    reference: ReferenceAnswers, means: Float[Tensor, "R B C"]
) -> Float[Tensor, "R B"]:
    """Return the squared error of mean probabilities, summed over the labels.

    Args:
        reference: Drawn independently of them.
        means: Mean probabilities of R estimates, shape (R, B, C).

    Source:
        docs/method.md, eq. (J7).
    """
    return (means.double() - reference.mean).square().sum(-1) - reference.mean_variance


def squared_errors(
    reference: ReferenceAnswers, log_probs: Float[Tensor, "R M B C"]
) -> SquaredErrors:
    """Return the squared errors of R independent packs of M samples.

    The mutual information of a pack is what the server would say, with its bias at small M: the
    bias is a part of the error.

    Args:
        reference: Drawn independently of the packs.
        log_probs: Shape (R, M, B, C), natural log.

    Source:
        docs/method.md, eq. (J7).
    """
    means = torch.stack([log_mean_probs(pack).exp() for pack in log_probs])  # (R, B, C)
    found = torch.stack([mutual_information(pack) for pack in log_probs])  # (R, B)
    return squared_errors_of(reference, means, found)


def squared_errors_of(
    reference: ReferenceAnswers, means: Float[Tensor, "R B C"], information: Float[Tensor, "R B"]
) -> SquaredErrors:
    """Return the squared errors of R estimates of any kind.

    Args:
        reference: Drawn independently of them.
        means: Mean probabilities, shape (R, B, C).
        information: Mutual information in nats, shape (R, B).

    Source:
        docs/method.md, eq. (J7).
    """
    squares = (information - reference.information).square() - reference.information_variance
    return SquaredErrors(squared_mean_errors(reference, means), squares)


def errors_within(
    log_probs: Float[Tensor, "K B C"], sizes: Sequence[int]
) -> dict[int, SquaredErrors]:
    """Return the errors of sets of independent samples that a reference holds itself.

    The reference is cut into groups as large as the largest set, and the first M samples of each
    are judged by all that lie outside the group, which are independent of it. So the errors of
    ``iid`` need no samples of their own, and there are many sets.

    Args:
        log_probs: K independent samples, shape (K, B, C); at least twice the largest set.
        sizes: M of each set.

    Returns:
        M -> errors with R = K // largest M.
    """
    largest = max(sizes)
    starts = range(0, len(log_probs) - largest + 1, largest)
    found: dict[int, list[SquaredErrors]] = {m: [] for m in sizes}
    for start in starts:
        others = torch.cat([log_probs[:start], log_probs[start + largest :]])
        reference = reference_answers(others)
        for m in sizes:
            found[m].append(squared_errors(reference, log_probs[None, start : start + m]))
    return {
        m: SquaredErrors(
            torch.cat([each.mean for each in errors]),
            torch.cat([each.information for each in errors]),
        )
        for m, errors in found.items()
    }


def estimate(values: Float[Tensor, "R B"]) -> Estimate:
    """Return the mean over packs and rows with its standard error.

    The rows of one pack share its samples, and the packs of one row its text, so the R B values
    are not independent: the variance over the rows' means and that over the packs' means both
    count, less what both contain. One pack has no variance over packs (a deterministic pass).

    Args:
        values: Shape (R, B), B at least 2.

    Source:
        docs/method.md, eq. (J8); Cameron, Gelbach and Miller 2011, Robust inference with multiway
        clustering, eq. (2.11).
    """
    over_rows = float(values.mean(0).var()) / values.shape[1]
    over_packs, each = _pack_variances(values)
    return Estimate(float(values.mean()), _two_way(over_rows, over_packs, each))


def excess_bound(values: Float[Tensor, "R B"], peer: Float[Tensor, "Q B"], level: float) -> float:
    """Return a one-sided upper confidence bound on how much larger one error is than another.

    The rows are the same on both sides, so their variance is that of the differences; the packs
    are others, so theirs add up.

    Args:
        values: Errors of R packs on B rows, both at least 2.
        peer: Errors of Q packs on the same rows.
        level: Confidence, above one half.

    Source:
        docs/method.md, eq. (J8).
    """
    difference = values.mean(0) - peer.mean(0)  # (B,)
    rows = len(difference)
    ours, theirs = _pack_variances(values), _pack_variances(peer)
    error = _two_way(float(difference.var()) / rows, ours[0] + theirs[0], ours[1] + theirs[1])
    freedom = min(len(values), len(peer), rows) - 1  # that of the part known least
    return float(difference.mean()) + float(stdtrit(freedom, level)) * error


def _pack_variances(values: Float[Tensor, "R B"]) -> tuple[float, float]:
    """Return the variance of the mean as the packs' means show it, and as single values do."""
    packs, rows = values.shape
    if packs == 1:
        return 0.0, 0.0
    return float(values.mean(1).var()) / packs, float(values.var()) / (packs * rows)


def _two_way(over_rows: float, over_packs: float, each: float) -> float:
    """Return the standard error; a difference of estimates never makes it less than either."""
    return math.sqrt(max(over_rows, over_packs, over_rows + over_packs - each))
