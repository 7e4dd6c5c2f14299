"""The runs of a grid over devices: one process for each, so that no run takes others with it."""

import multiprocessing
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnContext, SpawnProcess
from pathlib import Path
from typing import Literal, Protocol, cast

import torch

from dalorra_core.base_models.loading import pick_device
from dalorra_core.bench.bases import Bases
from dalorra_core.bench.keys import Job
from dalorra_core.bench.runs import LOG_FILE, attempt, write_failure
from dalorra_core.bench.store import Record, run_directory
from dalorra_core.errors import ConfigError

__all__ = ["Listener", "devices_of", "run_here", "run_in_workers"]

_REFRESH_S = 0.5
_PATIENCE_S = 5.0


class Listener(Protocol):
    """Hears what happens to the runs; called by one thread."""

    def started(self, job: Job, device: str) -> None:
        """A run was given to a device."""

    def note(self, job: Job, text: str) -> None:
        """A run says what it does."""

    def ended(self, job: Job, record: Record) -> None:
        """A run is done or has failed."""

    def tick(self) -> None:
        """Some time has passed."""


def devices_of(asked: str) -> tuple[Literal["cpu", "cuda"], tuple[str, ...]]:
    """Return the kind of device and the devices to use, one worker each.

    Args:
        asked: ``auto``, ``cpu``, ``cuda`` (all there are) or a list such as ``cuda:0,cuda:2``.

    Raises:
        ConfigError: A device is not there, is named twice, or both kinds are named.
    """
    if asked in {"auto", "cuda"} and torch.cuda.is_available():
        return "cuda", tuple(f"cuda:{i}" for i in range(torch.cuda.device_count()))
    names = ("cpu",) if asked == "auto" else tuple(asked.split(","))
    if names == ("cpu",):
        return "cpu", names
    pick_device(names[0].partition(":")[0])  # says so when there is no CUDA, or no such kind
    there = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    if not set(names) <= set(there) or len(set(names)) < len(names):
        raise ConfigError(
            f"--device must be auto, cpu, cuda or some of {', '.join(there)}, each once, got "
            f"{asked!r}; several processes on one device: --workers"
        )
    return "cuda", names


def run_here(jobs: Sequence[Job], out: Path, listener: Listener, *, device: str) -> None:
    """Do the runs one after the other in this process."""
    _use(device)
    bases = Bases(out)
    for job in jobs:
        listener.started(job, device)
        record = attempt(job, out, bases, lambda text, job=job: listener.note(job, text))
        listener.ended(job, record)


def run_in_workers(
    jobs: Sequence[Job], out: Path, listener: Listener, *, devices: Sequence[str]
) -> None:
    """Do the runs in worker processes, the next one wherever one is free.

    A worker that dies (out of memory, a crash in a kernel) fails its run; the others go on. A
    failed run and one of another precision get a fresh process.

    Args:
        jobs: Runs, in the order in which they start.
        out: Directory of the bench.
        listener: Hears what happens.
        devices: Device of each worker; one may be there several times.
    """
    waiting = deque(jobs)
    threads = max(1, torch.get_num_threads() // len(devices))  # however few runs are left
    workers = [_Worker(device, out, threads) for device in devices[: len(jobs)]]
    try:
        for worker in workers:
            worker.start(waiting.popleft(), listener)
        while busy := [worker for worker in workers if worker.job is not None]:
            ready = wait([worker.connection for worker in busy], _REFRESH_S)
            for worker in busy:
                if worker.connection in ready:
                    worker.hear(listener)
                if worker.job is None and waiting:
                    worker.start(waiting.popleft(), listener)
            listener.tick()
    finally:
        for worker in workers:
            worker.stop()


@dataclass
class _Process:
    process: SpawnProcess
    connection: Connection
    precision: str


class _Worker:
    """One place to run: a process that is replaced when it must be."""

    def __init__(self, device: str, out: Path, threads: int) -> None:
        self.device, self.out, self.threads = device, out, threads
        self.job: Job | None = None
        self._running: _Process | None = None

    @property
    def connection(self) -> Connection:
        assert self._running is not None  # noqa: S101  asked only while a job runs
        return self._running.connection

    def start(self, job: Job, listener: Listener) -> None:
        """Give a run to the process, a new one if the old one cannot take it."""
        precision = job.cell.config.run.precision  # accelerate allows one in a process
        old = self._running
        if old is not None and (old.precision != precision or not old.process.is_alive()):
            self.stop()
        if self._running is None:
            self._running = self._spawn(precision)
        self.job = job
        listener.started(job, self.device)
        try:
            self._running.connection.send(job)
        except OSError:  # it died just now; ``hear`` finds out
            return

    def hear(self, listener: Listener) -> None:
        """Take one message; a broken connection means that the process is gone."""
        assert self.job is not None  # noqa: S101
        try:
            message = self.connection.recv()
        except (EOFError, OSError):
            self._fail(listener)
            return
        if isinstance(message, str):
            listener.note(self.job, message)
            return
        job, self.job = self.job, None
        if message.status == "failed":
            self.stop()
        listener.ended(job, message)

    def stop(self) -> None:
        """End the process."""
        if self._running is None:
            return
        running, self._running = self._running, None
        process = running.process
        running.connection.close()  # an idle process leaves by itself
        if self.job is None:
            process.join(_PATIENCE_S)
        if process.is_alive():
            process.terminate()
            process.join(_PATIENCE_S)
        if process.is_alive():
            process.kill()
            process.join()

    def _spawn(self, precision: str) -> _Process:
        context: SpawnContext = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        arguments = (theirs, self.out, self.device, self.threads)
        process = context.Process(target=_serve, args=arguments, daemon=True)
        process.start()
        theirs.close()
        return _Process(process, cast("Connection", ours), precision)

    def _fail(self, listener: Listener) -> None:
        """Write down that the process died in the middle of its run."""
        assert self.job is not None  # noqa: S101
        assert self._running is not None  # noqa: S101
        job, self.job = self.job, None
        self._running.process.join(_PATIENCE_S)
        code = self._running.process.exitcode
        self.stop()
        listener.ended(job, write_failure(job, self.out, _end(code)))


def _end(code: int | None) -> str:
    how = f"exit code {code}"
    if code is not None and code < 0:
        how = f"signal {signal.Signals(-code).name}"
    return f"the worker process ended with {how}; see {LOG_FILE} in the run's directory"


def _serve(connection: Connection, out: Path, device: str, threads: int) -> None:
    """Do runs until nobody asks for more: the body of a worker process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends this one
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    torch.set_num_threads(threads)
    _use(device)
    bases = Bases(out)
    while True:
        try:
            job: Job = connection.recv()
        except EOFError:
            return
        _log_to(run_directory(out, job.key))
        connection.send(attempt(job, out, bases, _teller(connection)))


def _leave_with_parent() -> None:
    """End this process when the bench is gone, whatever became of it."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)


def _use(device: str) -> None:
    if device.startswith("cuda:"):
        torch.cuda.set_device(device)


def _log_to(directory: Path) -> None:
    """Send what this process prints, training progress and warnings, to the run's log."""
    directory.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    with (directory / LOG_FILE).open("ab") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)


def _teller(connection: Connection) -> Callable[[str], None]:
    def say(text: str) -> None:
        sys.stderr.write(f"{text}\n")
        connection.send(text)

    return say
