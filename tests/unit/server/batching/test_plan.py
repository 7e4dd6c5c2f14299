from dataclasses import replace

import pytest

from server.batching import BatchLimits, BatchPlan, Pending, Ticket, plan_batch, release
from server.ports import BatchKey, EncodedRow, Estimator, Sampling

LIMITS = BatchLimits(max_rows=4, max_tokens=100, max_padding=0.5, wait_s=0.5)


def row(
    tokens: int,
    *,
    adapter: str = "a",
    samples: int = 1,
    estimator: Estimator = "monte_carlo",
    queued_s: float = 0.0,
    deadline_s: float = 100.0,
) -> Pending:
    key = BatchKey(adapter, Sampling(num_samples=samples, estimator=estimator))
    ticket = Ticket(key, (EncodedRow(tokens, False, None),), deadline_s=deadline_s)
    return Pending(ticket, 0, queued_s)


def row_of_two_passes() -> Pending:
    """Return a row whose three samples share the lower half of the layers."""
    ticket = Ticket(BatchKey("a", Sampling(3), 0.5), row(10).ticket.rows, deadline_s=100.0)
    return Pending(ticket, 0, 0.0)


def row_without_padding(tokens: int) -> Pending:
    key = BatchKey("a", Sampling(1), unpadded=True)
    return Pending(Ticket(key, row(tokens).ticket.rows, deadline_s=100.0), 0, 0.0)


def patient_row(tokens: int, *, queued_s: float) -> Pending:
    key = BatchKey("a", Sampling(num_samples=1))
    rows = (EncodedRow(tokens, False, None),)
    return Pending(Ticket(key, rows, deadline_s=100.0, priority="batch"), 0, queued_s)


def plan(*waiting: Pending, now_s: float = 1.0, limits: BatchLimits = LIMITS) -> BatchPlan:
    return plan_batch(waiting, limits, now_s=now_s, is_cancelled=lambda p: p.ticket.settled)


def test_nothing_waiting_plans_nothing() -> None:
    assert plan() == BatchPlan((), (), (), (), full=False)


def test_rows_run_in_order_of_arrival() -> None:
    rows = [row(10), row(11), row(12)]
    assert plan(*rows).rows == tuple(rows)


def test_the_row_limit_ends_the_batch() -> None:
    rows = [row(5) for _ in range(6)]
    result = plan(*rows)
    assert (result.rows, result.remaining, result.full) == (tuple(rows[:4]), tuple(rows[4:]), True)


def test_rows_without_padding_join_whatever_their_lengths() -> None:
    rows = [row_without_padding(n) for n in (2, 60, 3, 34, 1)]
    result = plan(*rows)
    assert (result.rows, result.remaining, result.full) == (tuple(rows[:4]), tuple(rows[4:]), True)
    assert plan(*rows, limits=replace(LIMITS, max_tokens=98)).rows == tuple(rows[:3])
    assert plan(*rows, limits=replace(LIMITS, max_tokens=99)).rows == tuple(rows[:4])
    padded = row(60)
    mixed = plan(*rows[:2], padded, limits=replace(LIMITS, mix_adapters=True, max_tokens=1000))
    assert mixed.remaining == ()
    short = replace(LIMITS, mix_adapters=True, max_tokens=1000, max_padding=0.1)
    assert plan(*rows[:2], padded, limits=short).remaining == (padded,)


def test_padding_counts_against_the_budget() -> None:
    rows = [row(20), row(20), row(40)]  # 3 * 40 is too much, though the real tokens are 80
    result = plan(*rows)
    assert (result.rows, result.remaining, result.full) == (tuple(rows[:2]), (rows[2],), True)


def test_samples_multiply_the_cost() -> None:
    assert len(plan(*[row(20, samples=2) for _ in range(4)]).rows) == 2


def test_what_the_samples_of_a_row_share_counts_once() -> None:
    half = [row_of_two_passes() for _ in range(6)]
    assert len(plan(*half, limits=replace(LIMITS, max_tokens=80)).rows) == 4
    assert len(plan(*half, limits=replace(LIMITS, max_tokens=79)).rows) == 3


def test_the_row_that_shares_least_sets_the_cost_of_a_mixed_batch() -> None:
    mixing = replace(LIMITS, mix_adapters=True, max_tokens=80)
    cheap, dear = [row_of_two_passes() for _ in range(4)], row(10, adapter="b", samples=3)
    assert plan(*cheap, limits=mixing).rows == tuple(cheap)
    assert plan(cheap[0], dear, *cheap[1:], limits=mixing).rows == (cheap[0], dear)


