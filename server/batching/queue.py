"""The rows that wait, and those that run: the only state that two threads change, behind one lock.

The event loop puts tickets in, the engine thread takes batches out, and anyone may close it.
"""

import threading
import time
from collections.abc import Callable

from server.batching.plan import BatchLimits, BatchPlan, ReleaseReason, next_batch
from server.batching.ticket import DeadlinePassedError, Pending, Ticket
from server.ports import EngineStoppedError, Priority

__all__ = ["RowQueue"]


class RowQueue:
    """A queue of rows that gives batches.

    Args:
        limits: Bounds of one batch.
        num_inside: Requests in the server, those that have not come to the queue yet included;
            called from the engine thread.
    """

    def __init__(self, limits: BatchLimits, num_inside: Callable[[], int]) -> None:
        self._limits = limits
        self._num_inside = num_inside
        self._changed = threading.Condition()
        self._waiting: list[Pending] = []
        self._running: tuple[Pending, ...] = ()
        self._stopping = False
        self._closed = False

    @property
    def closed(self) -> bool:
        """Whether nobody takes from it any more."""
        return self._closed

    def __len__(self) -> int:
        """Return the number of rows that wait."""
        return len(self._waiting)

    def num_rows(self, priority: Priority) -> int:
        """Return the number of rows of one priority that wait."""
        with self._changed:
            return sum(row.priority == priority for row in self._waiting)

    def num_tokens(self, priority: Priority) -> int:
        """Return the tokens times passes of the rows of one priority that wait."""
        with self._changed:
            waiting = [row for row in self._waiting if row.priority == priority]
        return sum(row.num_tokens * row.passes for row in waiting)

    def put(self, ticket: Ticket) -> None:
        """Queue every row of a request.

        Raises:
            EngineStoppedError: The queue is closed or about to be.
        """
        with self._changed:
            if self._stopping or self._closed:
                raise EngineStoppedError
            self._waiting.extend(ticket.pending(time.monotonic()))
            self._changed.notify()

    def take(self) -> tuple[BatchPlan, ReleaseReason] | None:
        """Wait for a batch worth running; what was taken before counts as done.

        Returns:
            The batch and why it is released; None when the queue is closed, or is stopping and
            empty.
        """
        with self._changed:
            self._running = ()
            while not self._closed:
                plan, (reason, wait_s) = next_batch(
                    self._waiting,
                    self._limits,
                    now_s=time.monotonic(),
                    num_inside=self._num_inside(),
                    stopping=self._stopping,
                )
                for pending in plan.expired:
                    pending.ticket.fail(DeadlinePassedError())
                if reason is not None:
                    self._waiting = list(plan.remaining)
                    self._running = plan.rows
                    return plan, reason
                self._waiting = [*plan.rows, *plan.remaining]
                if self._stopping:
                    return None
                self._changed.wait(wait_s)
        return None

    def stop(self) -> None:
        """Take no more tickets; what waits is still given out, without waiting for company."""
        with self._changed:
            self._stopping = True
            self._changed.notify()

    def close(self) -> tuple[Pending, ...]:
        """Give nothing out any more; return the rows that ran or waited: nobody answers them."""
        with self._changed:
            self._closed = True
            left = (*self._running, *self._waiting)
            self._running = ()
            self._waiting = []
            self._changed.notify()
        return left
