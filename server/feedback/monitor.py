"""Does a certificate still hold? A test on the true labels that stays valid at every look.

An ordinary test is valid for one look at a number of labels that was fixed before. Feedback comes
in by and by and is looked at with every scrape, so this one bounds the chance of ever being wrong.
"""

import contextlib
import math
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future

from scipy.special import betaincc, betaln

from server.feedback.errors import FeedbackUnavailableError
from server.feedback.store import FeedbackStore, RiskCount
from server.ports import FeedbackRisk

__all__ = ["DELTA", "RiskMonitor", "assess", "log_e_value", "risk_lower_bound"]

DELTA = 0.1
MAX_DELTA = 1 / math.e
MAX_AGE_S = 5.0
_BISECTIONS = 60


def log_e_value(n: int, wrong: int, target_risk: float) -> float:
    r"""Return the evidence, as a logarithm, that the risk is above its target.

    With p the target, k errors among n answers and L(q) = q^k (1-q)^(n-k), the e-value is the
    likelihood ratio of q to p, averaged over all q above p:

    .. math:: E = \frac{1}{1-p} \int_p^1 \frac{L(q)}{L(p)} \, dq
                = \frac{B(k+1, n-k+1) \, (1 - I_p(k+1, n-k+1))}{(1-p) \, p^k (1-p)^{n-k}}

    Why E >= 1/delta contradicts "the risk is at most p" with an error of at most delta, at
    whatever time one looks. Let the next answer be wrong with probability r <= p, given all before
    it. It multiplies the ratio of q by q/p if it is wrong and by (1-q)/(1-p) if not: on average by
    m(r) = r q/p + (1-r)(1-q)/(1-p). For q > p the first factor is the larger, so m increases with
    r; and m(p) = q + 1 - q = 1. Hence m(r) <= 1 for every r <= p: each ratio is a non-negative
    supermartingale that starts at 1, and so is their average E (Tonelli). By Ville's inequality
    the chance that E ever reaches 1/delta is at most delta. Neither equal risks nor independence
    of the answers is needed, only that none is wrong with probability above p given the past.

    Args:
        n: Accepted answers with a true label, in the order in which they came; at least 0.
        wrong: Those that were wrong, 0 to n.
        target_risk: p, strictly between 0 and 1.

    Returns:
        ln E; 0 without data, minus infinity where E is too small for a float.

    Source:
        Ville (1939); mixture of likelihood ratios: Robbins (1970), Ann. Math. Statist. 41(5).

    Example:
        >>> abs(log_e_value(0, 0, 0.05)) < 1e-12
        True
        >>> log_e_value(100, 20, 0.05) > math.log(1 / 0.1)
        True
    """
    if not 0.0 < target_risk < 1.0:
        raise ValueError(f"target_risk must lie strictly between 0 and 1, got {target_risk}")
    right = n - wrong
    tail = float(betaincc(wrong + 1, right + 1, target_risk))
    if tail == 0.0:  # nearly all that was seen speaks for a risk below the target
        return -math.inf
    log_mean = float(betaln(wrong + 1, right + 1)) + math.log(tail) - math.log1p(-target_risk)
    return log_mean - wrong * math.log(target_risk) - right * math.log1p(-target_risk)


def risk_lower_bound(n: int, wrong: int, delta: float = DELTA) -> float:
    """Return the lower confidence bound on the risk: the smallest one that is not contradicted.

    The true risk r is itself contradicted at some time with probability at most delta (see
    ``log_e_value``), so the bound ever exceeds r with probability at most delta. E falls as the
    target rises wherever E >= e: its logarithm has the slope (1 - 1/E)/(1-p) - (k - n p)/(p(1-p)),
    negative for p <= k/(n+1), and above k/(n+1) no likelihood ratio exceeds e. That is why delta
    must not exceed 1/e, and why bisection finds the bound.

    Args:
        n: Accepted answers with a true label.
        wrong: Those that were wrong, 0 to n.
        delta: Chance that the bound is ever above the risk; in (0, 1/e].

    Returns:
        A risk in [0, wrong/n]; 0 without errors.

    Example:
        >>> risk_lower_bound(50, 0)
        0.0
        >>> 0.05 < risk_lower_bound(100, 20) < 0.2
        True
    """
    if not 0.0 < delta <= MAX_DELTA:
        raise ValueError(f"delta must lie in (0, 1/e], got {delta}")
    if wrong == 0:
        return 0.0
    enough = -math.log(delta)
    low, high = 0.0, wrong / n
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        if log_e_value(n, wrong, middle) >= enough:
            low = middle
        else:
            high = middle
    return low


def assess(count: RiskCount, delta: float = DELTA) -> FeedbackRisk:
    """Return what the counted answers say about their certificate."""
    evidence = log_e_value(count.n, count.wrong, count.target_risk)
    return FeedbackRisk(
        adapter=count.adapter,
        revision=count.revision,
        policy=count.policy,
        target_risk=count.target_risk,
        n=count.n,
        wrong=count.wrong,
        risk_lower_bound=risk_lower_bound(count.n, count.wrong, delta),
        violated=evidence >= -math.log(delta),
    )


class RiskMonitor:
    """The newest assessment of every policy, read without waiting.

    A read returns what is known and, when that is old, has a thread find out again; so a scrape
    never waits for the database and shows what was true at the scrape before. While the database
    is away nothing new can have come in, and what was known stays.

    Args:
        store: Where the labels are.
        delta: Chance of a false alarm, for each policy, over all time.
        max_age_s: Age from which a read asks the database again.
        clock: Seconds on a monotonic clock.
    """

    def __init__(
        self,
        store: FeedbackStore,
        *,
        delta: float = DELTA,
        max_age_s: float = MAX_AGE_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store = store
        self._delta = delta
        self._max_age_s = max_age_s
        self._clock = clock
        self._lock = threading.Lock()
        self._known: tuple[FeedbackRisk, ...] = ()
        self._known_at = -math.inf
        self._refresh: Future[None] | None = None

    def read(self) -> Iterable[FeedbackRisk]:
        """Return the newest assessments; nothing before the first refresh is done."""
        now = self._clock()
        with self._lock:
            running = self._refresh is not None and not self._refresh.done()
            if now - self._known_at >= self._max_age_s and not running:
                self._refresh = self._store.submit(self.refresh)
            return self._known

    def refresh(self) -> None:
        """Ask the database; called in a thread."""
        known = None
        with contextlib.suppress(FeedbackUnavailableError):  # logged by the store
            known = tuple(assess(count, self._delta) for count in self._store.risk_counts())
        with self._lock:
            self._known = self._known if known is None else known
            self._known_at = self._clock()
