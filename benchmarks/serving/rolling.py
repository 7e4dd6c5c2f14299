"""Replace two replicas behind HAProxy, one after the other, under steady load: no request fails.

Each replica gets a SIGTERM, drains, ends, and another server takes its place; meanwhile the other
one answers. HAProxy asks both for ``/health/ready``, as a cluster does, and sends no request a
second time, so that a refused connection or an answer that was cut off is a failed request.

    python -m benchmarks.serving.rolling --minutes 3 --rate 1 --output rolling.json

``--tiny`` serves a tiny model, trained for a moment, behind the real engine, for machines on which
one replica could not carry the load alone. Needs HAProxy (Debian's package ``haproxy``).
"""

import argparse
import asyncio
import contextlib
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.serving.load import OK, count, open_loop, percentile
from benchmarks.serving.process import ServerProcess, free_port, serving
from benchmarks.serving.report import Verdict, above, conclude, equals
from benchmarks.serving.subject import Subject, add_options, subject_of
from benchmarks.serving.tiny import tiny_revisions
from benchmarks.serving.wire import Reply, Wire

__all__ = ["find_haproxy", "judge", "main", "roll"]

NAMES = ("a", "b")
SERVED_BY = "x-served-by"
USAGE_ERROR = 2
_CONFIG = """\
defaults
    mode http
    timeout connect 10s
    timeout client 180s
    timeout server 180s
    timeout check 5s
    # what fails here is to be seen by the client
    retries 0

frontend entry
    bind 127.0.0.1:{port}
    default_backend replicas
    http-response set-header {header} %s

backend replicas
    balance leastconn
    option httpchk
    http-check send meth GET uri /health/ready ver HTTP/1.1 hdr Host 127.0.0.1
    http-check expect status 200
    default-server check inter 500ms fall 2 rise 1
"""


@dataclass(frozen=True)
class Replacement:
    """One server that made room for the next.

    Attributes:
        replica: Its place behind the proxy.
        at_s: When it got its SIGTERM, from the beginning of the load, in seconds.
        drained_s: How long it took to end.
        exit_code: With which it ended.
        ready_s: How long the next one took to be ready.
    """

    replica: str
    at_s: float
    drained_s: float
    exit_code: int
    ready_s: float


class Replica:
    """A place behind the proxy: one port, and one server after the other on it.

    Attributes:
        name: As the proxy calls it.
        port: On 127.0.0.1.
    """

    def __init__(self, name: str, subject: Subject, folder: Path) -> None:
        self.name = name
        self.port = free_port()
        self._subject = subject
        self._log = folder / f"{name}.log"
        self._open = contextlib.ExitStack()
        self._server: ServerProcess | None = None

    def start(self) -> ServerProcess:
        """Start a server and return it when it is ready."""
        self._server = self._open.enter_context(
            serving(
                self._subject.command,
                self._log,
                environment=self._subject.environment,
                port=self.port,
                # it starts beside a replica that carries all the load
                timeout_s=600.0,
            )
        )
        return self._server

    def replace(self, load_began_s: float) -> Replacement:
        """Let the server drain and end, and start the next one."""
        assert self._server is not None  # noqa: S101 - start comes first
        began_s = time.monotonic()
        exit_code = self._server.stop()
        drained_s = time.monotonic() - began_s
        self._open.close()
        ready_s = self.start().ready_s
        return Replacement(self.name, began_s - load_began_s, drained_s, exit_code, ready_s)

    def end(self) -> None:
        """Stop whatever runs."""
        self._open.close()


def find_haproxy() -> str | None:
    """Return where HAProxy is, which Debian puts where only root looks; None without one."""
    return shutil.which("haproxy") or shutil.which("haproxy", path="/usr/sbin:/usr/local/sbin")


