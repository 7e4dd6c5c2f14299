"""The one engine thread: takes planned batches from the queue, runs them, settles every future.

This is the only file that may catch ``Exception``: whatever a batch raises, each of its requests
must be told, and the thread lives on. When it cannot live on, everyone who waits is told that too.
"""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from server.batching.plan import (
    BatchLimits,
    BatchPlan,
    ReleaseReason,
    padded_tokens,
    plan_batch,
    release,
)
from server.batching.ticket import BatchFailedError, DeadlinePassedError, Pending, Ticket
from server.ports import BatchKey, BatchScores, EncodedRow, EngineFatalError, EngineStoppedError

__all__ = ["BatchObserver", "BatchStats", "Batcher"]

logger = logging.getLogger(__name__)

RunBatch = Callable[[BatchKey, Sequence[EncodedRow]], BatchScores]


@dataclass(frozen=True, slots=True)
class BatchStats:
    """What one finished batch tells telemetry.

    Attributes:
        num_rows: Its rows.
        num_tokens: Their tokens, without padding, of one pass.
        padded_tokens: Tokens of one pass with padding.
        cost_tokens: Padded tokens times passes: what the engine computed.
        reason: Why it was released.
        waited_s: How long each row waited.
        duration_s: Time of the whole batch; ``forward_s`` and ``uq_s`` are its parts.
        forward_s: Time of the forward passes.
        uq_s: Time of the uncertainty scores.
    """

    num_rows: int
    num_tokens: int
    padded_tokens: int
    cost_tokens: int
    reason: ReleaseReason
    waited_s: tuple[float, ...]
    duration_s: float
    forward_s: float
    uq_s: float


class BatchObserver(Protocol):
    """Told about every finished batch, from the engine thread; must be quick and not raise."""

    def __call__(self, stats: BatchStats, /) -> None:
        """Take note of one batch."""
        ...


