"""Exact binomial bounds, and the bound on selective risk at an assumed out-of-scope share.

Counts may be arrays (one entry a threshold) and need not be whole: a planned sample size scales
the counts of another sample.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import betaincinv

from dalorra_core.errors import ConfigError

__all__ = [
    "Counts",
    "Floats",
    "clopper_pearson_lower",
    "clopper_pearson_upper",
    "risk_upper_bound",
    "selective_risk_at",
]

Floats = NDArray[np.float64]

_COVERAGE_SHARE = 0.05
"""Share of delta spent on the accepted in-scope share, the easiest of the three to bound."""


def clopper_pearson_upper(k: ArrayLike, n: ArrayLike, delta: float) -> Floats:
    """Return the upper bound on a probability, valid with confidence 1 - delta.

    Args:
        k: Successes, 0 to n.
        n: Trials; where it is 0 nothing is known and the bound is 1.
        delta: Chance that the bound is too low, strictly between 0 and 1.

    Returns:
        The p at which k or fewer successes have probability delta; in [0, 1].

    Source:
        Clopper and Pearson 1934; docs/method.md, eq. (9).

    Example:
        >>> float(clopper_pearson_upper(0, 100, 0.05).round(4))
        0.0295
    """
    _check_delta(delta)
    successes, trials = np.broadcast_arrays(np.asarray(k, float), np.asarray(n, float))
    failures = trials - successes
    bound = betaincinv(successes + 1, np.maximum(failures, 1e-12), 1 - delta)
    return np.where(failures > 0, bound, 1.0)


def clopper_pearson_lower(k: ArrayLike, n: ArrayLike, delta: float) -> Floats:
    """Return the lower bound on a probability, valid with confidence 1 - delta; see the upper."""
    successes, trials = np.broadcast_arrays(np.asarray(k, float), np.asarray(n, float))
    return 1.0 - clopper_pearson_upper(trials - successes, trials, delta)


@dataclass(frozen=True)
class Counts:
    """What thresholds accept, in scope and out of scope; arrays of equal shape, or numbers.

    Attributes:
        accepted: In-scope rows accepted.
        wrong: Those of them with a wrong label.
        n: In-scope rows.
        accepted_outside: Out-of-scope rows accepted, each an error.
        n_outside: Out-of-scope rows.
    """

    accepted: Floats
    wrong: Floats
    n: float
    accepted_outside: Floats
    n_outside: float

    def scaled(self, n: float, n_outside: float) -> "Counts":
        """Return the counts that other numbers of rows would show at the same rates."""
        inside = n / self.n if self.n else 0.0
        outside = n_outside / self.n_outside if self.n_outside else 0.0
        return Counts(
            self.accepted * inside,
            self.wrong * inside,
            n,
            self.accepted_outside * outside,
            n_outside,
        )


def selective_risk_at(counts: Counts, out_of_scope_share: float) -> Floats:
    """Return errors / accepted were this share of the questions out of scope; NaN if none accepted.

    Raises:
        ConfigError: If the share is not in [0, 1), or positive without out-of-scope rows.
    """
    _check_share(out_of_scope_share, counts.n_outside)
    inside, outside = _weights(counts, out_of_scope_share)
    accepted = inside * counts.accepted + outside * counts.accepted_outside
    errors = inside * counts.wrong + outside * counts.accepted_outside
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(accepted > 0, errors / accepted, np.nan)


def risk_upper_bound(
    counts: Counts, out_of_scope_share: float, delta: float, outside_share_of_delta: float = 0.5
) -> Floats:
    """Return an upper bound on selective risk, valid at one threshold with confidence 1 - delta.

    With pi the out-of-scope share, c and r the accepted share and the error rate among the accepted
    in scope, and g the accepted share out of scope, the risk is

        R = ((1 - pi) c r + pi g) / ((1 - pi) c + pi g),

    rising in r and g and falling in c. Each is bounded by itself at its part of delta and a union
    bound joins them. R also rises in pi, so the bound holds for every smaller share.

    Args:
        counts: What was seen on rows that played no part in choosing the threshold.
        out_of_scope_share: pi, in [0, 1). With 0 all of delta goes to r, and R is r.
        delta: Chance that the bound is too low.
        outside_share_of_delta: Part of delta spent on g, strictly between 0 and 1.

    Returns:
        In [0, 1]; 1 where nothing is accepted.

    Raises:
        ConfigError: If a number is outside its domain, or pi is positive without rows for g.

    Source:
        docs/method.md, eq. (10) and (11).
    """
    _check_share(out_of_scope_share, counts.n_outside)
    if out_of_scope_share == 0:
        return clopper_pearson_upper(counts.wrong, counts.accepted, delta)
    rest = delta * (1 - _COVERAGE_SHARE)
    outside = clopper_pearson_upper(
        counts.accepted_outside, counts.n_outside, rest * outside_share_of_delta
    )
    wrong = clopper_pearson_upper(
        counts.wrong, counts.accepted, rest * (1 - outside_share_of_delta)
    )
    covered = clopper_pearson_lower(counts.accepted, counts.n, delta * _COVERAGE_SHARE)
    inside_part = (1 - out_of_scope_share) * covered
    outside_part = out_of_scope_share * outside  # > 0: a binomial upper bound is never 0
    return (inside_part * wrong + outside_part) / (inside_part + outside_part)


def _weights(counts: Counts, out_of_scope_share: float) -> tuple[float, float]:
    outside = out_of_scope_share / counts.n_outside if out_of_scope_share else 0.0
    return (1 - out_of_scope_share) / counts.n, outside


def _check_delta(delta: float) -> None:
    if not 0.0 < delta < 1.0:
        raise ConfigError(f"delta must lie strictly between 0 and 1, got {delta}")


def _check_share(out_of_scope_share: float, n_outside: float) -> None:
    if not 0.0 <= out_of_scope_share < 1.0:
        raise ConfigError(f"out_of_scope_share must be in [0, 1), got {out_of_scope_share}")
    if out_of_scope_share > 0 and not n_outside:
        raise ConfigError(
            f"out_of_scope_share {out_of_scope_share:g} needs out-of-scope rows, got none; "
            "add some, or declare a share of 0"
        )
