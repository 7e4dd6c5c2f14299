"""dalorra_core.training.progress: what a log file shows of a run."""

import pytest
from rich.console import Console

from dalorra_core.training import progress as module
from dalorra_core.training.progress import Progress


class Clock:
    """A monotonic clock that moves when told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(module.time, "monotonic", clock.monotonic)
    return clock


def test_lines_show_values_speed_and_time_left(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    with Progress(100, 20) as progress:
        for _ in range(10):
            clock.now += 60
            progress.advance(tokens=120)
        assert progress.tokens_per_second == pytest.approx(2.0)
        progress.show({"loss": 0.51234, "nll": 0.5})
    # 70 steps left at a minute each
    assert capsys.readouterr().err == "step 30/100  loss 0.5123  nll 0.5  left 1:10:00\n"


def test_lines_come_every_few_seconds_and_at_the_end(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    with Progress(30, 0) as progress:
        for _ in range(30):
            clock.now += 1
            progress.advance(1)
            progress.show({"loss": 1.0})
    steps = [line.split()[1] for line in capsys.readouterr().err.splitlines()]
    assert steps == ["1/30", "16/30", "30/30"]


def test_what_comes_before_the_first_step_is_shown_and_no_part_of_the_speed(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    with Progress(4, 0) as progress:
        advance = progress.preparing("rows", 30)
        for _ in range(3):
            clock.now += 10
            advance(10)
        for _ in range(2):
            clock.now += 60
            progress.advance(tokens=120)
        assert progress.tokens_per_second == pytest.approx(2.0)
        progress.show({"loss": 1.0})
    assert capsys.readouterr().err.splitlines() == [
        "rows: 10 of 30",
        "rows: 30 of 30",
        "step 2/4  loss 1  left 0:02:00",
    ]


def test_a_terminal_shows_a_bar_with_the_values(
    clock: Clock, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        module, "Console", lambda file: Console(file=file, force_terminal=True, width=100)
    )
    with Progress(8, 2) as progress:
        progress.preparing("rows", 30)(10)
        clock.now += 1
        progress.advance(10)
        progress.show({"loss": 0.25})
        progress.note("step 3 validation")
    shown = capsys.readouterr().err
    assert "rows: 10 of 30" in shown
    assert "3/8" in shown
    assert "loss 0.25" in shown
    assert "step 3 validation" in shown


def test_other_processes_show_nothing(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(1, 0, enabled=False) as progress:
        clock.now += 1
        progress.advance(10)
        progress.show({"loss": 1.0})
        progress.note("validation")
    assert capsys.readouterr().err == ""
