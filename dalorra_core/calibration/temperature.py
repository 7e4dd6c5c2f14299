"""Fit a softmax temperature, and keep it only where it helps on other rows."""

import math

from scipy.optimize import OptimizeResult, minimize_scalar
from torch import Tensor

from dalorra_core.artifact.calibration_record import TemperatureFit
from dalorra_core.errors import DataError
from dalorra_core.metrics.calibration import nll
from dalorra_core.metrics.uncertainty import log_mean_probs
from dalorra_core.predictive.tempering import temper

__all__ = ["LARGEST_TEMPERATURE", "fit_temperature", "mixture_nll"]

LARGEST_TEMPERATURE = 20.0
"""Temperatures from 1/20 to 20 are looked at; a useful one is far from either end."""

_TOLERANCE = 1e-4
"""On ln T: finer than any calibration set can tell."""


def mixture_nll(log_probs: Tensor, labels: Tensor, temperature: float) -> float:
    """Return the NLL of the average over samples of the tempered probabilities.

    Args:
        log_probs: (M, n, C).
        labels: (n,) in scope.
        temperature: Above 0.

    Returns:
        Nats per row.
    """
    return nll(log_mean_probs(temper(log_probs.double(), temperature)), labels)


def fit_temperature(
    log_probs: Tensor, labels: Tensor, fit: Tensor, held_out: Tensor
) -> TemperatureFit:
    """Fit T on the in-scope rows of one part and judge it on those of another.

    Args:
        log_probs: (M, n, C) of the predictive that will be served, not tempered.
        labels: (n,), -1 for out of scope.
        fit: (n,) rows to fit on.
        held_out: (n,) other rows to judge on.

    Returns:
        ``value`` is the fitted temperature where it lowers the NLL of the held-out rows, else 1.

    Raises:
        DataError: If either part has no in-scope row.

    Source:
        docs/method.md, eq. (14) and (15).
    """
    inside = labels >= 0
    fit, held_out = fit & inside, held_out & inside
    for name, chosen in (("fit", fit), ("select", held_out)):
        if not bool(chosen.any()):
            raise DataError(f"the temperature needs in-scope rows in the {name} part, got none")
    bound = math.log(LARGEST_TEMPERATURE)
    found: OptimizeResult = minimize_scalar(  # pyright: ignore[reportAssignmentType]
        lambda x: mixture_nll(log_probs[:, fit], labels[fit], math.exp(x)),
        bounds=(-bound, bound),
        method="bounded",
        options={"xatol": _TOLERANCE},
    )
    fitted = math.exp(float(found.x))
    before = mixture_nll(log_probs[:, held_out], labels[held_out], 1.0)
    after = mixture_nll(log_probs[:, held_out], labels[held_out], fitted)
    kept = after < before
    return TemperatureFit(
        value=fitted if kept else 1.0,
        fitted=fitted,
        kept=kept,
        nll_before=before,
        nll_after=after,
        n_fit=int(fit.sum()),
        n_held_out=int(held_out.sum()),
    )
