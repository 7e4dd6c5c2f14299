"""Who may come in: a bounded number of requests, rows and padded tokens, counted before they cost.

A request first takes a permit (nothing is spent yet), then reserves its rows once they are known,
then its tokens once they are counted. A full queue is refused at the earliest step that can tell.
Work of priority ``batch`` may hold a share of each bound only, so that interactive work finds room.
Whoever would spend most of its deadline in the queue is refused as well: an answer that comes too
late has cost as much as one in time.
Used from the event loop, but for ``observe_speed``, so there is no lock.
"""

import math
from dataclasses import dataclass
from types import TracebackType
from typing import Literal, Self

from server.ports import Priority

__all__ = ["Admission", "AdmissionLimits", "Permit", "QueueFullError"]

Resource = Literal["requests", "rows", "tokens"]
MAX_WAIT = 0.5  # share of a deadline that the work inside may take before its own begins


@dataclass(frozen=True, slots=True)
class AdmissionLimits:
    """Bounds of the work that is inside the server, waiting or running.

    Attributes:
        max_requests: Requests holding a permit.
        max_rows: Rows of all of them.
        max_tokens: Padded tokens times samples of all of them.
        max_retry_after_s: Cap of the advice given to a refused client, in seconds. The longest
            deadline is a truthful one: by then everything that is inside now has left.
        batch_share: Share of each bound that work of priority ``batch`` may hold, in (0, 1].
    """

    max_requests: int
    max_rows: int
    max_tokens: int
    max_retry_after_s: int = 60
    batch_share: float = 1.0

    def bound(self, resource: Resource, priority: Priority) -> int:
        """Return how much of a resource may be inside when one of this priority has come in."""
        bounds = {
            "requests": self.max_requests,
            "rows": self.max_rows,
            "tokens": self.max_tokens,
        }
        share = self.batch_share if priority == "batch" else 1.0
        return math.floor(bounds[resource] * share)


class QueueFullError(Exception):
    """There is no room now.

    Attributes:
        resource: Which bound was reached; ``seconds`` of waiting is one of them.
        limit: Its value for this request.
        retry_after_s: Seconds after which the work now inside should be done, at least 1.
    """

    def __init__(
        self, detail: str, resource: Resource | Literal["seconds"], limit: float, retry_after_s: int
    ) -> None:
        super().__init__(f"the queue is full: {detail}")
        self.resource: Resource | Literal["seconds"] = resource
        self.limit = limit
        self.retry_after_s = retry_after_s


