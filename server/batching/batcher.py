"""The one engine thread: takes planned batches from the queue, runs them, settles every future.

This is the only file that may catch ``Exception``: whatever a batch raises, each of its requests
must be told, and the thread lives on. When it cannot live on, everyone who waits is told that too.
"""

import logging
import sys
import threading
import time
from collections.abc import Callable, Sequence

from server.batching.plan import BatchLimits, BatchPlan, ReleaseReason
from server.batching.pulse import Pulse
from server.batching.queue import RowQueue
from server.batching.stats import BatchObserver, BatchStats, FailureReason
from server.batching.ticket import (
    BatchFailedError,
    BatchTooLargeError,
    DeadlinePassedError,
    Pending,
    Ticket,
)
from server.ports import (
    BatchRow,
    BatchScores,
    EngineFatalError,
    EngineMemoryError,
    EngineStoppedError,
    EngineUnavailableError,
    Priority,
    Wanted,
)

__all__ = ["Batcher"]

logger = logging.getLogger(__name__)

RunBatch = Callable[[Sequence[BatchRow], Wanted], BatchScores]
Rows = tuple[Pending, ...]


class Batcher:
    """A queue of rows and the thread that empties it.

    Attributes:
        pulse: Signs of life of the batch that runs.
        failed_in_row: Batches in a row of which not one request was answered.
    """

    def __init__(
        self,
        run_batch: RunBatch,
        limits: BatchLimits,
        observer: BatchObserver,
        on_death: Callable[[], None],
        num_inside: Callable[[], int] = lambda: sys.maxsize,
    ) -> None:
        """Make a batcher; ``start`` sets it going.

        Args:
            run_batch: Answers a batch; called from the engine thread only.
            limits: Bounds of one batch.
            observer: Told about finished and failed batches, from the engine thread.
            on_death: Called from the engine thread when it dies.
            num_inside: Requests in the server, queued or not; while all of them are in the queue
                nobody waits for company.
        """
        self.pulse = Pulse()
        self.failed_in_row = 0
        self._run_batch = run_batch
        self._queue = RowQueue(limits, num_inside)
        self._observer = observer
        self._on_death = on_death
        self._finished = False
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._work, name="dalorra-engine", daemon=True)

    @property
    def alive(self) -> bool:
        """Whether work that is submitted now will be done, unless the server stops."""
        return not self._queue.closed

    @property
    def finished(self) -> bool:
        """Whether the engine thread has ended: nothing touches the engine any more."""
        return self._finished

    @property
    def num_waiting(self) -> int:
        """Rows in the queue."""
        return len(self._queue)

    def waiting_rows(self, priority: Priority) -> int:
        """Return the rows of one priority in the queue."""
        return self._queue.num_rows(priority)

    def waiting_tokens(self, priority: Priority) -> int:
        """Return the tokens times passes of the rows of one priority in the queue."""
        return self._queue.num_tokens(priority)

    @property
    def silent_for_s(self) -> float:
        """Time without a sign of life from the batch that runs, in seconds; 0 while none does."""
        return self.pulse.silent_for_s

    def start(self) -> None:
        """Start the engine thread."""
        self._thread.start()

    def submit(self, ticket: Ticket) -> None:
        """Queue every row of a request; its future will be settled.

        Raises:
            EngineStoppedError: The engine thread has ended or is about to.
        """
        self._queue.put(ticket)

    def forgive(self) -> None:
        """Count failed batches from zero again: something else has shown that the engine works."""
        self.failed_in_row = 0

    def stop(self, timeout_s: float) -> bool:
        """Finish the queue, end the thread and return True; or give up after ``timeout_s``.

        Whoever still waits then gets ``EngineStoppedError``. ``abandon`` ends the waiting.
        """
        self._queue.stop()
        self._over.wait(timeout_s)
        self.abandon()
        return self._finished

    def abandon(self) -> None:
        """Tell everyone who waits that nobody will answer; a thread that hangs is left behind.

        If it ever comes back, its results are thrown away and it ends.
        """
        for pending in self._queue.close():
            pending.ticket.fail(EngineStoppedError())
        self._over.set()

    def _work(self) -> None:
        died = False
        try:
            while (work := self._queue.take()) is not None:
                self._run(*work)
        except BaseException as error:  # a dead engine must never look like a slow one
            died = not self._queue.closed  # one that was left behind dies unnoticed
            if died:
                logger.critical("engine thread died", exc_info=error)
                self._observer.batch_failed("fatal")
        finally:
            self._finished = True
            self.abandon()
        if died:
            self._on_death()

    def _run(self, plan: BatchPlan, reason: ReleaseReason) -> None:
        started_s = time.monotonic()
        waited_s = tuple(started_s - pending.queued_s for pending in plan.rows)
        for pending, waited in zip(plan.rows, waited_s, strict=True):
            pending.ticket.start(waited)
        answered = self._attempt(plan.rows, may_split=True)
        self.pulse.rest()
        if self._queue.closed:
            return
        self.failed_in_row = 0 if answered else self.failed_in_row + 1
        if len(answered) == 1 and len(answered[0].rows) == len(plan.rows):
            duration_s = time.monotonic() - started_s
            stats = BatchStats.of(plan.rows, reason, waited_s, duration_s, answered[0])
            self._observer.batch_finished(stats)

    def _attempt(self, rows: Rows, *, may_split: bool) -> list[BatchScores]:
        """Run rows and deliver; after a failure, run smaller parts.

        Args:
            rows: To run; whoever is settled already counts for nothing.
            may_split: Whether a batch that does not fit into memory may be halved.

        Returns:
            The scores of every run that succeeded.
        """
        try:
            scores = self._compute(rows)
        except EngineFatalError:
            raise
        except EngineMemoryError as error:
            after = self._after_memory
            self._note_failure("memory", error, rows)
        except EngineUnavailableError as error:
            after = self._after_unavailable
            self._note_failure("unavailable", error, rows)
        except Exception as error:  # noqa: BLE001 - whatever it is, each request must be told
            after = self._after_error
            self._note_failure("error", error, rows)
        else:
            _deliver(rows, scores)
            return [scores]
        # out here the error is gone, and with its frames what they held of the engine's memory
        return after(rows, may_split=may_split)

    def _after_memory(self, rows: Rows, *, may_split: bool) -> list[BatchScores]:
        """Try each half once (a single row once more), and what fails again by requests."""
        if may_split:
            middle = len(rows) // 2
            return [
                scores
                for half in (rows[:middle], rows[middle:])
                for scores in self._retry(half, may_split=False)
            ]
        tickets = _tickets(rows)
        if len(tickets) == 1:
            tickets[0].fail(BatchTooLargeError())
            return []
        return self._each_alone(rows, may_split=False)

    def _after_unavailable(self, rows: Rows, *, may_split: bool) -> list[BatchScores]:  # noqa: ARG002
        """Tell each request: asking once more would only take longer to fail."""
        for ticket in _tickets(rows):
            ticket.fail(EngineUnavailableError())
        return []

    def _after_error(self, rows: Rows, *, may_split: bool) -> list[BatchScores]:
        """Try each request alone, so that only the one to blame fails."""
        tickets = _tickets(rows)
        if len(tickets) == 1:
            tickets[0].fail(BatchFailedError())
            return []
        return self._each_alone(rows, may_split=may_split)

    def _each_alone(self, rows: Rows, *, may_split: bool) -> list[BatchScores]:
        return [
            scores
            for ticket in _tickets(rows)
            for scores in self._retry(
                tuple(row for row in rows if row.ticket is ticket), may_split=may_split
            )
        ]

    def _retry(self, rows: Rows, *, may_split: bool) -> list[BatchScores]:
        waiting = tuple(row for row in rows if not row.ticket.settled)
        return self._attempt(waiting, may_split=may_split) if waiting else []

    def _compute(self, rows: Rows) -> BatchScores:
        def wanted(place: int) -> bool:
            self.pulse.beat()
            return _wanted(rows[place].ticket)

        self.pulse.beat()
        scores = self._run_batch([pending.batch_row for pending in rows], wanted)
        self.pulse.beat()
        if len(scores.rows) != len(rows):
            raise RuntimeError(f"engine gave {len(scores.rows)} answers to {len(rows)} rows")
        # a row that was called unwanted has been settled by that very call
        missing = sum(
            found is None and not row.ticket.settled
            for found, row in zip(scores.rows, rows, strict=True)
        )
        if missing:
            raise RuntimeError(f"engine left out {missing} of {len(rows)} rows that were wanted")
        return scores

    def _note_failure(self, reason: FailureReason, error: Exception, rows: Rows) -> None:
        """Count and log a failed run; the formatter leaves out the error's text.

        That text may quote a request.
        """
        if self._queue.closed:
            return
        self._observer.batch_failed(reason)
        request_ids = [ticket.request_id for ticket in _tickets(rows)]
        logger.error(
            "batch failed",
            extra={"reason": reason, "request_ids": request_ids, "rows": len(rows)},
            exc_info=error,
        )


def _tickets(rows: Rows) -> list[Ticket]:
    return list(dict.fromkeys(pending.ticket for pending in rows))


def _wanted(ticket: Ticket) -> bool:
    """Whether somebody waits; who has waited past the deadline is told so now."""
    if ticket.deadline_s <= time.monotonic():
        ticket.fail(DeadlinePassedError())
    return not ticket.settled


def _deliver(rows: Rows, scores: BatchScores) -> None:
    for ticket in _tickets(rows):
        answers = {
            row.index: found
            for row, found in zip(rows, scores.rows, strict=True)
            if row.ticket is ticket and found is not None
        }
        ticket.deliver(answers, scores)
