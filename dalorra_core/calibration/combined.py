"""One score from several: the estimated probability that an answer is right and in scope."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dalorra_core.artifact.calibration_record import CombinedScore, ScoreName
from dalorra_core.errors import ConfigError, DataError

__all__ = ["FEATURES", "check_fitting", "combined_score", "fit_combined"]

_TINY = 1e-6
"""Keeps logarithms finite: a float32 probability carries no more digits than this."""

Scores = Mapping[ScoreName, Tensor]

FEATURES: dict[str, tuple[ScoreName, Callable[[Tensor], Tensor]]] = {
    "logit_confidence": ("confidence", lambda x: torch.logit(x.clamp(_TINY, 1 - _TINY))),
    "predictive_entropy": ("predictive_entropy", lambda x: x),
    "log_mutual_information": ("mutual_information", lambda x: (x.clamp(min=0) + _TINY).log()),
    "log_label_mass": ("label_mass", lambda x: (x + _TINY).log()),
}
"""Feature name -> the score it is made of, and how."""

_STRENGTH = 1.0
"""Inverse of the L2 penalty on standardised features; weak beside hundreds of rows."""

_FEWEST = 20
"""Rows of each kind below which four weights would be noise."""


def combined_score(combined: CombinedScore, scores: Scores) -> Tensor:
    """Return the combined score of rows, shape (n,), in [0, 1]; higher is surer.

    Raises:
        ConfigError: If a score it was fitted on is missing.
    """
    total = torch.tensor(combined.bias, dtype=torch.float64)
    for feature, weight in combined.weights.items():
        name, make = FEATURES[feature]
        if name not in scores:
            raise ConfigError(f"the combined score needs {name}, which these answers do not have")
        total = total + weight * make(scores[name].double())
    return torch.sigmoid(total)


def fit_combined(
    scores: Scores, correct: Tensor, outside: Tensor, out_of_scope_share: float
) -> CombinedScore:
    """Fit the combined score by logistic regression.

    Rows are weighted so that out-of-scope rows have the share they are declared to have. The fit
    needs no guarantee of its own: a certificate holds for any score chosen before the certify part
    is looked at.

    Args:
        scores: Scores of the n fit rows; features whose score is missing are left out.
        correct: (n,) whether each answer is right (False out of scope).
        outside: (n,) whether each row is out of scope.
        out_of_scope_share: pi, in [0, 1).

    Raises:
        DataError: If there are too few right or too few wrong answers to learn from.
        ConfigError: If scikit-learn is not installed.
    """
    regression = _logistic_regression()
    weights = _weights(outside, out_of_scope_share)
    used = weights > 0  # none out of scope when none are declared
    hits = correct.numpy()[used]
    right = int(hits.sum())
    if min(right, len(hits) - right) < _FEWEST:
        raise DataError(
            f"a combined score needs at least {_FEWEST} right and {_FEWEST} wrong answers in the "
            f"fit part, got {right} and {len(hits) - right}"
        )
    names = [name for name, (score, _) in FEATURES.items() if score in scores]
    columns = [FEATURES[name][1](scores[FEATURES[name][0]].double()) for name in names]
    x = torch.stack(columns, dim=1).numpy()[used]  # (rows, features)
    mean, scale = x.mean(0), x.std(0) + _TINY
    model = regression(C=_STRENGTH, max_iter=1000)
    model.fit((x - mean) / scale, hits, sample_weight=weights[used])
    slopes = np.asarray(model.coef_)[0] / scale
    bias = float(np.asarray(model.intercept_)[0] - (slopes * mean).sum())
    return CombinedScore(
        bias=bias,
        weights={name: float(w) for name, w in zip(names, slopes, strict=True)},
        n=len(hits),
    )


def check_fitting() -> None:
    """Raise ConfigError where no score can be fitted, before a row is answered."""
    _logistic_regression()


def _logistic_regression() -> Any:
    try:
        from sklearn.linear_model import LogisticRegression  # noqa: PLC0415 - an optional extra
    except ImportError:
        raise ConfigError(
            "the combined score needs scikit-learn: pip install 'dalorra[calibrate]', or choose "
            "another --score"
        ) from None
    return LogisticRegression


def _weights(outside: Tensor, out_of_scope_share: float) -> np.ndarray:
    flags = outside.numpy()
    n, n_outside = len(flags), int(flags.sum())
    if not n_outside or out_of_scope_share == 0:
        return np.where(flags, 0.0, 1.0) if n_outside else np.ones(n)
    return np.where(
        flags, out_of_scope_share * n / n_outside, (1 - out_of_scope_share) * n / (n - n_outside)
    )
