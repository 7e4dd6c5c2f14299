"""How often each key may ask: a moving window per key, in memory, on the monotonic clock.

`limits` reads the rates and judges the windows. Its own memory storage is not used: it lives by the
wall clock, which may jump, and starts a thread for nearly every hit.
"""

import math
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from limits import RateLimitItem, parse
from limits.storage import MovingWindowSupport, Storage
from limits.strategies import MovingWindowRateLimiter

__all__ = ["Allowance", "KeyRates", "parse_rate"]

MAX_AMOUNT = 1_000_000  # of times kept per key: eight megabytes


def parse_rate(text: str) -> RateLimitItem:
    """Return a rate such as ``600/minute`` or ``5 per 2 seconds``.

    Raises:
        ValueError: It is no rate, or one with an amount that is not between 1 and 1,000,000.
    """
    try:
        rate = parse(text)
    except ValueError:
        raise ValueError("must be a rate such as 600/minute or 10/second") from None
    if not 1 <= rate.amount <= MAX_AMOUNT or rate.get_expiry() < 1:
        raise ValueError(f"must allow between 1 and {MAX_AMOUNT} requests in a second or longer")
    return rate


@dataclass(frozen=True, slots=True)
class Allowance:
    """What a key's rate said about one request.

    Attributes:
        allowed: Whether the request may pass; it then has been counted.
        limit: Requests in one window.
        window_s: Length of the window, in seconds.
        remaining: Requests that may still follow at once.
        reset_s: Seconds until the oldest counted request leaves the window and makes room.
    """

    allowed: bool
    limit: int
    window_s: int
    remaining: int
    reset_s: float

    @property
    def headers(self) -> dict[str, str]:
        """Return the response headers that tell the client, whole seconds rounded up."""
        reset_s = max(1, math.ceil(self.reset_s))
        told = {
            "RateLimit-Policy": f'"key";q={self.limit};w={self.window_s}',
            "RateLimit": f'"key";r={self.remaining};t={reset_s}',
        }
        return told if self.allowed else told | {"Retry-After": str(reset_s)}


class KeyRates:
    """The windows of all keys.

    Args:
        clock: Seconds on the monotonic clock.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._limiter = MovingWindowRateLimiter(_MonotonicWindows(clock))

    def take(self, key_id: str, rate: RateLimitItem) -> Allowance:
        """Count one request of a key if its rate allows it, and say how it stands."""
        allowed = self._limiter.hit(rate, key_id)
        stats = self._limiter.get_window_stats(rate, key_id)
        return Allowance(
            allowed=allowed,
            limit=rate.amount,
            window_s=rate.get_expiry(),
            remaining=max(0, stats.remaining),
            reset_s=stats.reset_time - self._clock(),
        )


class _MonotonicWindows(Storage, MovingWindowSupport):
    """Times of the requests in each window, oldest first; used on the event loop only."""

    STORAGE_SCHEME = None

    def __init__(self, clock: Callable[[], float]) -> None:
        super().__init__()
        self._clock = clock
        self._times: dict[str, deque[float]] = {}

    def acquire_entry(self, key: str, limit: int, expiry: int, amount: int = 1) -> bool:
        """Add ``amount`` requests to a window unless it would then hold more than ``limit``."""
        times = self._current(key, expiry)
        if len(times) + amount > limit:
            return False
        times.extend([self._clock()] * amount)
        return True

    def get_moving_window(self, key: str, limit: int, expiry: int) -> tuple[float, int]:  # noqa: ARG002
        """Return the time of the oldest request in a window, and their number."""
        times = self._current(key, expiry)
        return (times[0] if times else self._clock()), len(times)

    def _current(self, key: str, expiry: int) -> deque[float]:
        times = self._times.setdefault(key, deque())
        begin_s = self._clock() - expiry
        while times and times[0] <= begin_s:
            times.popleft()
        return times

    def clear(self, key: str) -> None:
        """Forget a window."""
        self._times.pop(key, None)

    def reset(self) -> int:
        """Forget every window; return how many there were."""
        number = len(self._times)
        self._times.clear()
        return number

    def check(self) -> bool:
        """Return True: there is nothing that could be away."""
        return True

    @property
    def base_exceptions(self) -> type[Exception]:
        """Return what a storage's own faults would be; this one has none."""
        return ValueError

    # counters of fixed windows, which nothing here uses

    def incr(self, key: str, expiry: int, amount: int = 1) -> int:
        """Not supported."""
        raise NotImplementedError

    def get(self, key: str) -> int:
        """Not supported."""
        raise NotImplementedError

    def get_expiry(self, key: str) -> float:
        """Not supported."""
        raise NotImplementedError
