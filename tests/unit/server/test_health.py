from types import SimpleNamespace

import pytest

from server import health
from server.batching import Pulse, pulse
from server.health import RestartBudget, StallWatch


class Clock:
    """The monotonic clock of the watched and of the watcher, moved by a test."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.now_s = 100.0
        for module in (health, pulse):
            patch.setattr(module, "time", SimpleNamespace(monotonic=lambda: self.now_s))

    def watch(self, stall: StallWatch, beating: Pulse, duration_s: float) -> bool:
        """Look every half second for so long; return what the last look said."""
        hung = False
        for _ in range(round(2 * duration_s)):
            self.now_s += 0.5
            hung = stall.hung(beating)
        return hung


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def test_an_engine_without_a_sign_of_life_for_too_long_is_hung(clock: Clock) -> None:
    beating, stall = Pulse(), StallWatch(10.0, 0.5)
    beating.beat()
    assert not clock.watch(stall, beating, 10.0)
    assert clock.watch(stall, beating, 0.5)


def test_signs_of_life_and_idleness_keep_an_engine_from_being_hung(clock: Clock) -> None:
    beating, stall = Pulse(), StallWatch(10.0, 0.5)
    for _ in range(3):
        beating.beat()
        assert not clock.watch(stall, beating, 9.0)
    beating.rest()
    assert not clock.watch(stall, beating, 1000.0)
    beating.beat()
    assert not clock.watch(stall, beating, 9.0)


def test_an_engine_that_was_slow_before_may_be_slow_again(clock: Clock) -> None:
    beating, stall = Pulse(), StallWatch(10.0, 0.5)
    beating.beat()
    assert not clock.watch(stall, beating, 4.0)
    beating.beat()  # so the slowest gap is 4 s
    assert not clock.watch(stall, beating, 40.0)
    assert clock.watch(stall, beating, 0.5)


@pytest.mark.parametrize("sign_before_the_stop_s", [0.1, 5.0])
def test_a_process_that_stood_still_does_not_take_its_engine_for_hung(
    clock: Clock, sign_before_the_stop_s: float
) -> None:
    beating, stall = Pulse(), StallWatch(10.0, 0.5)
    beating.beat()
    clock.watch(stall, beating, sign_before_the_stop_s)
    clock.now_s += 3600.0  # the machine was suspended
    assert not stall.hung(beating)
    assert not clock.watch(stall, beating, 4.0)
    assert clock.watch(stall, beating, 10.0)  # but it must not be silent after that


def test_restarts_are_bounded_within_an_hour(clock: Clock) -> None:
    budget = RestartBudget(2)
    assert budget.take()
    clock.now_s += 1800
    assert budget.take()
    assert not budget.take()
    clock.now_s += 1799
    assert not budget.take()
    clock.now_s += 1  # the first is an hour ago
    assert budget.take()
    assert not budget.take()


def test_no_restarts_may_be_allowed_at_all() -> None:
    assert not RestartBudget(0).take()
