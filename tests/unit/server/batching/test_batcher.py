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
    DeadlinePassedError,
    Ticket,
)
from server.ports import (
    BatchKey,
    BatchScores,
    EncodedRow,
    EngineFatalError,
    EngineStoppedError,
    Sampling,
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
        self.ran: list[list[str]] = []
        self.stats: list[BatchStats] = []
        self.deaths = 0
        self.fault: Callable[[list[str]], None] = lambda _texts: None
        self.surplus = 0
        self.batcher = Batcher(self.run, limits, self.stats.append, self.died)

    def died(self) -> None:
        self.deaths += 1

    def run(self, key: BatchKey, rows: Sequence[EncodedRow]) -> BatchScores:
        texts = [str(row.payload) for row in rows]
        self.ran.append(texts)
        self.entered.set()
        assert self.gate.wait(WAIT_S)
        self.fault(texts)
        scores = [score(text, TOPICS.labels, key.sampling, TOPICS) for text in texts]
        return BatchScores(tuple(scores + scores[: self.surplus]), 0.25, 0.125)

    def submit(self, *texts: str, key: BatchKey = KEY, timeout_s: float = 60.0) -> Ticket:
        rows = tuple(EncodedRow(len(text), False, text) for text in texts)
        ticket = Ticket(key, rows, deadline_s=time.monotonic() + timeout_s)
        self.batcher.submit(ticket)
        return ticket

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
    assert bench.batcher.waiting_tokens == 2 * (3 + 3 + 5)
    assert bench.batcher.running_for_s > 0
    bench.gate.set()
    for ticket in (blocker, *tickets):
        labels(ticket)
    assert bench.ran[1:] == [["one", "two", "three"]]
    assert bench.batcher.num_waiting == 0


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


def test_expired_work_is_told_so_and_not_run(bench: Bench) -> None:
    blocker = bench.block()
    late = bench.submit("late", timeout_s=0.0)
    bench.gate.set()
    labels(blocker)
    with pytest.raises(DeadlinePassedError):
        late.future.result(WAIT_S)
    assert ["late"] not in bench.ran


def test_batches_are_reported(bench: Bench) -> None:
    labels(bench.submit("four", "sixsix"))
    labels(bench.submit("x"))  # the second answer comes after the first report
    stats = bench.stats[0]
    assert (stats.num_rows, stats.num_tokens, stats.padded_tokens) == (2, 10, 12)
    assert stats.cost_tokens == 24
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
    assert bench.deaths == 0


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
    assert bench.deaths == 1
    with pytest.raises(EngineStoppedError):
        bench.submit("late")
