"""Calibration: does a stated probability come true as often as it says?

n is the number of evaluated examples, C the number of labels, K the number of bins. Results
are fractions in [0, 1] (not percent) or nats; lower is better for every score in this file.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dalorra_core.errors import ConfigError

__all__ = [
    "NoiseFloor",
    "ReliabilityBins",
    "adaptive_ece",
    "bin_index",
    "brier",
    "classwise_ece",
    "ece",
    "ece_noise_floor",
    "nll",
    "reliability_bins",
]

# Rounding of a float32 softmax or mean; anything further outside [0, 1] is not a probability.
_PROB_SLACK = 1e-6
_MIN_DRAWS = 2  # one value has no standard deviation


@dataclass(frozen=True, eq=False)
class ReliabilityBins:
    """A reliability diagram in numbers: K equal-width bins, and one more for exactly 1.0.

    Attributes:
        lower: Lower edge of each bin, shape (K + 1,); the last one is 1.0. Bins are closed on
            the left and open on the right.
        count: Examples in each bin, shape (K + 1,).
        confidence: Mean confidence in each bin, shape (K + 1,); NaN where empty.
        accuracy: Share of correct answers in each bin, shape (K + 1,); NaN where empty.
    """

    lower: Float[Tensor, " K_plus_1"]
    count: Int[Tensor, " K_plus_1"]
    confidence: Float[Tensor, " K_plus_1"]
    accuracy: Float[Tensor, " K_plus_1"]


@dataclass(frozen=True)
class NoiseFloor:
    """The ECE that a perfectly calibrated model would show by chance alone.

    Attributes:
        mean: Expected ECE, fraction in [0, 1].
        std: Standard deviation of one such ECE, fraction.
    """

    mean: float
    std: float


def bin_index(
    confidence: Float[Tensor, " n"], num_bins: int
) -> tuple[Int[Tensor, " n"], Float[Tensor, " K_plus_1"]]:
    """Return the bin of each confidence and the lower edges of the K + 1 bins.

    Both sides are rounded to float32, as in torchmetrics: an edge such as 1/15 is not the same
    number in two precisions, and a value written as the edge must land on it.

    Args:
        confidence: Probabilities, shape (n,), in [0, 1], n >= 1.
        num_bins: K, at least 1.

    Returns:
        Bin indices, shape (n,), in [0, K]; and the edges, shape (K + 1,), the last one 1.0.

    Raises:
        ConfigError: If ``num_bins`` is less than 1.
        ValueError: If there are no examples or a confidence is outside [0, 1] or NaN.
    """
    _check_bins(num_bins)
    edges = torch.linspace(0, 1, num_bins + 1, dtype=torch.float32, device=confidence.device)
    index = torch.bucketize(_checked_probs(confidence).float(), edges, right=True) - 1
    return index, edges


def reliability_bins(
    confidence: Float[Tensor, " n"], correct: Bool[Tensor, " n"], num_bins: int = 15
) -> ReliabilityBins:
    """Return counts, mean confidence and accuracy of equal-width confidence bins.

    Args:
        confidence: Probability given to the predicted label, shape (n,), in [0, 1], n >= 1.
        correct: Whether the predicted label was right, shape (n,).
        num_bins: K, at least 1.

    Returns:
        The bins; see ``ReliabilityBins`` for which edge belongs to which bin.

    Raises:
        ConfigError: If ``num_bins`` is less than 1.
        ValueError: If there are no examples or a confidence is outside [0, 1] or NaN.
    """
    index, lower = bin_index(confidence, num_bins)  # (n,), (K + 1,)
    count = torch.bincount(index, minlength=num_bins + 1)  # (K + 1,)
    summed = torch.bincount(index, weights=confidence.double(), minlength=num_bins + 1)
    right = torch.bincount(index, weights=correct.double(), minlength=num_bins + 1)
    return ReliabilityBins(lower, count, summed / count, right / count)


def ece(probs: Float[Tensor, "n C"], labels: Int[Tensor, " n"], num_bins: int = 15) -> float:
    """Return the expected calibration error of the predicted label.

    ECE = sum over bins of (count / n) * |accuracy - mean confidence|, with the bins of
    ``torchmetrics`` (the published protocol): equal-width edges in float32, closed on the left,
    a confidence of exactly 1.0 in a bin of its own. The textbook bins are closed on the right;
    the two differ for confidences on an edge, which over-confident models often have.

    Args:
        probs: Mixture probabilities, shape (n, C), in [0, 1]; never logits.
        labels: True label indices, shape (n,), in [0, C).
        num_bins: K, at least 1.

    Returns:
        Fraction in [0, 1]; lower is better. Compare it with ``ece_noise_floor``.

    Raises:
        ConfigError: If ``num_bins`` is less than 1.
        ValueError: If there are no examples, or a probability or a label is out of range.

    Source:
        Guo et al. 2017, eq. (3); bin edges as in torchmetrics' MulticlassCalibrationError.

    Example:
        >>> probs = torch.tensor([[0.75, 0.25], [0.75, 0.25]])
        >>> ece(probs, torch.tensor([0, 1]))
        0.25
    """
    _check_labels(probs, labels)
    confidence, predicted = probs.max(dim=-1)  # (n,), (n,)
    gap = _gap(confidence, (predicted == labels).double(), num_bins)
    return float(gap.sum() / len(labels))


def classwise_ece(
    probs: Float[Tensor, "n C"], labels: Int[Tensor, " n"], num_bins: int = 15
) -> float:
    """Return the mean over labels of the calibration error of that label's probability.

    Unlike ``ece`` it looks at every probability, not only at the largest of each row.

    Args:
        probs: Mixture probabilities, shape (n, C), in [0, 1].
        labels: True label indices, shape (n,), in [0, C).
        num_bins: K, at least 1; same bins as ``ece``.

    Returns:
        Fraction in [0, 1]; lower is better. With many labels most probabilities are near 0,
        so it is small by construction: compare it only at equal C.

    Raises:
        ConfigError: If ``num_bins`` is less than 1.
        ValueError: If there are no examples, or a probability or a label is out of range.

    Source:
        Kull et al. 2019, Beyond temperature scaling, eq. (4).
    """
    _check_labels(probs, labels)
    rows, num_labels = probs.shape
    hit = torch.nn.functional.one_hot(labels.long(), num_labels).double()  # (n, C)
    index, edges = bin_index(probs.flatten(), num_bins)  # (n C,)
    of_label = torch.arange(num_labels, device=probs.device) * len(edges)  # (C,)
    slot = index.view(rows, num_labels) + of_label  # (n, C); a bin of its own for each label
    gap = torch.bincount(slot.flatten(), weights=hit.flatten() - _checked_probs(probs.flatten()))
    return float(gap.abs().sum() / (rows * num_labels))


def adaptive_ece(
    probs: Float[Tensor, "n C"], labels: Int[Tensor, " n"], num_bins: int = 15
) -> float:
    """Return the calibration error over bins that hold equally many examples.

    Examples are sorted by confidence and cut into K runs whose sizes differ by at most one (the
    first ones are larger). Examples of equal confidence share their mean correctness first,
    so that the order of rows cannot change the result.

    Args:
        probs: Mixture probabilities, shape (n, C), in [0, 1].
        labels: True label indices, shape (n,), in [0, C).
        num_bins: K, at least 1; fewer are used when n < K.

    Returns:
        Fraction in [0, 1]; lower is better.

    Raises:
        ConfigError: If ``num_bins`` is less than 1.
        ValueError: If there are no examples, or a probability or a label is out of range.

    Source:
        Nguyen and O'Connor 2015, Posterior calibration and exploratory analysis, section 3.
    """
    _check_labels(probs, labels)
    _check_bins(num_bins)
    top, predicted = probs.max(dim=-1)  # (n,), (n,)
    confidence = _checked_probs(top)  # (n,)
    values, group = confidence.unique(sorted=True, return_inverse=True)
    count = torch.bincount(group, minlength=len(values))
    right = torch.bincount(group, weights=(predicted == labels).double()) / count
    order = confidence.argsort()  # (n,)
    difference = (right[group] - confidence)[order]  # (n,)
    gaps = [chunk.sum().abs() for chunk in difference.tensor_split(num_bins)]
    return float(torch.stack(gaps).sum() / len(labels))


def brier(probs: Float[Tensor, "n C"], labels: Int[Tensor, " n"]) -> float:
    """Return the Brier score: mean squared distance between probabilities and the truth.

    Args:
        probs: Mixture probabilities, shape (n, C).
        labels: True label indices, shape (n,), in [0, C).

    Returns:
        Mean over examples of sum_c (p_c - 1[c = y])^2, in [0, 2]; lower is better.

    Raises:
        ValueError: If there are no examples or a label is out of range.
    """
    _check_labels(probs, labels)
    hit = torch.nn.functional.one_hot(labels.long(), probs.shape[1]).double()  # (n, C)
    return float((probs.double() - hit).square().sum(dim=-1).mean())


def nll(log_mean_probs: Float[Tensor, "n C"], labels: Int[Tensor, " n"]) -> float:
    """Return the mean negative log-likelihood of the true labels under the mixture.

    Args:
        log_mean_probs: Log of the mixture, shape (n, C), natural log.
        labels: True label indices, shape (n,), in [0, C).

    Returns:
        Nats per example; lower is better. Infinite when a true label has probability 0.

    Raises:
        ValueError: If there are no examples or a label is out of range.
    """
    _check_labels(log_mean_probs, labels)
    picked = log_mean_probs.double().gather(1, labels.long().unsqueeze(1))  # (n, 1)
    return -float(picked.mean())


def ece_noise_floor(
    confidence: Float[Tensor, " n"],
    num_bins: int = 15,
    num_draws: int = 1000,
    *,
    generator: torch.Generator,
) -> NoiseFloor:
    """Return the ECE that these confidences would show if every one of them were true.

    Draws the correctness of each example from its own confidence, again and again. An observed
    ECE inside ``mean`` plus or minus two ``std`` is no evidence of miscalibration.

    Args:
        confidence: Probability given to the predicted label, shape (n,), in [0, 1], n >= 1.
        num_bins: K, at least 1; same bins as ``ece``.
        num_draws: Simulated test sets, at least 2.
        generator: Source of the draws, on the device of ``confidence``.

    Returns:
        Mean and sample standard deviation over the draws.

    Raises:
        ConfigError: If ``num_bins`` is less than 1 or ``num_draws`` less than 2.
        ValueError: If there are no examples or a confidence is outside [0, 1] or NaN.
    """
    if num_draws < _MIN_DRAWS:
        raise ConfigError(f"num_draws must be at least {_MIN_DRAWS}, got {num_draws}")
    index, _ = bin_index(confidence, num_bins)  # (n,)
    wanted = _checked_probs(confidence)  # (n,)
    draws = torch.empty(num_draws, dtype=torch.float64)
    for draw in range(num_draws):
        uniform = torch.rand(
            wanted.shape, generator=generator, dtype=torch.float64, device=wanted.device
        )
        gap = torch.bincount(index, weights=(uniform < wanted).double() - wanted)  # (<= K + 1,)
        draws[draw] = gap.abs().sum() / len(wanted)
    return NoiseFloor(float(draws.mean()), float(draws.std()))


def _gap(
    confidence: Float[Tensor, " n"], correct: Float[Tensor, " n"], num_bins: int
) -> Float[Tensor, " bins"]:
    """Return |sum of correct - sum of confidence| in each bin that can be reached."""
    index, _ = bin_index(confidence, num_bins)
    return torch.bincount(index, weights=correct - _checked_probs(confidence)).abs()


def _checked_probs(values: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    """Return probabilities as float64 in [0, 1], or refuse what cannot be probabilities."""
    probs = values.double()
    if probs.numel() == 0:
        raise ValueError("calibration needs at least one example, got none")
    if not bool(((probs >= -_PROB_SLACK) & (probs <= 1 + _PROB_SLACK)).all()):
        low, high = float(probs.min()), float(probs.max())
        raise ValueError(f"probabilities must lie in [0, 1], got values from {low} to {high}")
    return probs.clamp(0.0, 1.0)


def _check_bins(num_bins: int) -> None:
    if num_bins < 1:
        raise ConfigError(f"num_bins must be at least 1, got {num_bins}")


def _check_labels(scores: Float[Tensor, "n C"], labels: Int[Tensor, " n"]) -> None:
    """Refuse labels that would be counted as wrong, or as another label, without a word."""
    if len(labels) == 0:
        raise ValueError("calibration needs at least one example, got none")
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= scores.shape[1]:
        raise ValueError(f"labels must lie in [0, {scores.shape[1]}), got {low} to {high}")