class Admission:
    """Counts what is inside, by priority, and how fast it leaves."""

    def __init__(self, limits: AdmissionLimits) -> None:
        self.limits = limits
        self._inside: dict[Resource, dict[Priority, int]] = {
            "requests": {"interactive": 0, "batch": 0},
            "rows": {"interactive": 0, "batch": 0},
            "tokens": {"interactive": 0, "batch": 0},
        }
        self._without_rows = 0
        self._rows_without_tokens = 0
        self._tokens_per_s: float | None = None
        self._best_tokens_per_s = 0.0
        self._rows_per_request = 0.0
        self._tokens_per_row = 0.0

    @property
    def num_requests(self) -> int:
        """Requests inside."""
        return self._total("requests")

    @property
    def num_rows(self) -> int:
        """Rows of all requests inside that are known."""
        return self._total("rows")

    @property
    def num_tokens(self) -> int:
        """Padded tokens times samples of all rows inside that are counted."""
        return self._total("tokens")

    def enter(self, priority: Priority = "interactive", patience_s: float = math.inf) -> "Permit":
        """Return a permit for one more request.

        Args:
            priority: Whose bounds hold.
            patience_s: Time until its deadline, in seconds.

        Raises:
            QueueFullError: One of the three bounds is reached already, or the work ahead takes more
                than half of that time.
        """
        for resource in ("requests", "rows", "tokens"):
            self._check(resource, 1, priority)
        self._check_wait(priority, patience_s)
        self._inside["requests"][priority] += 1
        self._without_rows += 1
        return Permit(self, priority)

    def reserve_rows(self, num_rows: int, priority: Priority) -> None:
        """Count the rows of one request in; see ``Permit.reserve_rows``."""
        self._check("rows", num_rows, priority)
        self._inside["rows"][priority] += num_rows
        self._without_rows -= 1
        self._rows_without_tokens += num_rows
        self._rows_per_request = _follow(self._rows_per_request, num_rows)

    def reserve_tokens(self, num_tokens: int, num_rows: int, priority: Priority) -> None:
        """Count the padded tokens of one request in; see ``Permit.reserve_tokens``."""
        self._check("tokens", num_tokens, priority)
        self._inside["tokens"][priority] += num_tokens
        self._rows_without_tokens -= num_rows
        self._tokens_per_row = _follow(self._tokens_per_row, num_tokens / num_rows)

    def leave(self, num_rows: int, num_tokens: int, priority: Priority) -> None:
        """Count one request and what it had reserved out again; 0 is what was never reserved."""
        self._inside["requests"][priority] -= 1
        self._inside["rows"][priority] -= num_rows
        self._inside["tokens"][priority] -= num_tokens
        if num_rows == 0:
            self._without_rows -= 1
        elif num_tokens == 0:
            self._rows_without_tokens -= num_rows

    def observe_speed(self, num_tokens: int, duration_s: float) -> None:
        """Learn from a finished batch how fast what was reserved leaves; called from any thread.

        Args:
            num_tokens: Padded tokens times passes that had been reserved for its rows.
            duration_s: How long it ran, in seconds.
        """
        speed = num_tokens / max(duration_s, 1e-6)
        known = self._tokens_per_s
        self._tokens_per_s = speed if known is None else _follow(known, speed)
        # small batches are slow per token, and say little about a full queue
        self._best_tokens_per_s = max(speed, 0.99 * self._best_tokens_per_s)

    def retry_after_s(self) -> int:
        """Return the whole seconds until the work now inside should be done, at least 1.

        The tokens inside over the measured speed. Rows whose tokens are not counted yet, and
        requests whose rows are not known yet, are taken for average ones. Before the first batch
        there is nothing to measure and 1 is returned.
        """
        if not self._tokens_per_s:
            return 1
        seconds = math.ceil((self.num_tokens + self._uncounted_tokens()) / self._tokens_per_s)
        return min(max(seconds, 1), self.limits.max_retry_after_s)

    def _uncounted_tokens(self) -> float:
        """Return the tokens of what is not counted yet, taken for average."""
        rows = self._rows_without_tokens + self._without_rows * self._rows_per_request
        return rows * self._tokens_per_row

    def _check_wait(self, priority: Priority, patience_s: float) -> None:
        if not self._best_tokens_per_s:
            return
        ahead = dict(self._inside["tokens"])
        if priority == "interactive":  # which overtakes the others
            del ahead["batch"]
        wait_s = (sum(ahead.values()) + self._uncounted_tokens()) / self._best_tokens_per_s
        limit_s = MAX_WAIT * patience_s
        if wait_s > limit_s:
            detail = f"the work ahead takes {wait_s:.1f} s, more than half of the deadline"
            raise QueueFullError(detail, "seconds", round(limit_s, 3), self.retry_after_s())

    def _total(self, resource: Resource) -> int:
        return sum(self._inside[resource].values())

    def _check(self, resource: Resource, amount: int, priority: Priority) -> None:
        """Refuse what does not fit beside others; alone, a request larger than the bound fits."""
        total = self._total(resource)
        if not total:
            return
        limit = self.limits.bound(resource, "interactive")
        if total + amount > limit:
            detail = f"at most {limit} {resource} at a time"
            raise QueueFullError(detail, resource, limit, self.retry_after_s())
        limit = self.limits.bound(resource, priority)
        if priority == "batch" and self._inside[resource]["batch"] + amount > limit:
            detail = f"at most {limit} {resource} of priority batch at a time"
            raise QueueFullError(detail, resource, limit, self.retry_after_s())


class Permit:
    """One admitted request; leaving the ``with`` block gives everything back exactly once."""

    def __init__(self, admission: Admission, priority: Priority) -> None:
        self._admission = admission
        self._priority: Priority = priority
        self._num_rows = 0
        self._num_tokens = 0

    def reserve_rows(self, num_rows: int) -> None:
        """Count rows in, once, at least one. More than the bound may enter an empty server.

        Raises:
            QueueFullError: The rows do not fit beside those of other requests.
        """
        self._admission.reserve_rows(num_rows, self._priority)
        self._num_rows = num_rows

    def reserve_tokens(self, num_tokens: int) -> None:
        """Count padded tokens times passes in, once, after the rows; at least one.

        More than the bound may enter an empty server.

        Raises:
            QueueFullError: The tokens do not fit beside those of other requests.
        """
        self._admission.reserve_tokens(num_tokens, self._num_rows, self._priority)
        self._num_tokens = num_tokens

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
        self._admission.leave(self._num_rows, self._num_tokens, self._priority)


def _follow(mean: float, value: float) -> float:
    """Return an exponential mean with weight 1/4 on the newest value.

    It follows a change within a few values without believing a single one.
    """
    return 0.75 * mean + 0.25 * value if mean else value
