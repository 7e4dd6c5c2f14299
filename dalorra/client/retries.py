"""When to try again: backoff with full jitter, never before the server said."""

import email.utils
import random
from collections.abc import Mapping
from dataclasses import dataclass, field

__all__ = ["Retries", "read_retry_after"]

_MAX_DIGITS = 9  # of seconds; more are decades


@dataclass(frozen=True)
class Retries:
    """How often and how soon a call is tried again.

    Only what is safe and may help is repeated: 429, 503, and connections that failed before an
    answer, here or between a proxy and its server. Asking twice does no harm: answers change
    nothing, and a label is stored once.

    Attributes:
        max_attempts: Times that a request is sent at most, at least 1.
        base_s: Longest wait after the first attempt, in seconds; it doubles with every further one.
        cap_s: Longest wait of all, in seconds, unless the server asks for more.
        stream: Where the jitter comes from.
    """

    max_attempts: int = 5
    base_s: float = 0.25
    cap_s: float = 8.0
    stream: random.Random = field(default_factory=random.Random, repr=False)

    def __post_init__(self) -> None:
        if self.max_attempts < 1:
            raise ValueError(f"max_attempts must be at least 1, got {self.max_attempts}")
        if not 0 <= self.base_s <= self.cap_s:
            raise ValueError(
                f"base_s and cap_s must satisfy 0 <= base_s <= cap_s, got {self.base_s} and "
                f"{self.cap_s}"
            )

    def wait_s(self, attempt: int, retry_after_s: float | None) -> float:
        """Return how long to wait after a failed attempt, in seconds.

        Args:
            attempt: Number of the attempt, from 1.
            retry_after_s: What the server asked for; it is the least, and up to ``base_s`` more
                keeps all who were told the same from coming at once.
        """
        if retry_after_s is not None:
            return retry_after_s + self.stream.uniform(0, self.base_s)
        doublings = min(attempt - 1, 64)
        return self.stream.uniform(0, min(self.cap_s, self.base_s * 2.0**doublings))


def read_retry_after(headers: Mapping[str, str], now_s: float) -> float | None:
    """Return the seconds that ``Retry-After`` asks for; None when it is missing or not to be read.

    Args:
        headers: By lower-case name. A date is taken relative to ``Date``, as clocks differ.
        now_s: Seconds since 1970, for answers without ``Date``.

    Example:
        >>> read_retry_after({"retry-after": "3"}, now_s=0)
        3.0
        >>> read_retry_after({"retry-after": "Thu, 01 Jan 1970 00:01:00 GMT"}, now_s=50)
        10.0
    """
    value = headers.get("retry-after", "").strip()
    if value.isascii() and value.isdecimal():
        return float(value) if len(value) <= _MAX_DIGITS else None
    until_s = _seconds(value)
    if until_s is None:
        return None
    sent_s = _seconds(headers.get("date", ""))
    return max(until_s - (now_s if sent_s is None else sent_s), 0.0)


def _seconds(date: str) -> float | None:
    try:
        return email.utils.parsedate_to_datetime(date).timestamp()
    except (ValueError, OverflowError):
        return None
