"""What a person sees of a bench while it runs: a live table, or plain lines in a log."""

import json
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from time import monotonic
from types import TracebackType
from typing import Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from dalorra_core.bench.keys import IN, Job, Planned
from dalorra_core.bench.runs import TRAINING
from dalorra_core.bench.store import Record, cell_fault, run_directory

__all__ = ["Board", "duration", "outcome"]

_SHOWN = ("accuracy", "nll", "ece")
_TAIL_BYTES = 4096
_LAST_LINES = 4


class Board:
    """Shows how far a grid is: a table of cells and the runs at work, or a line for each event.

    Args:
        planned: The cells of the grid.
        records: Key to record of the runs that are finished; grows.
        out: Directory of the bench.
        total: Runs that are still to be done.
        console: Where to show it; a table when it is a terminal, lines when not.
    """

    def __init__(
        self,
        planned: Sequence[Planned],
        records: dict[str, Record],
        out: Path,
        total: int,
        console: Console,
    ) -> None:
        self.records = records
        self._planned, self._out, self._console = planned, out, console
        self._total, self._ended = total, 0
        self._began = monotonic()
        self._at_work: dict[str, tuple[Job, str, float, str]] = {}
        self._last: list[str] = []
        self._live = (
            Live(get_renderable=self.picture, console=console, auto_refresh=False)
            if console.is_terminal
            else None
        )

    def __enter__(self) -> Self:
        """Begin to show."""
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Leave the terminal as it was."""
        if self._live is not None:
            self._live.stop()

    def started(self, job: Job, device: str) -> None:
        """Show a run that begins."""
        self._at_work[job.key] = (job, device, monotonic(), "starting")
        self._line(f"{_name(job)} begins on {device} ({job.key})")

    def note(self, job: Job, text: str) -> None:
        """Show what a run does; in a log, only that it trains or scores."""
        _, device, since, _ = self._at_work[job.key]
        self._at_work[job.key] = (job, device, since, text)
        if self._live is None:
            self._line(f"{_name(job)}: {text}")

    def ended(self, job: Job, record: Record) -> None:
        """Show how a run ended."""
        _, _, since, _ = self._at_work.pop(job.key)
        self.records[job.key] = record
        self._ended += 1
        seconds = duration(monotonic() - since)
        self._line(f"[{self._ended}/{self._total}] {_name(job)}: {outcome(record)} ({seconds})")

    def tick(self) -> None:
        """Draw again."""
        if self._live is not None:
            self._live.refresh()

    def picture(self) -> RenderableType:
        """Return what a terminal shows."""
        parts: list[RenderableType] = [self._cells()]
        for job, device, since, text in self._at_work.values():
            step = _step(run_directory(self._out, job.key) / TRAINING)
            where = f"{device} {_name(job)} {duration(monotonic() - since)}"
            total = job.cell.config.optim.steps
            parts.append(Text(f"{where}  {f'step {step}/{total}  ' if step else ''}{text}"))
        parts += [Text(line, style="dim") for line in self._last[-_LAST_LINES:]]
        parts.append(Text(self._summary()))
        return Group(*parts)

    def _cells(self) -> Table:
        """Return methods by tasks: seeds done of those wanted, and failures."""
        table = Table("")
        tasks = list(dict.fromkeys(plan.cell.task for plan in self._planned))
        for task in tasks:
            table.add_column(task, justify="right")
        wanted = Counter((plan.cell.label, plan.cell.task) for plan in self._planned)
        count: Counter[tuple[str, str, str]] = Counter()
        for plan in self._planned:
            record = self.records.get(plan.key)
            state = "left" if record is None else _state(record, plan)
            count[plan.cell.label, plan.cell.task, state] += 1
        for label in dict.fromkeys(plan.cell.label for plan in self._planned):
            row = []
            for task in tasks:
                failed = count[label, task, "failed"]
                shown = f"{count[label, task, 'done']}/{wanted[label, task]}"
                row.append(Text(shown + (f" {failed} failed" if failed else "")))
            table.add_row(Text(label), *row)
        return table

    def _summary(self) -> str:
        passed = monotonic() - self._began
        left = self._total - self._ended
        rest = f", about {duration(passed / self._ended * left)} left" if self._ended else ""
        return f"{self._ended} of {self._total} runs in {duration(passed)}{rest}"

    def _line(self, text: str) -> None:
        self._last.append(text)
        if self._live is None:
            self._console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            self._live.refresh()


def outcome(record: Record) -> str:
    """Return in a few words how a run ended."""
    if record.status == "failed":
        return f"FAILED: {(record.error or '').partition(chr(10))[0]}"
    first = next((one for one in record.evaluations if one.set == IN), None)
    shown = {} if first is None else {n: first.metrics[n].value for n in _SHOWN}
    numbers = "  ".join(f"{n} {v:.4f}" for n, v in shown.items() if v is not None)
    return f"done  {numbers}"


def duration(seconds: float) -> str:
    """Return a time in hours, minutes and seconds.

    Example:
        >>> duration(3725)
        '1:02:05'
    """
    whole = int(seconds)
    return f"{whole // 3600}:{whole % 3600 // 60:02d}:{whole % 60:02d}"


def _state(record: Record, plan: Planned) -> str:
    if cell_fault(record, plan.wanted) is None:
        return "done"
    return "failed" if record.status == "failed" else "left"


def _name(job: Job) -> str:
    return f"{job.cell.label} / {job.cell.task} / seed {job.cell.seed}"


def _step(training: Path) -> int | None:
    """Return the last step that a run's training log speaks of; None before there is one."""
    newest = max(training.glob("**/metrics.jsonl"), key=_age, default=None)
    if newest is None:
        return None
    # The line may be half written, or gone with its run.
    with suppress(OSError, ValueError, KeyError, IndexError, TypeError), newest.open("rb") as file:
        file.seek(max(0, newest.stat().st_size - _TAIL_BYTES))
        return int(json.loads(file.read().splitlines()[-1])["step"])
    return None


def _age(path: Path) -> float:
    with suppress(OSError):
        return path.stat().st_mtime
    return 0.0
