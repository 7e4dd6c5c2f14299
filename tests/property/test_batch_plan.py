"""Invariants of planning: nothing is lost, overtakes, starves or overflows."""

from hypothesis import given
from hypothesis import strategies as st

from server.batching import BatchLimits, Pending, Ticket, plan_batch
from server.ports import BatchKey, EncodedRow, Sampling

NOW_S = 10.0


def make_row(values: tuple[str, int, int, float, bool]) -> Pending:
    adapter, samples, tokens, deadline_s, cancelled = values
    key = BatchKey(adapter, Sampling(num_samples=samples))
    ticket = Ticket(key, (EncodedRow(tokens, False, None),), deadline_s=deadline_s)
    if cancelled:
        ticket.future.cancel()
    return Pending(ticket, 0, 0.0)


rows = st.tuples(
    st.sampled_from("ab"),
    st.integers(1, 3),
    st.integers(1, 60),
    st.sampled_from([5.0, 50.0, 60.0]),
    st.sampled_from([False, False, False, True]),
).map(make_row)
queues = st.lists(rows, max_size=20)
limits = st.builds(
    BatchLimits,
    max_rows=st.integers(1, 6),
    max_tokens=st.integers(1, 200),
    max_padding=st.floats(0, 1),
)


def is_cancelled(pending: Pending) -> bool:
    return pending.ticket.settled


def is_live(pending: Pending) -> bool:
    return not is_cancelled(pending) and pending.deadline_s > NOW_S


@given(queues, limits)
def test_every_row_is_in_exactly_one_place_and_in_order(
    queue: list[Pending], bounds: BatchLimits
) -> None:
    plan = plan_batch(queue, bounds, now_s=NOW_S, is_cancelled=is_cancelled)
    parts = [plan.rows, plan.remaining, plan.expired, plan.dropped]
    places = {id(pending): place for place, pending in enumerate(queue)}
    assert sorted(places[id(p)] for part in parts for p in part) == list(range(len(queue)))
    for part in parts:
        order = [places[id(pending)] for pending in part]
        assert order == sorted(order)
    assert all(is_cancelled(pending) for pending in plan.dropped)
    assert all(is_live(pending) for pending in (*plan.rows, *plan.remaining))


@given(queues, limits)
def test_a_batch_keeps_its_bounds_and_its_key(queue: list[Pending], bounds: BatchLimits) -> None:
    plan = plan_batch(queue, bounds, now_s=NOW_S, is_cancelled=is_cancelled)
    if not plan.rows:
        return
    cost = max(p.num_tokens for p in plan.rows) * len(plan.rows)
    cost *= plan.rows[0].key.sampling.passes
    assert len({pending.key for pending in plan.rows}) == 1
    assert len(plan.rows) <= bounds.max_rows
    assert cost <= bounds.max_tokens or len(plan.rows) == 1


@given(queues, limits)
def test_the_oldest_live_row_always_runs_next(queue: list[Pending], bounds: BatchLimits) -> None:
    plan = plan_batch(queue, bounds, now_s=NOW_S, is_cancelled=is_cancelled)
    live = [pending for pending in queue if is_live(pending)]
    assert plan.rows[:1] == tuple(live[:1])


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
