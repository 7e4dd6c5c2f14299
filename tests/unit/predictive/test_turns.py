"""dalorra_core.predictive.turns: threads get the model in the order in which they asked."""

import os
import threading
import time

import pytest

from dalorra_core.predictive.turns import Turns

PATIENCE_S = 30


def until_in_line(turns: Turns, count: int) -> None:
    """Let other threads run until so many of them wait."""
    deadline_s = time.monotonic() + PATIENCE_S
    while len(turns._waiting) < count:
        assert time.monotonic() < deadline_s
        os.sched_yield()


def test_one_thread_at_a_time_and_in_order_of_asking() -> None:
    turns, order = Turns(), []
    inside = threading.Semaphore(1)
    started = [threading.Event() for _ in range(5)]

    def take(n: int) -> None:
        started[n].set()
        with turns:
            assert inside.acquire(blocking=False)
            order.append(n)
            inside.release()

    threads = [threading.Thread(target=take, args=(n,)) for n in range(5)]
    with turns:
        for n, thread in enumerate(threads):
            thread.start()
            assert started[n].wait(PATIENCE_S)
            until_in_line(turns, n + 1)  # before the next one comes
    for thread in threads:
        thread.join(PATIENCE_S)
    assert order == list(range(5))


def test_who_waits_goes_before_the_one_that_has_just_been() -> None:
    """A plain lock could go back to the thread that let go of it, again and again."""
    turns, order, asked = Turns(), [], threading.Event()

    def wait_for_it() -> None:
        asked.set()
        with turns:
            order.append("other")

    thread = threading.Thread(target=wait_for_it)
    with turns:
        thread.start()
        assert asked.wait(PATIENCE_S)
        until_in_line(turns, 1)
    with turns:
        order.append("again")
    thread.join(PATIENCE_S)
    assert order == ["other", "again"]


def test_a_failing_turn_ends() -> None:
    turns = Turns()
    with pytest.raises(ZeroDivisionError), turns:
        _ = 1 / 0
    with turns:
        pass
