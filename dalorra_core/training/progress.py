"""Progress of a training run: a live bar on a terminal, plain lines in a log file."""

import sys
import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

__all__ = ["Progress"]

_LINE_EVERY_S = 15.0


class Progress:
    """Counts steps and tokens and shows loss, keep probability, speed and time left.

    Args:
        total: Optimiser steps of the whole run.
        done: Steps finished before this process.
        enabled: False shows nothing (processes other than the first).
    """

    def __init__(self, total: int, done: int, *, enabled: bool = True) -> None:
        self._total, self._done, self._first = total, done, done
        self._tokens, self._start, self._last_line = 0, time.monotonic(), 0.0
        self._enabled = enabled
        self._console = Console(file=sys.stderr)
        self._bar: RichProgress | None = None
        if enabled and self._console.is_terminal:
            self._bar = RichProgress(
                TextColumn("training"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[values]}"),
                console=self._console,
            )
            self._task = self._bar.add_task("", total=total, completed=done, values="")

    def __enter__(self) -> Self:
        """Start the clock and the bar."""
        self._start = time.monotonic()
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Leave the terminal as it was."""
        if self._bar is not None:
            self._bar.stop()

    def preparing(self, what: str, total: int) -> Callable[[int], None]:
        """Return what counts work before the first step, whose speed does not include it.

        Args:
            what: Its name, such as ``rows through the frozen layers``.
            total: How much there is.
        """
        counted = 0

        def advance(count: int) -> None:
            nonlocal counted
            counted += count
            self._start = now = time.monotonic()
            text = f"{what}: {counted} of {total}"
            if self._bar is not None:
                self._bar.update(self._task, values=text)
                self._bar.reset(self._task, completed=self._done)
            elif now - self._last_line >= _LINE_EVERY_S:
                self._last_line = now
                self.note(text)

        return advance

    @property
    def tokens_per_second(self) -> float:
        """Real tokens per second since this process began."""
        return self._tokens / max(time.monotonic() - self._start, 1e-9)

    def advance(self, tokens: int) -> None:
        """Count one finished optimiser step over ``tokens`` real tokens."""
        self._done += 1
        self._tokens += tokens
        if self._bar is not None:
            self._bar.update(self._task, completed=self._done)

    def show(self, values: Mapping[str, float]) -> None:
        """Show the current values beside the bar, or as a line every few seconds."""
        text = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
        if self._bar is not None:
            self._bar.update(self._task, values=text)
            return
        now = time.monotonic()
        if now - self._last_line >= _LINE_EVERY_S or self._done == self._total:
            self._last_line = now
            self.note(f"step {self._done}/{self._total}  {text}  left {self._time_left()}")

    def note(self, text: str) -> None:
        """Print one line above the bar."""
        if self._enabled:
            self._console.print(text, highlight=False, soft_wrap=True)

    def _time_left(self) -> str:
        finished = self._done - self._first
        seconds = (time.monotonic() - self._start) / max(finished, 1) * (self._total - self._done)
        return f"{int(seconds // 3600)}:{int(seconds % 3600 // 60):02d}:{int(seconds % 60):02d}"