def test_one_deterministic_pass_costs_one_whatever_the_samples() -> None:
    rows = [row(20, samples=50, estimator="mean_mask") for _ in range(4)]
    assert len(plan(*rows).rows) == 4


def test_nobody_overtakes_a_row_that_was_too_much() -> None:
    rows = [row(40), row(40), row(60), row(1)]
    assert plan(*rows).remaining == (rows[2], rows[3])


def test_an_oversized_row_runs_alone() -> None:
    big, small = row(5000), row(5)
    result = plan(big, small)
    assert (result.rows, result.remaining, result.full) == ((big,), (small,), True)


def test_rows_of_another_key_keep_their_place() -> None:
    a1, b1, a2, b2 = row(5), row(5, adapter="b"), row(5), row(5, samples=3)
    result = plan(a1, b1, a2, b2)
    assert (result.rows, result.remaining) == ((a1, a2), (b1, b2))


def test_rows_of_other_adapters_and_seeds_join_where_the_engine_mixes_them() -> None:
    mixing = replace(LIMITS, mix_adapters=True)
    a1, b1, a2, b3 = row(5), row(5, adapter="b"), row(5), row(5, adapter="b", samples=3)
    result = plan(a1, b1, a2, b3, limits=mixing)
    assert (result.rows, result.remaining) == ((a1, b1, a2), (b3,))


def test_only_interactive_rows_within_the_delay_overtake_a_row_of_priority_batch() -> None:
    patient = patient_row(60, queued_s=1.0)
    soon, late = row(60, queued_s=2.5), row(60, queued_s=3.5)
    limits = replace(LIMITS, priority_delay_s=2.0)
    waiting = [patient, soon, late]
    order: list[Pending] = []
    while waiting:
        result = plan(*waiting, now_s=4.0, limits=limits)
        order += result.rows
        waiting = list(result.remaining)
    assert order == [soon, patient, late]


def test_without_a_delay_rows_run_in_order_of_arrival_whatever_their_priority() -> None:
    rows = [patient_row(5, queued_s=1.0), row(5, queued_s=1.0), row(5, queued_s=2.0)]
    assert plan(*rows, limits=replace(LIMITS, priority_delay_s=0.0)).rows == tuple(rows)


def test_a_row_of_priority_batch_is_released_by_the_time_it_came() -> None:
    rows = [patient_row(5, queued_s=0.5), row(5, queued_s=0.9)]
    result = release(plan(*rows), LIMITS, now_s=1.0, alone=False, stopping=False)
    assert tuple(result) == ("timeout", None)


def test_a_row_of_very_different_length_waits_for_the_next_batch() -> None:
    first, second, long, similar = row(5), row(5), row(24), row(6)
    result = plan(first, second, long, similar)
    assert result.rows == (first, second, similar)
    assert (result.remaining, result.full) == ((long,), False)


def test_a_few_tokens_of_padding_never_count() -> None:
    assert len(plan(row(1), row(3)).rows) == 2


def test_expired_and_cancelled_rows_are_taken_out() -> None:
    gone, late, live = row(5), row(5, deadline_s=1.0), row(5)
    gone.ticket.future.cancel()
    result = plan(gone, late, live)
    assert (result.rows, result.expired, result.dropped) == ((live,), (late,), (gone,))


def test_a_full_batch_is_known_before_the_next_row_comes() -> None:
    assert plan(row(30), row(30), row(30)).full
    assert not plan(row(30), row(30)).full


@pytest.mark.parametrize(
    ("rows", "now_s", "stopping", "expected"),
    [
        ([], 1.0, False, (None, None)),
        ([], 1.0, True, (None, None)),
        ([row(5, queued_s=1.0)], 1.0, True, ("drain", None)),
        ([row(5, queued_s=1.0) for _ in range(4)], 1.0, False, ("full", None)),
        ([row(5, queued_s=1.0)], 1.5, False, ("timeout", None)),
        ([row(5, queued_s=1.0, deadline_s=1.4)], 1.25, False, ("deadline", None)),
        ([row(5, queued_s=1.0)], 1.25, False, (None, 0.25)),
    ],
)
def test_release(
    rows: list[Pending],
    now_s: float,
    stopping: bool,
    expected: tuple[str | None, float | None],
) -> None:
    result = release(plan(*rows, now_s=now_s), LIMITS, now_s=now_s, alone=False, stopping=stopping)
    assert tuple(result) == expected


def test_nobody_waits_for_company_that_is_not_on_its_way() -> None:
    result = release(
        plan(row(5, queued_s=1.0), now_s=1.25), LIMITS, now_s=1.25, alone=True, stopping=False
    )
    assert tuple(result) == ("alone", None)
