"""The scores of this package on many resamples of the rows at once.

A resample is written as counts: how often each row was drawn. Every function takes counts of shape
(R, n), whole numbers that add up to the same total in each resample, and returns the R values that
the plain function of the same name would give on the repeated rows. R = 1 and all counts 1 is the
plain function itself.
"""

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dalorra_core.metrics.calibration import bin_index

__all__ = [
    "Statistic",
    "one_by_one",
    "resampled_adaptive_ece",
    "resampled_augrc",
    "resampled_aurc",
    "resampled_auroc",
    "resampled_classwise_ece",
    "resampled_ece",
    "resampled_mean",
]

Statistic = Callable[..., Tensor]
"""Called with counts (R, n) and arrays whose first axis is n; returns (R,)."""

_NUM_BINS = 15


def resampled_mean(
    counts: Float[Tensor, "R n"], values: Float[Tensor, " n"] | Bool[Tensor, " n"]
) -> Float[Tensor, " R"]:
    """Return the mean of a value per row: NLL, accuracy and the Brier score are such means.

    Args:
        counts: Shape (R, n).
        values: One number a row, shape (n,). An infinite one makes every result infinite or NaN.

    Returns:
        Shape (R,), float64, in the unit of ``values``.
    """
    return counts @ values.double() / counts.sum(dim=1)


def resampled_ece(
    counts: Float[Tensor, "R n"],
    confidence: Float[Tensor, " n"],
    correct: Bool[Tensor, " n"] | Float[Tensor, " n"],
    num_bins: int = _NUM_BINS,
) -> Float[Tensor, " R"]:
    """Return ``ece``: same bins, edges included.

    Args:
        counts: Shape (R, n).
        confidence: Probability of the predicted label, shape (n,), in [0, 1].
        correct: Whether that label was right, shape (n,).
        num_bins: K, at least 1.

    Returns:
        Shape (R,), fractions.

    Raises:
        ConfigError: If ``num_bins`` is less than 1.
        ValueError: If there are no rows or a confidence is outside [0, 1] or NaN.
    """
    index, edges = bin_index(confidence, num_bins)  # (n,), (K + 1,)
    gap = correct.double() - confidence.double().clamp(0.0, 1.0)  # (n,)
    spread = torch.zeros(len(gap), len(edges), dtype=torch.float64)  # (n, K + 1)
    spread[torch.arange(len(gap)), index] = gap
    return (counts @ spread).abs().sum(dim=1) / counts.sum(dim=1)


def resampled_classwise_ece(
    counts: Float[Tensor, "R n"],
    probs: Float[Tensor, "n C"],
    labels: Int[Tensor, " n"],
    num_bins: int = _NUM_BINS,
) -> Float[Tensor, " R"]:
    """Return ``classwise_ece``; its cost grows with R n C K.

    Args:
        counts: Shape (R, n).
        probs: Mixture probabilities, shape (n, C), in [0, 1].
        labels: True label indices, shape (n,), in [0, C).
        num_bins: K, at least 1.

    Returns:
        Shape (R,), fractions.

    Raises:
        ConfigError: If ``num_bins`` is less than 1.
        ValueError: If there are no rows or a probability is outside [0, 1] or NaN.
    """
    total = torch.zeros(len(counts), dtype=torch.float64)
    for label in range(probs.shape[1]):
        total += resampled_ece(counts, probs[:, label], labels == label, num_bins)
    return total / probs.shape[1]


