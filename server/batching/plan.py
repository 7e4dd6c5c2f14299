"""Which waiting rows run next, and when: pure functions over the queue.

The cost of a batch is what the model pays: its tokens, padding included where there is any, times
the work of their samples. Rows are taken in the order of their virtual time: when
they came, and for priority ``batch`` a fixed delay later. The first of them is always in the next
batch, and no row that comes after that time is ever before it, so nothing starves.
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
    "next_batch",
    "pass_tokens",
    "plan_batch",
    "release",
]

ReleaseReason = Literal["full", "timeout", "alone", "drain", "deadline"]


@dataclass(frozen=True, slots=True)
class BatchLimits:
    """Bounds of one batch.

    Attributes:
        max_rows: Rows, at least 1.
        max_tokens: Tokens of a pass times passes, of which those that the samples of a row share
            count once. A single row may exceed it, and then runs alone.
        max_padding: Largest share of padding a row may cause by joining, in [0, 1]; a row of very
            different length waits for a later batch instead. Rows that share passes without padding
            cause none.
        wait_s: How long the oldest row waits for company while the engine is idle, in seconds.
        mix_adapters: Whether rows of different adapters or seeds may share a batch when they take
            equally many passes; otherwise all keys of a batch are equal.
        priority_delay_s: How much later than it came a row of priority ``batch`` is taken to have
            come, in seconds, at least 0: only an interactive row that comes within it overtakes.
    """

    max_rows: int = 32
    max_tokens: int = 8192
    max_padding: float = 0.5
    wait_s: float = 0.004
    mix_adapters: bool = False
    priority_delay_s: float = 2.0

    def virtual_s(self, pending: Pending) -> float:
        """Return the time by which a row takes its place in the queue, on the monotonic clock."""
        return pending.queued_s + (self.priority_delay_s if pending.priority == "batch" else 0.0)


@dataclass(frozen=True, slots=True)
class BatchPlan:
    """A partition of the queue; every row is in exactly one field, in order of virtual time.

    Attributes:
        rows: To run now; all may share a batch. Empty only when nothing else waits.
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


def next_batch(
    waiting: Sequence[Pending],
    limits: BatchLimits,
    *,
    now_s: float,
    num_inside: int,
    stopping: bool,
) -> tuple[BatchPlan, Release]:
    """Return what an idle engine is to run now, or how long it is to wait: the whole policy.

    Args:
        waiting: Admitted rows; not changed.
        limits: Bounds of one batch.
        now_s: Current time in seconds on the monotonic clock.
        num_inside: Requests in the server, those that have not come to the queue yet included.
        stopping: Whether the server drains, when waiting for company is pointless.

    Returns:
        The partition of ``waiting``, and whether its ``rows`` are to run now.
    """
    plan = plan_batch(waiting, limits, now_s=now_s, is_cancelled=_is_cancelled)
    num_here = len({pending.ticket for pending in (*plan.rows, *plan.remaining)})
    alone = num_inside <= num_here
    return plan, release(plan, limits, now_s=now_s, alone=alone, stopping=stopping)


def plan_batch(
    waiting: Sequence[Pending],
    limits: BatchLimits,
    *,
    now_s: float,
    is_cancelled: Callable[[Pending], bool],
) -> BatchPlan:
    """Take the next batch from the front of the queue, in order of virtual time.

    The first live row leads. Rows that may not share a batch with it (another key, or another
    number of passes where adapters mix), or whose length would waste more than ``max_padding``,
    are passed over and keep their place; the first row that is too much for the budget ends the
    batch, so that no small row overtakes it for ever.

    Args:
        waiting: Admitted rows; of equal virtual times the first goes first. Not changed.
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
    for pending in sorted(waiting, key=limits.virtual_s):
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


def release(
    plan: BatchPlan, limits: BatchLimits, *, now_s: float, alone: bool, stopping: bool
) -> Release:
    """Decide whether to run the planned rows now or to wait for company.

    Args:
        plan: The current plan.
        limits: Gives the waiting time.
        now_s: Current time in seconds on the monotonic clock.
        alone: Whether no request is on its way to the queue.
        stopping: Whether the server drains, when waiting for company is pointless.

    Returns:
        The reason to run now: ``drain``, ``full``, ``timeout`` (the oldest row has waited its
        time), ``alone`` or ``deadline`` (waiting would outlast a row's deadline); or how long to
        wait.
    """
    if not plan.rows:
        return Release(None, None)
    until_s = min(row.queued_s for row in plan.rows) + limits.wait_s
    reasons: tuple[tuple[ReleaseReason, bool], ...] = (
        ("drain", stopping),
        ("full", plan.full),
        ("timeout", until_s <= now_s),
        ("alone", alone),
        ("deadline", min(row.deadline_s for row in plan.rows) <= until_s),
    )
    for reason, holds in reasons:
        if holds:
            return Release(reason, None)
    return Release(None, until_s - now_s)


def pass_tokens(rows: Sequence[Pending]) -> int:
    """Return the tokens of one pass.

    Those of the rows where all of them go without padding, else the longest row times their number.
    """
    lengths = [row.num_tokens for row in rows]
    return sum(lengths) if all(row.key.unpadded for row in rows) else max(lengths) * len(rows)


def _is_cancelled(pending: Pending) -> bool:
    return pending.ticket.settled


def _matches(rows: list[Pending], pending: Pending, limits: BatchLimits) -> bool:
    """Whether a row may share the batch at all: it runs alike, and wastes little on padding."""
    if not rows:
        return True
    if not _alike(rows[0], pending, limits):
        return False
    joined = [*rows, pending]
    padding = pass_tokens(joined) - sum(row.num_tokens for row in joined)
    return padding <= limits.max_padding * pass_tokens(joined)


def _alike(leader: Pending, pending: Pending, limits: BatchLimits) -> bool:
    if limits.mix_adapters:
        return pending.passes == leader.passes
    return pending.key == leader.key


def _fits(rows: list[Pending], pending: Pending, limits: BatchLimits) -> bool:
    """Whether the batch stays inside its budget with one more row; the first always fits."""
    if not rows:
        return True
    joined = [*rows, pending]
    cost = pass_tokens(joined) * max(row.work for row in joined)
    return len(rows) < limits.max_rows and cost <= limits.max_tokens


def _is_full(rows: list[Pending], limits: BatchLimits) -> bool:
    """Whether not even a row of one token could join."""
    lengths = [row.num_tokens for row in rows]
    unpadded = all(row.key.unpadded for row in rows)
    tokens = sum(lengths) + 1 if unpadded else max(lengths) * (len(rows) + 1)
    cost = tokens * max(row.work for row in rows)
    return len(rows) >= limits.max_rows or cost > limits.max_tokens
