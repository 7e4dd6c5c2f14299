import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError

import pytest

from server.batching import (
    Batcher,
    BatchFailedError,
    BatchLimits,
    BatchStats,
    BatchTooLargeError,
    DeadlinePassedError,
    FailureReason,
    Ticket,
)
from server.ports import (
    BatchKey,
    BatchRow,
    BatchScores,
    EncodedRow,
    EngineFatalError,
    EngineMemoryError,
    EngineStoppedError,
    EngineUnavailableError,
    RowScores,
    Sampling,
    Wanted,
)
from tests.support.fake_engine import TOPICS, LostError, score

KEY = BatchKey("topics", Sampling(num_samples=2))
WAIT_S = 5.0


class Bench:
    """A batcher over a function, with a gate and a record of what ran."""

    def __init__(self, limits: BatchLimits) -> None:
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Event()
        self.left = threading.Event()
        self.ran: list[list[str]] = []
        self.stats: list[BatchStats] = []
        self.failures: list[FailureReason] = []
        self.died = threading.Event()
        self.fault: Callable[[list[str]], None] = lambda _texts: None
        self.surplus = 0
        self.left_out: set[str] = set()
        self.unwanted: list[str] = []
        self.batcher = Batcher(self.run, limits, self, self.died.set)

    def batch_finished(self, stats: BatchStats) -> None:
        self.stats.append(stats)

    def batch_failed(self, reason: FailureReason) -> None:
        self.failures.append(reason)

    def run(self, rows: Sequence[BatchRow], wanted: Wanted) -> BatchScores:
        texts = [str(row.row.payload) for row in rows]
        self.ran.append(texts)
        self.entered.set()
        assert self.gate.wait(WAIT_S)
        self.fault(texts)
        scores: list[RowScores | None] = []
        for place, text in enumerate(texts):
            asked = wanted(place)
            if not asked:
                self.unwanted.append(text)
            keep = asked and text not in self.left_out
            sampling = rows[place].key.sampling
            scores.append(score(text, TOPICS.labels, sampling, TOPICS) if keep else None)
        self.left.set()
        return BatchScores(tuple(scores + scores[: self.surplus]), 0.25, 0.125)

    def make(self, *texts: str, key: BatchKey = KEY, timeout_s: float = 60.0) -> Ticket:
        rows = tuple(EncodedRow(len(text), False, text) for text in texts)
        return Ticket(key, rows, deadline_s=time.monotonic() + timeout_s)

    def submit(self, *texts: str, key: BatchKey = KEY, timeout_s: float = 60.0) -> Ticket:
        ticket = self.make(*texts, key=key, timeout_s=timeout_s)
        self.batcher.submit(ticket)
        return ticket

    def failed_in_row(self) -> int:
        """End the engine thread, so that everything is counted, and return the count."""
        assert self.batcher.stop(WAIT_S)
        return self.batcher.failed_in_row

    def join(self) -> None:
        """Wait for the engine thread to end."""
        self.batcher._thread.join(WAIT_S)

    def block(self) -> Ticket:
        """Keep the engine busy with a row of its own until the gate opens."""
        self.gate.clear()
        ticket = self.submit("blocker")
        assert self.entered.wait(WAIT_S)
        return ticket


@pytest.fixture
def bench() -> Iterator[Bench]:
    bench = Bench(BatchLimits(max_rows=8, max_tokens=1000, max_padding=1.0, wait_s=0.0))
    bench.batcher.start()
    yield bench
    bench.gate.set()
    bench.batcher.stop(WAIT_S)


def labels(ticket: Ticket) -> list[str]:
    return [row.label for row in ticket.future.result(WAIT_S).rows]


def test_answers_come_in_the_order_of_the_request_though_rows_run_shortest_first(
    bench: Bench,
) -> None:
    ticket = bench.submit("a long text", "b", "middle")
    expected = [score(t, TOPICS.labels, KEY.sampling, TOPICS).label for t in ticket_texts(ticket)]
    assert labels(ticket) == expected
    assert bench.ran == [["b", "middle", "a long text"]]


def ticket_texts(ticket: Ticket) -> list[str]:
    return [str(row.payload) for row in ticket.rows]


