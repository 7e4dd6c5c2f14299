"""The advice of a full queue is true: who waits as long as told is let in."""

import math
from dataclasses import dataclass, field

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from server.batching import (
    Admission,
    AdmissionLimits,
    BatchLimits,
    Pending,
    Permit,
    QueueFullError,
    Ticket,
    plan_batch,
)
from server.ports import BatchKey, EncodedRow, Priority, Sampling

KEY = BatchKey("topics", Sampling(num_samples=2))
ROUNDING_S = 1e-6
Request = tuple[Priority, list[int]]
"""Priority, and the tokens of each row."""

priorities = st.sampled_from(("interactive", "batch"))
requests = st.tuples(priorities, st.lists(st.integers(1, 50), min_size=1, max_size=6))
bounds = st.builds(
    AdmissionLimits,
    max_requests=st.integers(1, 12),
    max_rows=st.integers(1, 30),
    max_tokens=st.integers(1, 3000),
    max_retry_after_s=st.just(10**9),
    batch_share=st.sampled_from([0.25, 0.5, 1.0]),
)


@dataclass
class Server:
    """Admission and planning as they are, around an engine of constant speed and a clock."""

    admission: Admission
    tokens_per_s: float
    batches: BatchLimits = field(default_factory=lambda: BatchLimits(max_rows=4, max_tokens=400))
    now_s: float = 0.0
    waiting: list[Pending] = field(default_factory=list)
    inside: dict[Ticket, tuple[Permit, int]] = field(default_factory=dict)

    def enter(self, request: Request) -> Permit:
        """Take a permit and the rows; the tokens are still to be counted."""
        priority, tokens = request
        permit = self.admission.enter(priority)
        try:
            permit.reserve_rows(len(tokens))
        except QueueFullError:
            permit.__exit__(None, None, None)
            raise
        return permit

    def queue(self, permit: Permit, request: Request) -> None:
        priority, tokens = request
        rows = tuple(EncodedRow(number, False, None) for number in tokens)
        ticket = Ticket(KEY, rows, deadline_s=math.inf, priority=priority)
        try:
            permit.reserve_tokens(ticket.row_cost * len(rows))
        except QueueFullError:
            permit.__exit__(None, None, None)
            raise
        self.inside[ticket] = (permit, len(rows))
        self.waiting += ticket.pending(self.now_s)

    def offer(self, request: Request) -> None:
        self.queue(self.enter(request), request)

    def work_until(self, until_s: float) -> None:
        """Run batches one after the other; the one that is not over by then is not finished."""
        while self.waiting:
            plan = plan_batch(
                self.waiting, self.batches, now_s=self.now_s, is_cancelled=lambda _: False
            )
            reserved = sum(row.ticket.row_cost for row in plan.rows)
            duration_s = reserved / self.tokens_per_s
            if self.now_s + duration_s > until_s:
                return
            self.now_s += duration_s
            self.waiting = list(plan.remaining)
            self.admission.observe_speed(reserved, duration_s)
            for row in plan.rows:
                permit, left = self.inside.pop(row.ticket)
                if left > 1:
                    self.inside[row.ticket] = (permit, left - 1)
                else:
                    permit.__exit__(None, None, None)


def warm(limits: AdmissionLimits, tokens_per_s: float, request: Request) -> Server:
    """Return a server that has answered one request, so that it knows its speed."""
    server = Server(Admission(limits), tokens_per_s)
    server.offer(request)
    server.work_until(math.inf)
    return server


@given(bounds, st.floats(1, 500), st.lists(requests, min_size=2, max_size=30), st.floats(0, 5))
def test_who_waits_as_long_as_told_is_let_in(
    limits: AdmissionLimits, tokens_per_s: float, offered: list[Request], gap_s: float
) -> None:
    server = warm(limits, tokens_per_s, offered[0])
    refused: tuple[Request, int] | None = None
    for request in offered[1:]:
        server.work_until(server.now_s + gap_s)
        try:
            server.offer(request)
        except QueueFullError as error:
            refused = (request, error.retry_after_s)
            break
    assume(refused is not None)
    assert refused is not None
    request, retry_after_s = refused
    server.work_until(server.now_s + retry_after_s + ROUNDING_S)
    server.offer(request)


@given(
    st.integers(1, 6), st.integers(1, 50), st.integers(2, 10), st.integers(0, 9), st.floats(1, 500)
)
def test_it_is_true_for_rows_that_are_not_counted_yet(
    num_rows: int, tokens: int, num_inside: int, num_counted: int, tokens_per_s: float
) -> None:
    """Requests that only stand in the encoder weigh as much as any other."""
    request: Request = ("interactive", [tokens] * num_rows)
    limits = AdmissionLimits(num_inside, 10**6, 10**6, max_retry_after_s=10**9)
    server = warm(limits, tokens_per_s, request)
    permits = [server.enter(request) for _ in range(num_inside)]
    for permit in permits[:num_counted]:
        server.queue(permit, request)
    with pytest.raises(QueueFullError) as caught:
        server.offer(request)
    for permit in permits[num_counted:]:
        server.queue(permit, request)
    server.work_until(server.now_s + caught.value.retry_after_s + ROUNDING_S)
    server.offer(request)
