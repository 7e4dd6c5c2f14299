from types import SimpleNamespace

import pytest

from server.batching import Pulse, pulse


class Clock:
    """A monotonic clock that a test moves."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.now_s = 100.0
        patch.setattr(pulse, "time", SimpleNamespace(monotonic=lambda: self.now_s))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def test_silence_is_counted_from_the_last_sign_of_a_batch(clock: Clock) -> None:
    heart = Pulse()
    assert heart.silent_for_s == 0
    heart.beat()
    clock.now_s += 2
    assert heart.silent_for_s == 2
    heart.beat()
    clock.now_s += 1
    assert heart.silent_for_s == 1


def test_an_idle_engine_is_never_silent(clock: Clock) -> None:
    heart = Pulse()
    heart.beat()
    heart.rest()
    clock.now_s += 1000
    assert heart.silent_for_s == 0
    assert heart.last_sign_s is None


def test_the_slowest_gap_is_within_a_batch_and_counts_its_end(clock: Clock) -> None:
    heart = Pulse()
    for gap_s in (1.0, 3.0, 2.0):
        heart.beat()
        clock.now_s += gap_s
    heart.rest()
    assert heart.slowest_gap_s == 3
    clock.now_s += 1000  # idle
    heart.beat()
    clock.now_s += 5
    heart.rest()
    assert heart.slowest_gap_s == 5
