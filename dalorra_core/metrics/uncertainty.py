"""Uncertainty of each row, from the log-probabilities of M posterior samples.

Every function takes ``log_probs`` of shape (M, B, C): natural logarithms, each (m, b) row
normalised over its labels, ``-inf`` where a label is not among the row's choices. Results are
float64, because mutual information is a small difference of two entropies. A NaN in the input
stays NaN in the output.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

__all__ = [
    "UncertaintySummary",
    "confidence",
    "confidence_std",
    "expected_entropy",
    "log_mean_probs",
    "mean_probs",
    "mutual_information",
    "normalized_entropy",
    "predictive_entropy",
    "summarise",
    "variation_ratio",
]


@dataclass(frozen=True, eq=False)
class UncertaintySummary:
    """What one batch of predictions says about itself; every tensor but the first is (B,).

    Attributes:
        mean_probs: Mixture over samples, shape (B, C), rows sum to 1.
        predicted: Index of the most probable label of the mixture; ties go to the first.
        confidence: Probability of that label, [1/C, 1]; higher is surer.
        confidence_std: Population standard deviation of that probability over samples, [0, 0.5].
        predictive_entropy: H[E p] in nats, [0, log C]; higher is less sure.
        expected_entropy: E[H p] in nats; the aleatoric part.
        mutual_information: Difference of the two in nats, [0, log min(M, C)]; the epistemic part.
        normalized_entropy: Predictive entropy over the log of the row's own choices, [0, 1].
        variation_ratio: Share of samples that prefer another label, [0, 1].
    """

    mean_probs: Float[Tensor, "B C"]
    predicted: Int[Tensor, " B"]
    confidence: Float[Tensor, " B"]
    confidence_std: Float[Tensor, " B"]
    predictive_entropy: Float[Tensor, " B"]
    expected_entropy: Float[Tensor, " B"]
    mutual_information: Float[Tensor, " B"]
    normalized_entropy: Float[Tensor, " B"]
    variation_ratio: Float[Tensor, " B"]


def log_mean_probs(log_probs: Float[Tensor, "M B C"]) -> Float[Tensor, "B C"]:
    """Return the logarithm of the mixture, log((1/M) sum_m p_m), in nats.

    Stays finite where a probability underflows in some samples, so that the NLL of a label is
    finite unless every sample gives it exactly zero.

    Args:
        log_probs: Shape (M, B, C), natural log, ``-inf`` allowed.

    Returns:
        Shape (B, C), float64, at most 0.

    Example:
        >>> log_mean_probs(torch.tensor([[[0.0, -torch.inf]], [[-torch.inf, 0.0]]])).exp()
        tensor([[0.5000, 0.5000]], dtype=torch.float64)
    """
    summed = torch.logsumexp(log_probs.double(), dim=0)  # (B, C)
    # Rounding may leave log 1 at +2e-16, and a probability above 1 would fall out of the bins.
    return (summed - math.log(log_probs.shape[0])).clamp(max=0.0)


def mean_probs(log_probs: Float[Tensor, "M B C"]) -> Float[Tensor, "B C"]:
    """Return the mixture: the mean over samples of probabilities, never of logits.

    Args:
        log_probs: Shape (M, B, C), natural log, ``-inf`` allowed.

    Returns:
        Shape (B, C), float64, rows sum to 1 as closely as those of ``log_probs`` do.
    """
    return log_mean_probs(log_probs).exp()


def predictive_entropy(log_probs: Float[Tensor, "M B C"]) -> Float[Tensor, " B"]:
    """Return the entropy of the mixture, H[E p], in nats; higher is less sure.

    Args:
        log_probs: Shape (M, B, C), natural log, ``-inf`` allowed.

    Returns:
        Shape (B,), in [0, log C].
    """
    return torch.special.entr(mean_probs(log_probs)).sum(dim=-1)


def expected_entropy(log_probs: Float[Tensor, "M B C"]) -> Float[Tensor, " B"]:
    """Return the mean over samples of the entropy, E[H p], in nats: the aleatoric part.

    Args:
        log_probs: Shape (M, B, C), natural log, ``-inf`` allowed.

    Returns:
        Shape (B,), in [0, log C]; never above the predictive entropy.
    """
    return torch.special.entr(log_probs.double().exp()).sum(dim=-1).mean(dim=0)


def mutual_information(log_probs: Float[Tensor, "M B C"]) -> Float[Tensor, " B"]:
    """Return H[E p] - E[H p] in nats (BALD): the epistemic part; higher is less known.

    It is exactly 0 for one sample, and biased low for few: the sampled mixture has only M
    components. Compare values, and set thresholds, at one M only.

    Args:
        log_probs: Shape (M, B, C), natural log, ``-inf`` allowed.

    Returns:
        Shape (B,), in [0, log min(M, C)]. Rounding below zero is cut off.

    Source:
        Houlsby et al. 2011, Bayesian active learning for classification, eq. (2).

    Example:
        >>> float(mutual_information(torch.tensor([[[0.5, 0.5]]]).log()))
        0.0
    """
    return (predictive_entropy(log_probs) - expected_entropy(log_probs)).clamp(min=0.0)


def normalized_entropy(
    log_probs: Float[Tensor, "M B C"], num_allowed: Int[Tensor, " B"] | None = None
) -> Float[Tensor, " B"]:
    """Return the predictive entropy divided by the log of the row's number of choices.

    Makes a question with 3 choices comparable to one with 26. A row with a single choice has
    nothing to be unsure about: 0.

    Args:
        log_probs: Shape (M, B, C), natural log, ``-inf`` allowed.
        num_allowed: Choices of each row, shape (B,), at least 1; None means all C labels.

    Returns:
        Shape (B,), in [0, 1].

    Raises:
        ValueError: If a row has less than one choice.
    """
    entropy = predictive_entropy(log_probs)  # (B,)
    if num_allowed is None:
        num_allowed = torch.full(entropy.shape, log_probs.shape[-1], device=log_probs.device)
    if bool((num_allowed < 1).any()):
        raise ValueError(f"num_allowed must be at least 1, got {int(num_allowed.min())}")
    largest = num_allowed.double().log()  # (B,)
    return torch.where(num_allowed > 1, entropy / largest, torch.zeros_like(entropy)).clamp(max=1.0)


def confidence(log_probs: Float[Tensor, "M B C"]) -> Float[Tensor, " B"]:
    """Return the largest probability of the mixture; higher is surer.

    Args:
        log_probs: Shape (M, B, C), natural log, ``-inf`` allowed.

    Returns:
        Shape (B,), in [1/C, 1].
    """
    return mean_probs(log_probs).amax(dim=-1)


def confidence_std(log_probs: Float[Tensor, "M B C"]) -> Float[Tensor, " B"]:
    """Return how far the samples disagree about the probability of the predicted label.

    Args:
        log_probs: Shape (M, B, C), natural log, ``-inf`` allowed.

    Returns:
        Shape (B,): population standard deviation over samples of p_m at the mixture's most
        probable label, in [0, 0.5]; 0 for one sample.
    """
    return _predicted_label_probs(log_probs).std(dim=0, correction=0)


def variation_ratio(log_probs: Float[Tensor, "M B C"]) -> Float[Tensor, " B"]:
    """Return the share of samples that prefer another label than the mixture does.

    A sample dissents when it gives some label a strictly larger probability than the mixture's
    most probable one, so an exact tie inside a sample is not dissent.

    Args:
        log_probs: Shape (M, B, C), natural log, ``-inf`` allowed.

    Returns:
        Shape (B,), in [0, 1]; a multiple of 1/M; higher is less agreed.
    """
    best = log_probs.double().exp().amax(dim=-1)  # (M, B)
    return (best > _predicted_label_probs(log_probs)).double().mean(dim=0)


def summarise(
    log_probs: Float[Tensor, "M B C"], num_allowed: Int[Tensor, " B"] | None = None
) -> UncertaintySummary:
    """Return every measure of this file for one batch.

    Args:
        log_probs: Shape (M, B, C), natural log, ``-inf`` allowed.
        num_allowed: Choices of each row, shape (B,); None means all C labels.

    Returns:
        The summary; tensors are float64 (``predicted``: int64) on the device of ``log_probs``.

    Raises:
        ValueError: If a row has less than one choice.
    """
    probs = mean_probs(log_probs)  # (B, C)
    return UncertaintySummary(
        mean_probs=probs,
        predicted=probs.argmax(dim=-1),
        confidence=probs.amax(dim=-1),
        confidence_std=confidence_std(log_probs),
        predictive_entropy=predictive_entropy(log_probs),
        expected_entropy=expected_entropy(log_probs),
        mutual_information=mutual_information(log_probs),
        normalized_entropy=normalized_entropy(log_probs, num_allowed),
        variation_ratio=variation_ratio(log_probs),
    )


def _predicted_label_probs(log_probs: Float[Tensor, "M B C"]) -> Float[Tensor, "M B"]:
    """Return each sample's probability of the mixture's most probable label, shape (M, B)."""
    predicted = mean_probs(log_probs).argmax(dim=-1)  # (B,)
    index = predicted.expand(log_probs.shape[0], -1).unsqueeze(-1)  # (M, B, 1)
    return log_probs.double().exp().gather(-1, index).squeeze(-1)  # (M, B)
