"""What the calibration rows look like, in the server's histogram buckets: the zero of drift."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from dalorra_core.artifact.calibration_record import (
    HIGHER_IS_SURER,
    ReferenceProfile,
    ScoreName,
    ScoreReference,
)
from dalorra_core.calibration.decisions import Decisions
from dalorra_core.calibration.scores import ScoreTable

__all__ = [
    "CONFIDENCE_EDGES",
    "ENTROPY_EDGES",
    "LABEL_MASS_EDGES",
    "MUTUAL_INFORMATION_EDGES",
    "SMALLEST_BIN_SHARE",
    "confidence_bins",
    "reference_profile",
]

# The server's histograms have the same edges (a test compares them): a reference on others would
# measure the difference of the edges.
CONFIDENCE_EDGES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 1.0)
ENTROPY_EDGES = (0.01, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
MUTUAL_INFORMATION_EDGES = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
LABEL_MASS_EDGES = (0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 0.999, 1.0)

_EDGES: dict[ScoreName, tuple[float, ...]] = {
    "confidence": CONFIDENCE_EDGES,
    "predictive_entropy": ENTROPY_EDGES,
    "mutual_information": MUTUAL_INFORMATION_EDGES,
    "label_mass": LABEL_MASS_EDGES,
}

SMALLEST_BIN_SHARE = 0.02
"""PSI divides by the reference share: a nearly empty bin would make it all noise."""

_DECILES = torch.arange(1, 10, dtype=torch.float64) / 10


def reference_profile(
    table: ScoreTable, decisions: Decisions, labels: Sequence[str], num_choices: Tensor
) -> ReferenceProfile:
    """Return the distribution of scores, labels and decisions over the calibration rows.

    Args:
        table: All calibration rows.
        decisions: Of the adapter's first policy on them.
        labels: Label names in label order.
        num_choices: (n,) labels that each row may have; entropies are divided by its logarithm.
    """
    scores: dict[str, ScoreReference] = {}
    for name, edges in _EDGES.items():
        if name in table.scores:
            values = table.scores[name]
            if not HIGHER_IS_SURER[name]:  # in nats: at most ln C
                values = (values / num_choices.double().log()).clamp(max=1.0)
            scores[name] = _score_reference(values, edges)
    inner, shares = confidence_bins(table.score("confidence"))
    counts = torch.bincount(table.predicted, minlength=len(labels)).double() / len(table)
    return ReferenceProfile(
        n=len(table),
        n_out_of_scope=int(table.outside.sum()),
        scores=scores,
        confidence_bin_edges=inner,
        confidence_bin_shares=shares,
        labels=dict(zip(labels, counts.tolist(), strict=True)),
        decisions=decisions.shares(),
    )


def confidence_bins(values: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return inner edges and shares of bins of about a tenth of the rows each.

    A saturated model gives the same confidence to many rows, so that deciles coincide. Every bin
    has at least a 2 % share; a smaller one is merged with the smaller of its neighbours.

    Args:
        values: (n,) confidences, n >= 1.

    Returns:
        k - 1 ascending edges and k shares; a value is in the bin of the number of edges <= it.

    Example:
        >>> confidence_bins(torch.tensor([0.2, 0.4, 1.0, 1.0], dtype=torch.float64))
        ((0.4, 1.0), (0.25, 0.25, 0.5))
    """
    values = values.double()
    deciles = values.quantile(_DECILES, interpolation="higher").unique().tolist()
    edges = [edge for edge in deciles if edge > float(values.min())]
    counts = _bin_counts(values, edges)
    least = SMALLEST_BIN_SHARE * len(values)
    while len(counts) > 1 and min(counts) < least:
        small = counts.index(min(counts))
        left, right = small - 1, small + 1
        take_left = right == len(counts) or (left >= 0 and counts[left] <= counts[right])
        del edges[left if take_left else small]
        counts = _bin_counts(values, edges)
    return tuple(edges), tuple(count / len(values) for count in counts)


def _bin_counts(values: Tensor, edges: list[float]) -> list[int]:
    bins = torch.bucketize(values, torch.tensor(edges, dtype=torch.float64), right=True)
    return torch.bincount(bins, minlength=len(edges) + 1).tolist()


def _score_reference(values: Tensor, edges: tuple[float, ...]) -> ScoreReference:
    ordered = values.sort().values
    below = torch.searchsorted(ordered, torch.tensor(edges, dtype=torch.float64), right=True)
    deciles = ordered.quantile(_DECILES)
    if not all(math.isfinite(value) for value in deciles.tolist()):
        raise ValueError("scores must be finite numbers")
    return ScoreReference(
        edges=edges,
        cdf=tuple((below.double() / len(ordered)).tolist()),
        deciles=tuple(deciles.tolist()),
    )
