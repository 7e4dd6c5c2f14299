"""A server in a process of its own on a loopback port, and what it takes of the machine."""

import contextlib
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException
from pathlib import Path

__all__ = ["ServerProcess", "Usage", "free_port", "serving"]

_STOP_S = 150.0
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Usage:
    """What a process holds at one moment.

    Attributes:
        at_s: When, on the monotonic clock.
        rss_mb: Resident memory, MiB.
        files: Open file descriptors.
        threads: Threads.
        cpu_s: Processor time since its start, in seconds.
    """

    at_s: float
    rss_mb: float
    files: int
    threads: int
    cpu_s: float


class ServerProcess:
    """A running server.

    Attributes:
        port: Where it listens on 127.0.0.1.
        popen: The process.
        ready_s: How long it took from its start until it was ready, in seconds.
    """

    def __init__(self, popen: "subprocess.Popen[bytes]", port: int, log: Path) -> None:
        self.popen = popen
        self.port = port
        self.ready_s = 0.0
        self._log = log

    def usage(self) -> Usage:
        """Return what the process holds now.

        Raises:
            RuntimeError: It has ended.
        """
        folder = Path(f"/proc/{self.popen.pid}")
        try:
            status = dict(
                line.split(":", 1)
                for line in (folder / "status").read_text(encoding="ascii").splitlines()
            )
            times = (folder / "stat").read_text(encoding="ascii").rpartition(")")[2].split()
            files = len(list((folder / "fd").iterdir()))
            rss_kb = int(status["VmRSS"].split()[0])
        except (OSError, KeyError) as error:
            raise RuntimeError(f"the server has ended:\n{self.log_tail()}") from error
        cpu_s = (int(times[11]) + int(times[12])) / _TICKS_PER_S
        return Usage(time.monotonic(), rss_kb / 1024, files, int(status["Threads"]), cpu_s)

    def status_of(self, path: str) -> int:
        """Return the status of a GET; 0 when nobody answers."""
        connection = HTTPConnection("127.0.0.1", self.port, timeout=10)
        try:
            connection.request("GET", path)
            answer = connection.getresponse()
            answer.read()
        except (OSError, HTTPException):
            return 0
        else:
            return answer.status
        finally:
            connection.close()

    def log_tail(self) -> str:
        """Return the end of what the process has logged."""
        return self._log.read_text(encoding="utf-8", errors="replace")[-3000:]

    def stop(self, sig: signal.Signals = signal.SIGTERM) -> int:
        """End the process and return its exit code; killed when it does not end in time."""
        self.popen.send_signal(sig)
        try:
            return self.popen.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            self.popen.kill()
            return self.popen.wait(10)


def free_port() -> int:
    """Return a port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def serving(
    command: Sequence[str],
    log: Path,
    *,
    environment: Mapping[str, str] | None = None,
    port: int | None = None,
    timeout_s: float = 180.0,
    ready: str = "/health/ready",
) -> Iterator[ServerProcess]:
    """Run a server until the block ends, however it ends; enter the block when it is ready.

    Args:
        command: The program and its arguments; ``--port`` is added.
        log: File for its output.
        environment: Put beside the variables of this process.
        port: Where to listen; a free one if left out.
        timeout_s: How long it may take to be ready.
        ready: Path that answers 200 once it is.

    Raises:
        RuntimeError: It ended or did not get ready; the text has the end of its output.
    """
    port = free_port() if port is None else port
    began_s = time.monotonic()
    # a shell's way to add variables, since the environment is read in two files only
    prefix = ["env", *(f"{name}={value}" for name, value in (environment or {}).items())]
    with log.open("wb") as output:
        popen = subprocess.Popen(  # noqa: S603 - a command of the benchmark's own
            [*prefix, *command, "--port", str(port)], stdout=output, stderr=subprocess.STDOUT
        )
    server = ServerProcess(popen, port, log)
    try:
        while server.status_of(ready) != 200:  # noqa: PLR2004 - OK
            if popen.poll() is not None or time.monotonic() - began_s > timeout_s:
                raise RuntimeError(f"{command[0]} did not get ready:\n{server.log_tail()}")
            time.sleep(0.02)
        server.ready_s = time.monotonic() - began_s
        yield server
    finally:
        if popen.poll() is None:
            server.stop()
