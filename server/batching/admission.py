"""Who may come in: a bounded number of requests, rows and padded tokens, counted before they cost.

A request first takes a permit (nothing is spent yet), then reserves its rows once they are known,
then its tokens once they are counted. A full queue is refused at the earliest step that can tell.
Used from the event loop only, so there is no lock.
"""

import math
from dataclasses import dataclass
from types import TracebackType
from typing import Literal, Self

__all__ = ["Admission", "AdmissionLimits", "Permit", "QueueFullError"]

Resource = Literal["requests", "rows", "tokens"]


@dataclass(frozen=True, slots=True)
class AdmissionLimits:
    """Bounds of the work that is inside the server, waiting or running.

    Attributes:
        max_requests: Requests holding a permit.
        max_rows: Rows of all of them.
        max_tokens: Padded tokens times samples of all of them.
        max_retry_after_s: Cap of the advice given to a refused client, in seconds.
    """

    max_requests: int
    max_rows: int
    max_tokens: int
    max_retry_after_s: int = 60


class QueueFullError(Exception):
    """There is no room now.

    Attributes:
        resource: Which bound was reached.
        limit: Its value.
        retry_after_s: Seconds after which the work now inside should be done, at least 1.
    """

    def __init__(self, resource: Resource, limit: int, retry_after_s: int) -> None:
        super().__init__(f"the queue is full: at most {limit} {resource} at a time")
        self.resource = resource
        self.limit = limit
        self.retry_after_s = retry_after_s


class Admission:
    """Counts what is inside: ``num_requests``, ``num_rows`` and ``num_tokens`` may be read."""

    def __init__(self, limits: AdmissionLimits) -> None:
        self.limits = limits
        self.num_requests = 0
        self.num_rows = 0
        self.num_tokens = 0
        self._tokens_per_s: float | None = None

    def enter(self) -> "Permit":
        """Return a permit for one more request.

        Raises:
            QueueFullError: One of the three bounds is reached already.
        """
        limits = self.limits
        if self.num_requests >= limits.max_requests:
            raise self._full("requests", limits.max_requests)
        if self.num_rows >= limits.max_rows:
            raise self._full("rows", limits.max_rows)
        if self.num_tokens >= limits.max_tokens:
            raise self._full("tokens", limits.max_tokens)
        self.num_requests += 1
        return Permit(self)

    def reserve_rows(self, num_rows: int) -> None:
        """Count rows in. A request larger than the whole bound may enter an empty server.

        Raises:
            QueueFullError: The rows do not fit beside those of other requests.
        """
        if self.num_rows and self.num_rows + num_rows > self.limits.max_rows:
            raise self._full("rows", self.limits.max_rows)
        self.num_rows += num_rows

    def reserve_tokens(self, num_tokens: int) -> None:
        """Count padded tokens in. A request larger than the bound may enter an empty server.

        Raises:
            QueueFullError: The tokens do not fit beside those of other requests.
        """
        if self.num_tokens and self.num_tokens + num_tokens > self.limits.max_tokens:
            raise self._full("tokens", self.limits.max_tokens)
        self.num_tokens += num_tokens

    def leave(self, num_rows: int, num_tokens: int) -> None:
        """Count one request and what it had reserved out again."""
        self.num_requests -= 1
        self.num_rows -= num_rows
        self.num_tokens -= num_tokens

    def observe_speed(self, num_tokens: int, duration_s: float) -> None:
        """Learn from a finished batch how many padded tokens a second the engine does.

        An exponential mean with weight 1/4 on the newest batch: follows a change of load within a
        few batches without believing a single one.
        """
        speed = num_tokens / max(duration_s, 1e-6)
        known = self._tokens_per_s
        self._tokens_per_s = speed if known is None else 0.75 * known + 0.25 * speed

    def retry_after_s(self) -> int:
        """Return the whole seconds until the work now inside should be done, at least 1.

        The measured speed times the reserved tokens; requests that have not counted their tokens
        yet are not in it. Before the first batch there is nothing to measure and 1 is returned.
        """
        if self._tokens_per_s is None:
            return 1
        seconds = math.ceil(self.num_tokens / self._tokens_per_s)
        return min(max(seconds, 1), self.limits.max_retry_after_s)

    def _full(self, resource: Resource, limit: int) -> QueueFullError:
        return QueueFullError(resource, limit, self.retry_after_s())


class Permit:
    """One admitted request; leaving the ``with`` block gives everything back exactly once."""

    def __init__(self, admission: Admission) -> None:
        self._admission = admission
        self._num_rows = 0
        self._num_tokens = 0

    def reserve_rows(self, num_rows: int) -> None:
        """See ``Admission.reserve_rows``."""
        self._admission.reserve_rows(num_rows)
        self._num_rows += num_rows

    def reserve_tokens(self, num_tokens: int) -> None:
        """See ``Admission.reserve_tokens``."""
        self._admission.reserve_tokens(num_tokens)
        self._num_tokens += num_tokens

    def __enter__(self) -> Self:
        """Hold the permit."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Give back the request, its rows and its tokens."""
        self._admission.leave(self._num_rows, self._num_tokens)