def resampled_adaptive_ece(
    counts: Float[Tensor, "R n"],
    confidence: Float[Tensor, " n"],
    correct: Bool[Tensor, " n"],
    num_bins: int = _NUM_BINS,
) -> Float[Tensor, " R"]:
    """Return ``adaptive_ece``, rows of equal confidence sharing their mean correctness.

    The rows sorted by confidence are cut at fixed places. The sum of (correct - confidence) over
    all rows before a place is linear inside a run of equal rows, so it is read off at each cut.

    Args:
        counts: Shape (R, n).
        confidence: Probability of the predicted label, shape (n,), in [0, 1].
        correct: Whether that label was right, shape (n,).
        num_bins: K, at least 1.

    Returns:
        Shape (R,), fractions.
    """
    order, ends = _runs(confidence)
    seen = _running(counts, order, ends)  # (R, G); rows up to and with each run
    right = _running(counts * correct.double(), order, ends).diff(dim=1, prepend=_zero(seen))
    size = seen.diff(dim=1, prepend=_zero(seen))  # (R, G)
    gap = right / size.clamp(min=1.0) - confidence.double().clamp(0.0, 1.0)[order][ends]  # (R, G)
    before = torch.cat([_zero(seen), (gap * size).cumsum(dim=1)], dim=1)  # (R, G + 1)
    start = torch.cat([_zero(seen), seen], dim=1)  # (R, G + 1)
    total = int(seen[0, -1])
    cut = torch.arange(num_bins + 1)
    places = (cut * (total // num_bins) + cut.clamp(max=total % num_bins)).double()  # (K + 1,)
    places = places.expand(len(counts), -1).contiguous()  # (R, K + 1)
    run = torch.searchsorted(seen, places)  # (R, K + 1); the run that holds the cut
    inside = (places - start.gather(1, run)) * gap.gather(1, run)
    upto = before.gather(1, run) + inside  # (R, K + 1)
    return upto.diff(dim=1).abs().sum(dim=1) / total


def resampled_auroc(
    counts: Float[Tensor, "R n"],
    scores: Float[Tensor, " n"],
    positive: Bool[Tensor, " n"],
) -> Float[Tensor, " R"]:
    """Return ``auroc`` of the positive rows' scores against the others'.

    Args:
        counts: Shape (R, n).
        scores: Shape (n,), finite.
        positive: Which rows should score high, shape (n,).

    Returns:
        Shape (R,), fractions; NaN where a resample has rows of one kind only.
    """
    wins, of_positive, of_negative = _wins(counts, scores, positive)
    return wins / (of_positive * of_negative)


def resampled_augrc(
    counts: Float[Tensor, "R n"],
    confidence: Float[Tensor, " n"],
    correct: Bool[Tensor, " n"],
) -> Float[Tensor, " R"]:
    """Return ``augrc`` by its closed form: wrong rows above right ones, and pairs of wrong rows.

    Args:
        counts: Shape (R, n).
        confidence: Shape (n,), finite; higher is surer.
        correct: Whether the answer was right, shape (n,).

    Returns:
        Shape (R,), fractions.
    """
    wins, wrong, right = _wins(counts, confidence, ~correct)
    return (wins + wrong.square() / 2) / (wrong + right).square()


def resampled_aurc(
    counts: Float[Tensor, "R n"],
    confidence: Float[Tensor, " n"],
    correct: Bool[Tensor, " n"],
) -> Float[Tensor, " R"]:
    """Return ``aurc``, ties averaged.

    Inside a run of m equal rows with error rate e, after K surer rows with E errors, the risks are
    (E + j e) / (K + j) for j = 1..m. They add up to m e + (E - e K) (H(K + m) - H(K)), with H the
    harmonic numbers.

    Args:
        counts: Shape (R, n).
        confidence: Shape (n,), finite; higher is surer.
        correct: Whether the answer was right, shape (n,).

    Returns:
        Shape (R,), fractions.
    """
    order, ends = _runs(-confidence)
    seen = _running(counts, order, ends)  # (R, G)
    errors = _running(counts * (~correct).double(), order, ends)  # (R, G)
    surer = torch.cat([_zero(seen), seen[:, :-1]], dim=1)  # K
    surer_errors = torch.cat([_zero(seen), errors[:, :-1]], dim=1)  # E
    here = errors - surer_errors  # m e
    rate = here / (seen - surer).clamp(min=1.0)  # e
    total = int(seen[0, -1])
    steps = torch.arange(1, total + 1, dtype=torch.float64)
    harmonic = torch.cat([torch.zeros(1, dtype=torch.float64), steps.reciprocal().cumsum(0)])
    span = harmonic[seen.long()] - harmonic[surer.long()]
    return (here + (surer_errors - rate * surer) * span).sum(dim=1) / total


def one_by_one(statistic: Callable[..., float]) -> Statistic:
    """Return any function of rows as a statistic of resamples: slow, one call for each.

    Args:
        statistic: Called with the repeated rows of each array, in order; returns a number.

    Example:
        >>> median = one_by_one(lambda values: float(values.median()))
        >>> median(torch.tensor([[1.0, 1.0, 1.0], [3.0, 0.0, 0.0]]), torch.tensor([1.0, 2.0, 9.0]))
        tensor([2., 1.], dtype=torch.float64)
    """

    def resampled(counts: Tensor, *arrays: Tensor) -> Tensor:
        rows = torch.arange(counts.shape[1])
        drawn = (rows.repeat_interleave(count.long()) for count in counts)
        values = [statistic(*(array[index] for array in arrays)) for index in drawn]
        return torch.tensor(values, dtype=torch.float64)

    return resampled


def _wins(
    counts: Float[Tensor, "R n"], scores: Float[Tensor, " n"], positive: Bool[Tensor, " n"]
) -> tuple[Float[Tensor, " R"], Float[Tensor, " R"], Float[Tensor, " R"]]:
    """Return pairs that a positive wins, a tie counting half, and the rows of either kind."""
    order, ends = _runs(scores)
    of_positive = _running(counts * positive.double(), order, ends)  # (R, G)
    of_negative = _running(counts * (~positive).double(), order, ends)  # (R, G)
    below = torch.cat([_zero(counts), of_negative[:, :-1]], dim=1)  # (R, G)
    here = of_positive.diff(dim=1, prepend=_zero(counts))  # (R, G)
    wins = (here * (below + of_negative)).sum(dim=1) / 2  # (R,)
    return wins, of_positive[:, -1], of_negative[:, -1]


def _runs(scores: Float[Tensor, " n"]) -> tuple[Int[Tensor, " n"], Int[Tensor, " G"]]:
    """Return the rising order of the rows and the last place of each run of equal scores."""
    ordered, order = scores.double().sort()  # (n,)
    last = torch.ones(len(ordered), dtype=torch.bool)
    last[:-1] = ordered[1:] != ordered[:-1]
    return order, last.nonzero().squeeze(1)


def _running(
    weights: Float[Tensor, "R n"], order: Int[Tensor, " n"], ends: Int[Tensor, " G"]
) -> Float[Tensor, "R G"]:
    """Return the sum of whole-numbered weights up to the end of each run; exact in float64."""
    return weights[:, order].cumsum(dim=1)[:, ends]


def _zero(like: Float[Tensor, "R any"]) -> Float[Tensor, "R 1"]:
    return like.new_zeros(len(like), 1)