class Batcher:
    """A queue of rows and the thread that empties it."""

    def __init__(
        self,
        run_batch: RunBatch,
        limits: BatchLimits,
        observer: BatchObserver,
        on_death: Callable[[], None],
    ) -> None:
        self._run_batch = run_batch
        self._limits = limits
        self._observer = observer
        self._on_death = on_death
        self._changed = threading.Condition()
        self._waiting: list[Pending] = []
        self._running: tuple[Pending, ...] = ()
        self._running_since_s: float | None = None
        self._stopping = False
        self._alive = True
        self._thread = threading.Thread(target=self._work, name="dalorra-engine", daemon=True)

    @property
    def alive(self) -> bool:
        """Whether work that is submitted now will be done."""
        return self._alive

    @property
    def num_waiting(self) -> int:
        """Rows in the queue."""
        return len(self._waiting)

    @property
    def waiting_tokens(self) -> int:
        """Tokens times passes of the rows in the queue."""
        with self._changed:
            return sum(row.num_tokens * row.key.sampling.passes for row in self._waiting)

    @property
    def running_for_s(self) -> float:
        """How long the current batch has been running, in seconds; 0 when the engine is idle."""
        since_s = self._running_since_s
        return 0.0 if since_s is None else time.monotonic() - since_s

    def start(self) -> None:
        """Start the engine thread."""
        self._thread.start()

    def submit(self, ticket: Ticket) -> None:
        """Queue every row of a request; its future will be settled.

        Raises:
            EngineStoppedError: The engine thread has ended or is about to.
        """
        with self._changed:
            if self._stopping or not self._alive:
                raise EngineStoppedError
            self._waiting.extend(ticket.pending(time.monotonic()))
            self._changed.notify()

    def stop(self, timeout_s: float) -> bool:
        """Finish the queue, end the thread and return True; or give up after ``timeout_s``.

        Whoever still waits then gets ``EngineStoppedError``.
        """
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self._thread.join(timeout_s)
        finished = not self._thread.is_alive()
        self._abandon()
        return finished

    def _work(self) -> None:
        try:
            while (work := self._next()) is not None:
                self._run(*work)
        except BaseException as error:  # a dead engine must never look like a slow one
            logger.critical("engine thread died", exc_info=error)
            self._on_death()
        finally:
            self._abandon()

    def _next(self) -> tuple[BatchPlan, ReleaseReason] | None:
        """Wait for a batch worth running; None when stopping and the queue is empty."""
        with self._changed:
            while True:
                now_s = time.monotonic()
                plan = plan_batch(
                    self._waiting, self._limits, now_s=now_s, is_cancelled=_is_cancelled
                )
                for pending in plan.expired:
                    pending.ticket.fail(DeadlinePassedError())
                reason, wait_s = release(plan, self._limits, now_s=now_s, stopping=self._stopping)
                if reason is not None:
                    self._waiting = list(plan.remaining)
                    self._running = plan.rows
                    return plan, reason
                self._waiting = [*plan.rows, *plan.remaining]
                if self._stopping:
                    return None
                self._changed.wait(wait_s)

    def _run(self, plan: BatchPlan, reason: ReleaseReason) -> None:
        started_s = time.monotonic()
        waited_s = tuple(started_s - pending.queued_s for pending in plan.rows)
        for pending, waited in zip(plan.rows, waited_s, strict=True):
            pending.ticket.start(waited)
        self._running_since_s = started_s
        scores = self._attempt(plan.rows)
        if scores is not None:
            self._observe(plan.rows, reason, waited_s, scores)
        self._running_since_s = None
        self._running = ()

    def _attempt(self, rows: tuple[Pending, ...]) -> BatchScores | None:
        """Run rows and deliver; when a shared batch fails, run each of its requests alone."""
        tickets = list(dict.fromkeys(pending.ticket for pending in rows))
        try:
            scores = self._compute(rows)
        except EngineFatalError:
            raise
        except Exception as error:  # noqa: BLE001 - whatever it is, each request must be told
            _log_failure(error, tickets, len(rows))
            if len(tickets) == 1:
                tickets[0].fail(BatchFailedError())
                return None
            for ticket in tickets:
                if not ticket.settled:
                    self._attempt(tuple(row for row in rows if row.ticket is ticket))
            return None
        for ticket in tickets:
            places = [place for place, row in enumerate(rows) if row.ticket is ticket]
            indices = [rows[place].index for place in places]
            ticket.deliver(indices, scores, [scores.rows[place] for place in places])
        return scores

    def _compute(self, rows: tuple[Pending, ...]) -> BatchScores:
        scores = self._run_batch(rows[0].key, [pending.row for pending in rows])
        if len(scores.rows) != len(rows):
            raise RuntimeError(f"engine gave {len(scores.rows)} answers to {len(rows)} rows")
        return scores

    def _observe(
        self,
        rows: tuple[Pending, ...],
        reason: ReleaseReason,
        waited_s: tuple[float, ...],
        scores: BatchScores,
    ) -> None:
        since_s = self._running_since_s or time.monotonic()
        padded = padded_tokens(rows)
        stats = BatchStats(
            num_rows=len(rows),
            num_tokens=sum(pending.num_tokens for pending in rows),
            padded_tokens=padded,
            cost_tokens=padded * rows[0].key.sampling.passes,
            reason=reason,
            waited_s=waited_s,
            duration_s=time.monotonic() - since_s,
            forward_s=scores.forward_s,
            uq_s=scores.uq_s,
        )
        self._observer(stats)

    def _abandon(self) -> None:
        """Tell everyone who still waits that nobody will answer."""
        with self._changed:
            self._alive = False
            left = [*self._running, *self._waiting]
            self._waiting = []
        for pending in left:
            pending.ticket.fail(EngineStoppedError())


def _is_cancelled(pending: Pending) -> bool:
    return pending.ticket.settled


def _log_failure(error: Exception, tickets: list[Ticket], num_rows: int) -> None:
    """Log a failed batch; the formatter leaves out the error's text, which may quote a request."""
    request_ids = [ticket.request_id for ticket in tickets]
    logger.error(
        "batch failed", extra={"request_ids": request_ids, "rows": num_rows}, exc_info=error
    )