def test_requests_of_different_clients_share_a_batch(bench: Bench) -> None:
    blocker = bench.block()
    tickets = [bench.submit("one"), bench.submit("two"), bench.submit("three")]
    assert bench.batcher.num_waiting == 3
    assert bench.batcher.waiting_rows("interactive") == 3
    assert bench.batcher.waiting_tokens("interactive") == 2 * (3 + 3 + 5)
    assert bench.batcher.waiting_rows("batch") == bench.batcher.waiting_tokens("batch") == 0
    assert bench.batcher.silent_for_s > 0
    bench.gate.set()
    for ticket in (blocker, *tickets):
        labels(ticket)
    assert bench.ran[1:] == [["one", "two", "three"]]
    assert bench.batcher.num_waiting == 0


def test_requests_of_different_adapters_share_a_batch_where_the_engine_mixes() -> None:
    other = BatchKey("other", Sampling(num_samples=2, seed=7))
    for mix, expected in ((True, [["one", "two"]]), (False, [["one"], ["two"]])):
        bench = Bench(BatchLimits(max_padding=1.0, wait_s=0.0, mix_adapters=mix))
        bench.batcher.start()
        blocker = bench.block()
        tickets = [bench.submit("one"), bench.submit("two", key=other)]
        bench.gate.set()
        for ticket in (blocker, *tickets):
            labels(ticket)
        assert bench.ran[1:] == expected
        assert bench.batcher.stop(WAIT_S)


def test_a_request_too_large_for_one_batch_is_answered_from_several(bench: Bench) -> None:
    ticket = bench.submit(*(f"row {n}" for n in range(20)))
    answer = ticket.future.result(WAIT_S)
    assert [len(batch) for batch in bench.ran] == [8, 8, 4]
    assert len(answer.rows) == 20
    assert answer.forward_s == pytest.approx(0.75)
    assert answer.uq_s == pytest.approx(0.375)
    assert answer.queue_s >= 0


def test_a_poisonous_row_fails_alone(bench: Bench) -> None:
    def fault(texts: list[str]) -> None:
        if "poison" in texts:
            raise ValueError("bad row")

    bench.fault = fault
    blocker = bench.block()
    good, bad, other = bench.submit("good"), bench.submit("poison"), bench.submit("other")
    bench.gate.set()
    labels(blocker)
    with pytest.raises(BatchFailedError):
        bad.future.result(WAIT_S)
    assert len(labels(good)) == len(labels(other)) == 1
    assert bench.ran[1:] == [["good", "poison", "other"], ["good"], ["poison"], ["other"]]
    assert labels(bench.submit("next"))
    assert bench.failures == ["error", "error"]
    assert bench.failed_in_row() == 0


def test_what_depends_on_something_that_is_away_fails_at_once_and_is_not_run_again(
    bench: Bench,
) -> None:
    def away(texts: list[str]) -> None:
        if "blocker" not in texts:
            raise EngineUnavailableError("a server far away, with an address")

    blocker = bench.block()
    bench.fault = away
    tickets = [bench.submit("one", "two"), bench.submit("three")]
    bench.gate.set()
    assert labels(blocker)
    for ticket in tickets:
        with pytest.raises(EngineUnavailableError) as told:
            ticket.future.result(WAIT_S)
        assert str(told.value) == ""
    assert bench.ran == [["blocker"], ["one", "two", "three"]]
    assert bench.failures == ["unavailable"]
    bench.fault = lambda _texts: None
    assert labels(bench.submit("fine"))
    assert bench.failed_in_row() == 0


def test_a_request_that_is_settled_is_not_run_again_after_a_failure(bench: Bench) -> None:
    tickets: list[Ticket] = []

    def fault(texts: list[str]) -> None:
        if len(texts) > 1:
            tickets[0].future.cancel()
            raise ValueError("too many")

    bench.fault = fault
    blocker = bench.block()
    tickets += [bench.submit("one"), bench.submit("two")]
    bench.gate.set()
    labels(blocker)
    assert labels(tickets[1])
    assert bench.ran[1:] == [["one", "two"], ["two"]]


