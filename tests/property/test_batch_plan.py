"""Invariants of planning: nothing is lost, overtakes, starves or overflows."""

import math
from typing import get_args

from hypothesis import given
from hypothesis import strategies as st

from server.batching import BatchLimits, Pending, Ticket, plan_batch
from server.ports import BatchKey, EncodedRow, Priority, Sampling

NOW_S = 10.0
SHARED_DEPTHS = {"a": 0.0, "b": 0.75, "c": 0.5}


def make_row(values: tuple[str, int, int, float, bool, Priority, float]) -> Pending:
    adapter, samples, tokens, deadline_s, cancelled, priority, queued_s = values
    key = BatchKey(adapter, Sampling(num_samples=samples), SHARED_DEPTHS[adapter], adapter == "c")
    encoded = (EncodedRow(tokens, False, None),)
    ticket = Ticket(key, encoded, deadline_s=deadline_s, priority=priority)
    if cancelled:
        ticket.future.cancel()
    return Pending(ticket, 0, queued_s)


rows = st.tuples(
    st.sampled_from("abc"),
    st.integers(1, 3),
    st.integers(1, 60),
    st.sampled_from([5.0, 50.0, 60.0]),
    st.sampled_from([False, False, False, True]),
    st.sampled_from(get_args(Priority)),
    st.floats(0, 9),
).map(make_row)
queues = st.lists(rows, max_size=20).map(lambda q: sorted(q, key=lambda row: row.queued_s))
limits = st.builds(
    BatchLimits,
    max_rows=st.integers(1, 6),
    max_tokens=st.integers(1, 200),
    max_padding=st.floats(0, 1),
    mix_adapters=st.booleans(),
    priority_delay_s=st.sampled_from([0.0, 1.0, 2.5, 60.0]),
)


def is_cancelled(pending: Pending) -> bool:
    return pending.ticket.settled


def is_live(pending: Pending) -> bool:
    return not is_cancelled(pending) and pending.deadline_s > NOW_S


@given(queues, limits)
def test_every_row_is_in_exactly_one_place_and_in_order_of_virtual_time(
    queue: list[Pending], bounds: BatchLimits
) -> None:
    plan = plan_batch(queue, bounds, now_s=NOW_S, is_cancelled=is_cancelled)
    parts = [plan.rows, plan.remaining, plan.expired, plan.dropped]
    ordered = sorted(queue, key=bounds.virtual_s)
    places = {id(pending): place for place, pending in enumerate(ordered)}
    assert sorted(places[id(p)] for part in parts for p in part) == list(range(len(queue)))
    for part in parts:
        order = [places[id(pending)] for pending in part]
        assert order == sorted(order)
    assert all(is_cancelled(pending) for pending in plan.dropped)
    assert all(is_live(pending) for pending in (*plan.rows, *plan.remaining))


@given(queues, limits)
def test_a_batch_keeps_its_bounds_and_runs_alike(queue: list[Pending], bounds: BatchLimits) -> None:
    plan = plan_batch(queue, bounds, now_s=NOW_S, is_cancelled=is_cancelled)
    if not plan.rows:
        return
    lengths = [p.num_tokens for p in plan.rows]
    unpadded = {p.key.adapter for p in plan.rows} == {"c"}
    cost = sum(lengths) if unpadded else max(lengths) * len(lengths)
    depths = [SHARED_DEPTHS[p.key.adapter] for p in plan.rows]
    cost *= max(1 + (p.passes - 1) * (1 - d) for p, d in zip(plan.rows, depths, strict=True))
    assert len({pending.passes for pending in plan.rows}) == 1
    assert bounds.mix_adapters or len({pending.key for pending in plan.rows}) == 1
    assert len(plan.rows) <= bounds.max_rows
    assert cost <= bounds.max_tokens or len(plan.rows) == 1


@given(queues, limits)
def test_the_first_live_row_always_runs_next(queue: list[Pending], bounds: BatchLimits) -> None:
    plan = plan_batch(queue, bounds, now_s=NOW_S, is_cancelled=is_cancelled)
    live = sorted((row for row in queue if is_live(row)), key=bounds.virtual_s)
    assert plan.rows[:1] == tuple(live[:1])


@given(queues, limits, st.floats(0.01, 3))
def test_nobody_starves(queue: list[Pending], bounds: BatchLimits, batch_s: float) -> None:
    """While a row waits, every batch is led by one that came before its virtual time.

    So at most as many batches run before it as there are such rows, however many come later.
    """
    arrivals = [without_deadline(row) for row in queue if not is_cancelled(row)]
    waiting: list[Pending] = []
    now_s, leaders_while_waiting = 0.0, {id(row): list[Pending]() for row in arrivals}
    pending = list(arrivals)
    while pending or waiting:
        waiting += [row for row in pending if row.queued_s <= now_s]
        pending = [row for row in pending if row.queued_s > now_s]
        plan = plan_batch(waiting, bounds, now_s=now_s, is_cancelled=is_cancelled)
        waiting = list(plan.remaining)
        for row in waiting:
            leaders_while_waiting[id(row)].append(plan.rows[0])
        now_s += batch_s
    for row in arrivals:
        delay_s = bounds.priority_delay_s if row.priority == "batch" else 0.0
        leaders = leaders_while_waiting[id(row)]
        assert all(leader.queued_s <= row.queued_s + delay_s for leader in leaders)
        before = [r for r in arrivals if bounds.virtual_s(r) <= bounds.virtual_s(row)]
        assert len(leaders) < len(before)  # itself is one of those


def without_deadline(row: Pending) -> Pending:
    row.ticket.deadline_s = math.inf
    return row


@given(queues, limits)
def test_planning_again_and_again_empties_the_queue(
    queue: list[Pending], bounds: BatchLimits
) -> None:
    waiting, served = list(queue), 0
    for _ in range(len(queue) + 1):
        plan = plan_batch(waiting, bounds, now_s=NOW_S, is_cancelled=is_cancelled)
        served += len(plan.rows)
        waiting = list(plan.remaining)
    assert not waiting
    assert served == sum(is_live(pending) for pending in queue)


@given(queues, limits)
def test_planning_changes_nothing(queue: list[Pending], bounds: BatchLimits) -> None:
    before = list(queue)
    first = plan_batch(queue, bounds, now_s=NOW_S, is_cancelled=is_cancelled)
    assert queue == before
    assert plan_batch(queue, bounds, now_s=NOW_S, is_cancelled=is_cancelled) == first
