"""Split-conformal prediction sets: the right label is in them with a chosen probability."""

import math
from typing import Literal

import torch
from torch import Tensor

from dalorra_core.artifact.calibration_record import PredictionSets
from dalorra_core.errors import ConfigError, DataError

__all__ = ["fewest_rows", "fit_prediction_sets", "members"]

Kind = Literal["lac", "aps"]


def fewest_rows(alpha: float) -> int:
    """Return how many rows a set of this alpha needs at least.

    Example:
        >>> fewest_rows(0.05)
        19
    """
    if not 0.0 < alpha < 1.0:
        raise ConfigError(f"alpha must lie strictly between 0 and 1, got {alpha}")
    n = max(1, math.ceil(1 / alpha) - 2)
    while _rank(n, alpha) > n:
        n += 1
    return n


def fit_prediction_sets(
    kind: Kind, alpha: float, certify: tuple[Tensor, Tensor], held_out: tuple[Tensor, Tensor]
) -> PredictionSets:
    """Return the rule whose sets hold the right label of an in-scope question with 1 - alpha.

    Args:
        kind: ``lac`` or ``aps``.
        alpha: Share of questions whose right label may be missing, strictly between 0 and 1.
        certify: Probabilities (n, C) and labels (n,) of in-scope rows the quantile is taken from.
        held_out: The same of other rows; coverage and size are measured there.

    Raises:
        ConfigError: If alpha is outside its domain.
        DataError: If there are too few rows for this alpha.

    Source:
        Sadinle et al. 2019 (LAC); Romano et al. 2020 (APS, here without randomness);
        docs/method.md, eq. (16) to (18).
    """
    probs, labels = certify
    n, needed = len(labels), fewest_rows(alpha)
    if n < needed:
        raise DataError(
            f"prediction sets with alpha {alpha:g} need at least {needed} in-scope rows in the "
            f"certify part, got {n}"
        )
    scores = _scores(kind, probs).gather(1, labels.unsqueeze(1)).squeeze(1)  # (n,)
    quantile = float(scores.sort().values[_rank(n, alpha) - 1])
    rule = PredictionSets(
        kind=kind, alpha=alpha, quantile=quantile, n=n, empirical_coverage=0.0, mean_size=0.0
    )
    inside = members(rule, held_out[0])  # (m, C)
    hits = inside.gather(1, held_out[1].unsqueeze(1))
    return rule.model_copy(
        update={
            "empirical_coverage": float(hits.double().mean()),
            "mean_size": float(inside.sum(1).double().mean()),
        }
    )


def members(rule: PredictionSets, probs: Tensor) -> Tensor:
    """Return which labels are in the set of each row, shape (n, C), bool.

    A lac set may be empty: no label is probable enough. An aps set never is.

    Args:
        rule: From ``fit_prediction_sets``.
        probs: (n, C) probabilities under the calibrated predictive.
    """
    return _scores(rule.kind, probs) <= rule.quantile


def _scores(kind: Kind, probs: Tensor) -> Tensor:
    """Return how unlikely each label would be as the right one, shape (n, C), float64.

    lac: 1 - p. aps: the sum of the probabilities of the labels that are more probable. Romano et
    al. take a random part of the label's own probability off as well, and on average get somewhat
    smaller sets; here the same question has the same set every time.
    """
    p = probs.double()
    if kind == "lac":
        return 1.0 - p
    ordered, order = p.sort(dim=-1, descending=True, stable=True)
    before = torch.nn.functional.pad(ordered.cumsum(-1)[..., :-1], (1, 0))
    return torch.empty_like(p).scatter_(-1, order, before)


def _rank(n: int, alpha: float) -> int:
    """Return k = ceil((n + 1)(1 - alpha)), free of the rounding of 1 - alpha."""
    return math.ceil((n + 1) * (1 - alpha) - 1e-9)
