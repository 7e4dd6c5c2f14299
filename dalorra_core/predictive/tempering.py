"""Softmax temperature, which softens or sharpens every sample; and the mean of their logits."""

from dataclasses import replace

from torch import Tensor

from dalorra_core.predictive.scoring import Prediction

__all__ = ["pooled", "temper", "tempered"]


def temper(log_probs: Tensor, temperature: float) -> Tensor:
    """Return log-probabilities of logits divided by a temperature.

    Log-probabilities are logits up to a constant, so dividing them and normalising again is the
    same. Each sample is tempered by itself; the average is taken afterwards.

    Args:
        log_probs: (..., C), normalised; -inf stays -inf.
        temperature: Above 0; above 1 softens.

    Returns:
        (..., C) in the same dtype; the very input at temperature 1.

    Source:
        Guo et al. 2017, On calibration of modern neural networks, section 4.2; docs/method.md,
        eq. (14).
    """
    if temperature == 1.0:
        return log_probs
    return (log_probs / temperature).log_softmax(-1)


def tempered(prediction: Prediction, temperature: float) -> Prediction:
    """Return a prediction with every sample tempered; the label mass is not touched."""
    return replace(prediction, log_probs=temper(prediction.log_probs, temperature))


def pooled(prediction: Prediction) -> Prediction:
    """Return one answer for each row, the softmax of the mean logits of all samples.

    That is the normalised geometric mean of their probabilities: what the samples agree on, with
    nothing left of their disagreement.
    """
    mean = prediction.log_probs.mean(0, keepdim=True)  # logits up to a constant; -inf stays -inf
    return replace(prediction, log_probs=mean.log_softmax(-1))