def _version(program: str) -> str:
    command = [program, "-v"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout  # noqa: S603
    return shown.splitlines()[0].partition(" - ")[0]


@contextlib.contextmanager
def proxying(program: str, replicas: Sequence[Replica], folder: Path) -> Iterator[int]:
    """Run HAProxy before the replicas until the block ends; gives its port."""
    port = free_port()
    lines = [f"    server {one.name} 127.0.0.1:{one.port}\n" for one in replicas]
    config = folder / "haproxy.cfg"
    config.write_text(_CONFIG.format(port=port, header=SERVED_BY) + "".join(lines), "utf-8")
    with (folder / "haproxy.log").open("wb") as log:
        popen = subprocess.Popen(  # noqa: S603 - found on this machine
            [program, "-db", "-f", str(config)], stdout=log, stderr=subprocess.STDOUT
        )
    try:
        yield port
    finally:
        popen.terminate()
        popen.wait(10)


async def roll(
    port: int, subject: Subject, replicas: Sequence[Replica], options: argparse.Namespace
) -> dict[str, Any]:
    """Load the proxy and replace the replicas in turn until the load ends; say what was found."""
    wire = Wire(port)
    await _until_the_proxy_answers(wire, subject)
    seconds = 60 * options.minutes
    began_s = time.monotonic()
    load = asyncio.create_task(open_loop(wire, subject.body, rate=options.rate, seconds=seconds))
    replaced: list[Replacement] = []
    while not load.done():
        await asyncio.wait({load}, timeout=options.pause)
        # one that would not be over in time would be no replacement under load
        if time.monotonic() - began_s + options.reserve > seconds:
            break
        replica = replicas[len(replaced) % len(replicas)]
        replaced.append(await asyncio.to_thread(replica.replace, began_s))
    replies = await load
    await wire.close()
    return {
        "arrivals_per_s": options.rate,
        "seconds": seconds,
        "answers": count(replies),
        "first_failed": [f"{r.status} {r.error}{r.body[:200]!r}" for r in _failed(replies)[:5]],
        "answered_by": dict(sorted(Counter(r.headers.get(SERVED_BY, "") for r in replies).items())),
        "replacements": [asdict(one) for one in replaced],
        "answers_after_replacement": _after(replies, replaced, began_s),
        "latency": _latency(replies, replaced, began_s),
    }


async def _until_the_proxy_answers(wire: Wire, subject: Subject, timeout_s: float = 10.0) -> None:
    """Wait until both checks have passed: until then the proxy has nobody to ask."""
    end_s = time.monotonic() + timeout_s
    seen: set[str] = set()
    while len(seen) < len(NAMES):
        reply = await wire.ask("POST", "/v1/classify", subject.body(0))
        if reply.status == OK:
            seen.add(reply.headers[SERVED_BY])
        elif time.monotonic() > end_s:
            raise RuntimeError(f"the proxy answered {reply.status} {reply.error}{reply.body!r}")
        await asyncio.sleep(0.05)


def _failed(replies: Sequence[Reply]) -> list[Reply]:
    return [reply for reply in replies if reply.status != OK]


def _after(
    replies: Sequence[Reply], replaced: Sequence[Replacement], began_s: float
) -> dict[str, int]:
    """Return how many answers each replica gave after it was replaced for the first time."""
    found = {}
    for name in NAMES:
        back_s = [r.at_s + r.drained_s + r.ready_s for r in replaced if r.replica == name]
        since_s = began_s + min(back_s, default=float("inf"))
        own = [r for r in replies if r.headers.get(SERVED_BY) == name and r.sent_s > since_s]
        found[name] = len(own)
    return found


def _latency(
    replies: Sequence[Reply], replaced: Sequence[Replacement], began_s: float
) -> dict[str, dict[str, float]]:
    """Return the latencies while both replicas were there, and while one was being replaced."""
    spans = [
        (began_s + one.at_s, began_s + one.at_s + one.drained_s + one.ready_s) for one in replaced
    ]
    parts: dict[str, list[float]] = {"both": [], "replacing": []}
    for reply in replies:
        during = any(from_s <= reply.sent_s <= to_s for from_s, to_s in spans)
        parts["replacing" if during else "both"].append(reply.took_s)
    return {
        name: {
            "requests": len(took_s),
            "p50_s": percentile(took_s, 0.5),
            "p99_s": percentile(took_s, 0.99),
            "max_s": max(took_s, default=float("nan")),
        }
        for name, took_s in parts.items()
    }


def judge(found: dict[str, Any]) -> list[Verdict]:
    """Return the verdicts on what was found."""
    failed = sum(n for status, n in found["answers"].items() if status != str(OK))
    replaced = found["replacements"]
    during = found["latency"]["replacing"]["requests"]
    afterwards = min(found["answers_after_replacement"].values())
    return [
        equals("failed requests", failed, 0),
        above("replacements under load", len(replaced), len(NAMES)),
        above("requests sent while one was replaced", during, 1),
        equals("servers that did not exit 0", sum(one["exit_code"] != 0 for one in replaced), 0),
        above("fewest answers of a new server", afterwards, 1),
    ]


def main(arguments: list[str] | None = None) -> int:
    """Run the replacement, print and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=3.0, help="of load")
    parser.add_argument("--rate", type=float, default=1.0, help="requests a second")
    parser.add_argument("--pause", type=float, default=10.0, help="seconds with both replicas")
    parser.add_argument(
        "--reserve", type=float, default=30.0, help="no replacement so near the end, in seconds"
    )
    parser.add_argument("--tiny", action="store_true", help="a tiny model instead of --adapter")
    add_options(parser)
    options = parser.parse_args(arguments)
    program = find_haproxy()
    if program is None:
        sys.stderr.write("haproxy was not found; on Debian: apt-get install haproxy\n")
        return USAGE_ERROR
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as open_:
        folder = Path(name)
        if options.tiny:
            options.base = str(tiny_revisions(folder, ["tiny"]))
            options.adapter = folder / "root" / "tiny"
        subject = subject_of(options)
        replicas = [Replica(name, subject, folder) for name in NAMES]
        for replica in replicas:
            open_.callback(replica.end)
            replica.start()
        port = open_.enter_context(proxying(program, replicas, folder))
        found = asyncio.run(roll(port, subject, replicas, options))
    found |= {"subject": subject.says, "proxy": _version(program)}
    return conclude("rolling", found, judge(found), options.output)


if __name__ == "__main__":
    sys.exit(main())
