"""How a command talks: results on stdout, everything else on stderr, one line per error."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers.utils import logging as transformers_logging

from dalorra_core.errors import DalorraError

__all__ = ["errors_as_exit", "note", "row_progress"]

_stderr = Console(stderr=True, soft_wrap=True, highlight=False)


def note(text: str) -> None:
    """Print one line for the person at the terminal, on stderr."""
    _stderr.print(text, markup=False)


@contextmanager
def errors_as_exit() -> Iterator[None]:
    """Turn an error raised on purpose into its message on stderr and exit status 1."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    transformers_logging.disable_progress_bar()
    try:
        yield
    except DalorraError as error:
        kind = type(error).__name__
        _stderr.print(f"error ({kind}): {error}", style="bold red", markup=False)
        raise typer.Exit(1) from error


@contextmanager
def row_progress(what: str, total: int, unit: str = "rows") -> Iterator[Callable[[int], None]]:
    """Show a bar over ``total`` rows on a terminal, or a line every tenth in a log."""
    if _stderr.is_terminal:
        columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=_stderr) as bar:
            task = bar.add_task(what, total=total)
            yield lambda count: bar.advance(task, count)
        return
    done, shown = 0, 0

    def line(count: int) -> None:
        nonlocal done, shown
        done += count
        if done * 10 // total > shown:
            shown = done * 10 // total
            note(f"{what}: {done} of {total} {unit}")

    yield line
