"""One request's way through the engine: its rows, its future, and where its time went."""

import threading
from collections.abc import Mapping
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass

from server.ports import BatchKey, BatchRow, BatchScores, EncodedRow, Priority, RowScores

__all__ = [
    "Answer",
    "BatchFailedError",
    "BatchTooLargeError",
    "DeadlinePassedError",
    "Pending",
    "Ticket",
]


class BatchFailedError(Exception):
    """The engine failed on this request; the log says how, the client need not know."""


class BatchTooLargeError(Exception):
    """This request did not fit into the engine's memory, halved either; a smaller one may."""


class DeadlinePassedError(Exception):
    """The answer was not ready in time."""


@dataclass(frozen=True, slots=True)
class Answer:
    """All rows of one request, answered.

    Attributes:
        rows: One per row of the request, in its order.
        queue_s: Longest time one of its rows waited.
        forward_s: Time of the forward passes of every batch that carried one of its rows.
        uq_s: Time spent on uncertainty in those batches.
    """

    rows: tuple[RowScores, ...]
    queue_s: float
    forward_s: float
    uq_s: float


class Ticket:
    """The rows of one request and the future of their answer.

    The engine thread delivers rows, the event loop waits on ``future`` and may cancel it; a lock
    is not needed, since only the engine thread writes and the future settles once.
    """

    def __init__(
        self,
        key: BatchKey,
        rows: tuple[EncodedRow, ...],
        *,
        deadline_s: float,
        request_id: str = "-",
        priority: Priority = "interactive",
    ) -> None:
        self.key = key
        self.rows = rows
        self.deadline_s = deadline_s
        self.request_id = request_id
        self.priority: Priority = priority
        self.future: Future[Answer] = Future()
        self._started = threading.Event()
        self._answered: dict[int, RowScores] = {}
        self._queue_s = 0.0
        self._forward_s = 0.0
        self._uq_s = 0.0

    @property
    def settled(self) -> bool:
        """Whether nobody waits any more: answered, failed or cancelled."""
        return self.future.done()

    @property
    def started(self) -> bool:
        """Whether the engine has begun with one of its rows."""
        return self._started.is_set()

    @property
    def row_cost(self) -> int:
        """Padded tokens times passes that admission counts for each of its rows."""
        return max(row.num_tokens for row in self.rows) * self.key.sampling.passes

    def pending(self, now_s: float) -> list["Pending"]:
        """Return its rows as queue entries, shortest first, so that batches pad little."""
        order = sorted(range(len(self.rows)), key=lambda index: self.rows[index].num_tokens)
        return [Pending(self, index, now_s) for index in order]

    def start(self, waited_s: float) -> None:
        """Note that the engine begins with a row that waited so many seconds."""
        self._started.set()
        self._queue_s = max(self._queue_s, waited_s)

    def deliver(self, answers: Mapping[int, RowScores], scores: BatchScores) -> None:
        """Take the answers of some rows, by index; the last of them settles the future.

        Args:
            answers: Those of this request's rows that were in the batch and were answered.
            scores: Of the whole batch: tells its times.
        """
        self._answered.update(answers)
        self._forward_s += scores.forward_s
        self._uq_s += scores.uq_s
        if len(self._answered) == len(self.rows):
            answered = tuple(self._answered[index] for index in range(len(self.rows)))
            with suppress(InvalidStateError):  # the client may have left this very moment
                answer = Answer(answered, self._queue_s, self._forward_s, self._uq_s)
                self.future.set_result(answer)

    def fail(self, error: BaseException) -> None:
        """Settle the future with an error, unless it is settled already."""
        with suppress(InvalidStateError):
            self.future.set_exception(error)


@dataclass(frozen=True, slots=True, eq=False)
class Pending:
    """One row in the queue.

    Attributes:
        ticket: The request it belongs to.
        index: Its place in that request.
        queued_s: When it was queued, in seconds on the monotonic clock.
    """

    ticket: Ticket
    index: int
    queued_s: float

    @property
    def key(self) -> BatchKey:
        """Who answers it, and how it is sampled."""
        return self.ticket.key

    @property
    def passes(self) -> int:
        """Forward passes it takes: what rows of one batch must share."""
        return self.ticket.key.sampling.passes

    @property
    def work(self) -> float:
        """What those compute together, in passes: what they share counts once."""
        return self.ticket.key.work

    @property
    def deadline_s(self) -> float:
        """When its answer is worthless, in seconds on the monotonic clock."""
        return self.ticket.deadline_s

    @property
    def priority(self) -> Priority:
        """Whether somebody sits and waits for it."""
        return self.ticket.priority

    @property
    def row(self) -> EncodedRow:
        """The row itself."""
        return self.ticket.rows[self.index]

    @property
    def batch_row(self) -> BatchRow:
        """The row as an engine takes it."""
        return BatchRow(self.key, self.row)

    @property
    def num_tokens(self) -> int:
        """Its tokens, without padding."""
        return self.row.num_tokens
