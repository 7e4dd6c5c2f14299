"""Which waiting rows run next, and when: pure functions over the queue.

The cost of a batch is what the model pays: its longest row times its number of rows times the
samples, padding included. The oldest row is always in the next batch, so nothing starves.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from server.batching.ticket import Pending

__all__ = [
    "BatchLimits",
    "BatchPlan",
    "Release",
    "ReleaseReason",
    "padded_tokens",
    "plan_batch",
    "release",
]

ReleaseReason = Literal["full", "timeout", "drain", "deadline"]


@dataclass(frozen=True, slots=True)
class BatchLimits:
    """Bounds of one batch.

    Attributes:
        max_rows: Rows, at least 1.
        max_tokens: Padded tokens times samples. A single row may exceed it, and then runs alone.
        max_padding: Largest share of padding a row may cause by joining, in [0, 1]; a row of very
            different length waits for the next batch instead. Two tokens more or less never count.
        wait_s: How long the oldest row waits for company while the engine is idle, in seconds.
    """

    max_rows: int = 32
    max_tokens: int = 8192
    max_padding: float = 0.5
    wait_s: float = 0.004


@dataclass(frozen=True, slots=True)
class BatchPlan:
    """A partition of the queue; every row is in exactly one field, in order of arrival.

    Attributes:
        rows: To run now; all with one key. Empty only when nothing else waits.
        remaining: To stay in the queue.
        expired: Their deadline has passed.
        dropped: Nobody waits for their answer any more.
        full: Whether a further row was refused, or would be, for lack of room.
    """

    rows: tuple[Pending, ...]
    remaining: tuple[Pending, ...]
    expired: tuple[Pending, ...]
    dropped: tuple[Pending, ...]
    full: bool


class Release(NamedTuple):
    """Why to run the planned rows now; or None, and how long to wait (None: until woken)."""

    reason: ReleaseReason | None
    wait_s: float | None


def plan_batch(
    waiting: Sequence[Pending],
    limits: BatchLimits,
    *,
    now_s: float,
    is_cancelled: Callable[[Pending], bool],
) -> BatchPlan:
    """Take the next batch from the front of the queue, in order of arrival.

    The oldest live row leads and gives the key. Rows with another key, or whose length would waste
    more than ``max_padding``, are passed over and keep their place; the first row that is too much
    for the budget ends the batch, so that no small row overtakes it for ever.

    Args:
        waiting: Admitted rows, oldest first; not changed.
        limits: Bounds of one batch.
        now_s: Current time in seconds on the monotonic clock of ``Pending.deadline_s``.
        is_cancelled: Tells whether nobody waits for the answer any more.

    Returns:
        The partition of ``waiting``.
    """
    rows: list[Pending] = []
    remaining: list[Pending] = []
    expired: list[Pending] = []
    dropped: list[Pending] = []
    full = False
    for pending in waiting:
        if is_cancelled(pending):
            dropped.append(pending)
        elif pending.deadline_s <= now_s:
            expired.append(pending)
        elif full or not _matches(rows, pending, limits):
            remaining.append(pending)
        elif _fits(rows, pending, limits):
            rows.append(pending)
            full = _is_full(rows, limits)
        else:
            remaining.append(pending)
            full = True
    return BatchPlan(tuple(rows), tuple(remaining), tuple(expired), tuple(dropped), full)


def release(plan: BatchPlan, limits: BatchLimits, *, now_s: float, stopping: bool) -> Release:
    """Decide whether to run the planned rows now or to wait for company.

    Args:
        plan: The current plan.
        limits: Gives the waiting time.
        now_s: Current time in seconds on the monotonic clock.
        stopping: Whether the server drains, when waiting for company is pointless.

    Returns:
        The reason to run now: ``drain``, ``full``, ``timeout`` (the oldest row has waited its
        time) or ``deadline`` (waiting would outlast a row's deadline); or how long to wait.
    """
    if not plan.rows:
        return Release(None, None)
    if stopping:
        return Release("drain", None)
    if plan.full:
        return Release("full", None)
    until_s = plan.rows[0].queued_s + limits.wait_s
    if until_s <= now_s:
        return Release("timeout", None)
    if min(row.deadline_s for row in plan.rows) <= until_s:
        return Release("deadline", None)
    return Release(None, until_s - now_s)


def padded_tokens(rows: Sequence[Pending]) -> int:
    """Return the longest row times the number of rows: tokens of one pass, padding included."""
    return max(row.num_tokens for row in rows) * len(rows)


def _matches(rows: list[Pending], pending: Pending, limits: BatchLimits) -> bool:
    """Whether a row may share the batch at all: same key, and not mostly padding."""
    if not rows:
        return True
    if pending.key != rows[0].key:
        return False
    joined = [*rows, pending]
    padding = padded_tokens(joined) - sum(row.num_tokens for row in joined)
    return padding <= max(limits.max_padding * padded_tokens(joined), 2 * len(joined))


def _fits(rows: list[Pending], pending: Pending, limits: BatchLimits) -> bool:
    """Whether the batch stays inside its budget with one more row; the first always fits."""
    if not rows:
        return True
    cost = padded_tokens([*rows, pending]) * pending.key.sampling.passes
    return len(rows) < limits.max_rows and cost <= limits.max_tokens


def _is_full(rows: list[Pending], limits: BatchLimits) -> bool:
    """Whether not even a row of one token could join."""
    longest = max(row.num_tokens for row in rows)
    cost = longest * (len(rows) + 1) * rows[0].key.sampling.passes
    return len(rows) >= limits.max_rows or cost > limits.max_tokens