def test_a_wrong_number_of_answers_is_an_error(bench: Bench) -> None:
    bench.surplus = 1
    with pytest.raises(BatchFailedError):
        bench.submit("one").future.result(WAIT_S)
    bench.surplus = 0
    assert labels(bench.submit("two"))


def test_a_row_left_out_although_it_is_wanted_is_an_error(bench: Bench) -> None:
    bench.left_out = {"one"}
    with pytest.raises(BatchFailedError):
        bench.submit("one", "two").future.result(WAIT_S)
    assert bench.failures == ["error"]
    assert labels(bench.submit("three"))


def refuse_bad(texts: list[str]) -> None:
    if "bad" in texts:
        raise FloatingPointError("a probability is not finite")


def test_failed_batches_are_counted(bench: Bench) -> None:
    bench.fault = refuse_bad
    for _ in range(2):
        with pytest.raises(BatchFailedError):
            bench.submit("bad").future.result(WAIT_S)
    assert bench.failed_in_row() == 2


def test_a_batch_that_succeeds_ends_a_row_of_failed_ones(bench: Bench) -> None:
    bench.fault = refuse_bad
    with pytest.raises(BatchFailedError):
        bench.submit("bad").future.result(WAIT_S)
    assert labels(bench.submit("good"))
    assert bench.failed_in_row() == 0


def test_forgiving_counts_from_zero_again(bench: Bench) -> None:
    bench.fault = refuse_bad
    with pytest.raises(BatchFailedError):
        bench.submit("bad").future.result(WAIT_S)
    assert bench.failed_in_row() == 1
    bench.batcher.forgive()
    assert bench.batcher.failed_in_row == 0


def more_than(num_rows: int) -> Callable[[list[str]], None]:
    def fault(texts: list[str]) -> None:
        if len(texts) > num_rows:
            raise EngineMemoryError(f"{len(texts)} rows do not fit")

    return fault


def test_a_batch_that_does_not_fit_is_answered_in_two_halves(bench: Bench) -> None:
    bench.fault = more_than(2)
    blocker = bench.block()
    tickets = [bench.submit(text) for text in ("a1", "b1", "c1")]
    bench.gate.set()
    for ticket in (blocker, *tickets):
        assert labels(ticket)
    assert bench.ran[1:] == [["a1", "b1", "c1"], ["a1"], ["b1", "c1"]]
    assert bench.failures == ["memory"]
    assert bench.failed_in_row() == 0


def test_one_request_of_many_rows_is_halved_too(bench: Bench) -> None:
    bench.fault = more_than(2)
    ticket = bench.submit("a1", "b1", "c1", "d1")
    assert len(labels(ticket)) == 4
    assert bench.ran == [["a1", "b1", "c1", "d1"], ["a1", "b1"], ["c1", "d1"]]


def test_of_a_half_that_does_not_fit_either_only_the_request_to_blame_fails(bench: Bench) -> None:
    def fault(texts: list[str]) -> None:
        if "huge" in texts:
            raise EngineMemoryError

    bench.fault = fault
    blocker = bench.block()
    good = [bench.submit("a1"), bench.submit("b1"), bench.submit("d1")]
    bad = bench.submit("huge")
    bench.gate.set()
    for ticket in (blocker, *good):
        assert labels(ticket)
    with pytest.raises(BatchTooLargeError):
        bad.future.result(WAIT_S)
    assert bench.ran[1:] == [
        ["a1", "b1", "d1", "huge"],
        ["a1", "b1"],
        ["d1", "huge"],
        ["d1"],
        ["huge"],
    ]
    assert labels(bench.submit("next"))
    assert bench.failures == ["memory", "memory", "memory"]


def test_the_second_half_of_a_request_that_failed_is_not_run(bench: Bench) -> None:
    bench.fault = more_than(1)
    with pytest.raises(BatchTooLargeError):
        bench.submit("a1", "b1", "c1", "d1").future.result(WAIT_S)
    assert labels(bench.submit("next"))
    assert bench.ran == [["a1", "b1", "c1", "d1"], ["a1", "b1"], ["next"]]


def test_a_single_row_that_does_not_fit_is_tried_once_more(bench: Bench) -> None:
    bench.fault = more_than(0)
    with pytest.raises(BatchTooLargeError):
        bench.submit("huge").future.result(WAIT_S)
    assert bench.ran == [["huge"], ["huge"]]
    assert bench.failed_in_row() == 1


