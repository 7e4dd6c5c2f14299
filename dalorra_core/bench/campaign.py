"""A grid on its way to results: which runs are done, which are left, and doing them."""

import json
from collections.abc import Iterable, Sequence
from enum import StrEnum
from pathlib import Path

from rich.console import Console

from dalorra_core.artifact.placing import place_file
from dalorra_core.bench.grid import Cell, Grid
from dalorra_core.bench.keys import Job, plan_jobs
from dalorra_core.bench.runs import TRAINING, is_finished
from dalorra_core.bench.store import (
    GRID_FILE,
    Record,
    hold,
    read_record,
    run_directory,
    with_sound_scores,
    write_results,
)
from dalorra_core.bench.table import Board
from dalorra_core.bench.workers import run_here, run_in_workers
from dalorra_core.errors import DataError
from dalorra_core.training.checkpoint import latest_checkpoint

__all__ = ["Campaign", "State"]


class State(StrEnum):
    """How far a run is."""

    NEW = "new"
    BEGUN = "begun"
    TRAINED = "trained"
    DONE = "done"
    FAILED = "failed"


class Campaign:
    """The runs of a grid and their records.

    Args:
        grid: The grid.
        found: Its cells.
        out: Directory of the bench.

    Raises:
        ConfigError, DataError, BaseModelError: Data or a base model cannot be used.
    """

    def __init__(self, grid: Grid, found: Sequence[Cell], out: Path) -> None:
        self._grid, self._out = grid, out
        self.jobs, self._planned = plan_jobs(grid, found)
        self.records: dict[str, Record] = {}
        self._unreadable: list[str] = []
        self._read()

    def in_state(self, *states: State) -> list[Job]:
        """Return the runs in any of these states, in the order of the grid."""
        return [job for job in self.jobs if self.state(job) in states]

    def state(self, job: Job) -> State:
        """Return how far a run is."""
        record, directory = self.records.get(job.key), run_directory(self._out, job.key)
        if is_finished(job, record):
            return State.DONE
        if record is not None and record.status == "failed":
            return State.FAILED
        if (directory / "artifact").is_dir():
            return State.TRAINED
        return State.BEGUN if _steps(directory / TRAINING) else State.NEW

    def listing(self) -> list[str]:
        """Return what `--dry-run` prints: a line for each run and one for all."""
        head = f"{'key':<18}{'state':<14}{'rows x steps':>16}{'rows x functions':>18}"
        lines = [f"{head}  method / task / seed"]
        for job in self.jobs:
            state = self.state(job)
            shown = state.value
            if state is State.BEGUN:
                steps = _steps(run_directory(self._out, job.key) / TRAINING)
                shown = f"at step {steps}"
            names = [
                f"{plan.cell.label} / {plan.cell.task} / {plan.cell.seed}"
                for plan in self._planned
                if plan.key == job.key
            ]
            lines.append(
                f"{job.key:<18}{shown:<14}{job.rows_trained:>16,}{job.rows_scored:>18,}  "
                f"{' = '.join(names)}"
            )
        left = [job for job in self.jobs if self.state(job) is not State.DONE]
        lines.append(
            f"{len(self._planned)} cells, {len(self.jobs)} runs, {len(left)} left: "
            f"{sum(job.rows_trained for job in left):,} rows x steps, "
            f"{sum(job.rows_scored for job in left):,} rows x functions"
        )
        return [*lines, *self._unreadable]

    def run(self, places: Sequence[str] | str, *, retry_failed: bool, console: Console) -> None:
        """Do the runs that are left and write the results, also when this is interrupted.

        Args:
            places: Device of each worker process, or the one device to use in this process.
            retry_failed: Do failed runs again.
            console: Where to show what happens.

        Raises:
            ConfigError: Another process works on the same directory.
        """
        with hold(self._out, wait=False):
            self._read()
            place_file(
                self._out / GRID_FILE,
                (json.dumps(self._grid.model_dump(mode="json"), indent=1) + "\n").encode(),
            )
            for line in self._unreadable:
                console.print(f"{line}; made anew", markup=False, highlight=False)
            states = [State.NEW, State.BEGUN, State.TRAINED]
            left = self.in_state(*states, *([State.FAILED] if retry_failed else []))
            finished = {k: r for k, r in self.records.items() if k not in _keys(left)}
            try:
                with Board(self._planned, finished, self._out, len(left), console) as board:
                    if isinstance(places, str):
                        run_here(left, self._out, board, device=places)
                    elif left:
                        run_in_workers(left, self._out, board, devices=places)
            finally:
                self._read()
                write_results(self._out, self._planned, self.records)

    def _read(self) -> None:
        """Read the records that there are; what cannot be read counts as not there."""
        self.records, self._unreadable = {}, []
        for job in self.jobs:
            try:
                record = read_record(self._out, job.key)
            except DataError as error:
                self._unreadable.append(str(error))
                continue
            if record is not None:
                self.records[job.key], faults = with_sound_scores(self._out, record)
                self._unreadable += faults


def _keys(jobs: Iterable[Job]) -> set[str]:
    return {job.key for job in jobs}


def _steps(training: Path) -> int:
    """Return the optimiser steps that checkpoints hold, of all members of a run."""
    folders = [training, *training.glob("member-*")]
    found = [latest_checkpoint(folder / "checkpoints") for folder in folders]
    return sum(int(path.name.removeprefix("step-")) for path in found if path is not None)