def test_a_half_that_fails_otherwise_blames_only_the_guilty(bench: Bench) -> None:
    def fault(texts: list[str]) -> None:
        more_than(2)(texts)
        if "poison" in texts:
            raise ValueError

    bench.fault = fault
    blocker = bench.block()
    first, bad, last = bench.submit("a1"), bench.submit("poison"), bench.submit("b1")
    bench.gate.set()
    for ticket in (blocker, first, last):
        assert labels(ticket)
    with pytest.raises(BatchFailedError):
        bad.future.result(WAIT_S)
    assert bench.failures == ["memory", "error", "error"]


def test_cancelled_work_is_dropped_before_it_costs_anything(bench: Bench) -> None:
    blocker = bench.block()
    gone, stays = bench.submit("gone"), bench.submit("stays")
    assert gone.future.cancel()
    bench.gate.set()
    labels(blocker)
    assert labels(stays)
    assert ["gone"] not in bench.ran
    assert not gone.started


def test_a_client_that_leaves_while_running_disturbs_nobody(bench: Bench) -> None:
    blocker = bench.block()
    assert blocker.started
    blocker.future.cancel()
    bench.gate.set()
    assert labels(bench.submit("next"))
    with pytest.raises(CancelledError):
        blocker.future.result(WAIT_S)
    assert bench.unwanted == ["blocker"]  # the engine was told not to compute it
    assert bench.failures == []


def test_expired_work_is_told_so_and_not_run(bench: Bench) -> None:
    blocker = bench.block()
    late = bench.submit("late", timeout_s=0.0)
    bench.gate.set()
    labels(blocker)
    with pytest.raises(DeadlinePassedError):
        late.future.result(WAIT_S)
    assert ["late"] not in bench.ran


def test_work_whose_deadline_passes_while_it_runs_is_told_so_at_once(bench: Bench) -> None:
    late = bench.make("late")

    def fault(_texts: list[str]) -> None:
        late.deadline_s = time.monotonic()

    bench.fault = fault
    bench.batcher.submit(late)
    with pytest.raises(DeadlinePassedError):
        late.future.result(WAIT_S)
    assert bench.failed_in_row() == 0
    assert bench.unwanted == ["late"]  # the engine was told not to compute it
    assert bench.failures == []


def test_a_row_that_was_left_out_does_not_hold_up_its_batch_mates(bench: Bench) -> None:
    blocker = bench.block()
    gone, stays = bench.submit("gone"), bench.submit("stays")

    def fault(texts: list[str]) -> None:
        if "gone" in texts:
            gone.future.cancel()

    bench.fault = fault
    bench.gate.set()
    labels(blocker)
    assert labels(stays)
    assert bench.unwanted == ["gone"]
    assert bench.failures == []


def test_batches_are_reported(bench: Bench) -> None:
    labels(bench.submit("four", "sixsix"))
    labels(bench.submit("x"))  # the second answer comes after the first report
    stats = bench.stats[0]
    assert (stats.num_rows, stats.num_tokens, stats.pass_tokens) == (2, 10, 12)
    assert stats.cost_tokens == 24
    assert stats.reserved_tokens == 24
    assert stats.reason == "timeout"
    assert len(stats.waited_s) == 2
    assert (stats.forward_s, stats.uq_s) == (0.25, 0.125)
    assert stats.duration_s >= 0


def test_an_idle_engine_waits_for_company_until_the_batch_is_full() -> None:
    bench = Bench(BatchLimits(max_rows=2, max_tokens=1000, wait_s=60.0))
    bench.batcher.start()
    first = bench.submit("one")
    assert not first.started
    second = bench.submit("two")
    assert labels(first)
    assert labels(second)
    assert bench.ran == [["one", "two"]]
    bench.batcher.stop(WAIT_S)


def test_stopping_finishes_the_queue_at_once(bench: Bench) -> None:
    blocker = bench.block()
    waiting = bench.submit("waiting")
    stopped: list[bool] = []
    stopper = threading.Thread(target=lambda: stopped.append(bench.batcher.stop(WAIT_S)))
    stopper.start()
    bench.gate.set()
    stopper.join(WAIT_S)
    assert stopped == [True]
    assert labels(blocker)
    assert labels(waiting)
    with pytest.raises(EngineStoppedError):
        bench.submit("late")
    assert not bench.died.is_set()


def test_stopping_gives_up_on_a_hung_engine(bench: Bench) -> None:
    blocker = bench.block()
    waiting = bench.submit("waiting")
    assert not bench.batcher.stop(0.0)
    for ticket in (blocker, waiting):
        with pytest.raises(EngineStoppedError):
            ticket.future.result(WAIT_S)
    assert not bench.batcher.alive


@pytest.mark.parametrize("error", [LostError(), EngineFatalError("device lost")])
def test_when_the_engine_dies_everyone_who_waits_is_told(
    bench: Bench, error: BaseException
) -> None:
    def fault(_texts: list[str]) -> None:
        raise error

    blocker = bench.block()
    waiting = bench.submit("waiting")
    bench.fault = fault
    bench.gate.set()
    for ticket in (blocker, waiting):
        with pytest.raises(EngineStoppedError):
            ticket.future.result(WAIT_S)
    assert not bench.batcher.alive
    assert bench.died.wait(WAIT_S)
    assert bench.failures == ["fatal"]
    with pytest.raises(EngineStoppedError):
        bench.submit("late")


def test_a_hung_thread_that_comes_back_is_ignored_and_ends(bench: Bench) -> None:
    blocker = bench.block()
    waiting = bench.submit("waiting")
    bench.batcher.abandon()
    for ticket in (blocker, waiting):
        with pytest.raises(EngineStoppedError):
            ticket.future.result(WAIT_S)
    assert not bench.batcher.alive
    assert not bench.batcher.finished
    bench.left.clear()
    bench.gate.set()
    assert bench.left.wait(WAIT_S)
    bench.join()
    assert bench.batcher.finished
    assert bench.unwanted == ["blocker"]
    assert bench.ran == [["blocker"]]
    assert bench.stats == bench.failures == []
    assert not bench.died.is_set()
    with pytest.raises(EngineStoppedError):
        blocker.future.result(WAIT_S)


@pytest.mark.parametrize("error", [LostError(), ValueError(), EngineMemoryError()])
def test_a_hung_thread_that_comes_back_with_an_error_ends_unnoticed(
    bench: Bench, error: BaseException
) -> None:
    def fault(_texts: list[str]) -> None:
        raise error

    bench.block()
    bench.fault = fault
    bench.batcher.abandon()
    bench.gate.set()
    bench.join()
    assert bench.ran == [["blocker"]]
    assert bench.failures == []
    assert not bench.died.is_set()


def test_stopping_ends_at_once_when_the_engine_is_given_up(bench: Bench) -> None:
    bench.block()
    stopped: list[bool] = []
    stopper = threading.Thread(target=lambda: stopped.append(bench.batcher.stop(WAIT_S)))
    stopper.start()
    bench.batcher.abandon()
    stopper.join(WAIT_S)
    assert stopped == [False]


def test_an_idle_engine_is_not_silent_and_a_batch_gives_signs(bench: Bench) -> None:
    assert bench.batcher.silent_for_s == 0
    assert labels(bench.submit("one", "two"))
    assert bench.failed_in_row() == 0
    assert bench.batcher.silent_for_s == 0
    assert bench.batcher.pulse.slowest_gap_s > 0


def test_rows_of_priority_batch_let_interactive_ones_go_first() -> None:
    bench = Bench(BatchLimits(max_rows=1, wait_s=0.0, priority_delay_s=60.0))
    bench.batcher.start()
    blocker = bench.block()
    patient = bench.make("patient")
    patient.priority = "batch"
    bench.batcher.submit(patient)
    eager = bench.submit("eager")
    assert bench.batcher.waiting_rows("batch") == bench.batcher.waiting_rows("interactive") == 1
    bench.gate.set()
    for ticket in (blocker, patient, eager):
        assert labels(ticket)
    assert bench.ran[1:] == [["eager"], ["patient"]]
    assert bench.batcher.stop(WAIT_S)
