"""Replace an adapter again and again under traffic: no request fails, none is answered wrong.

Two revisions of one adapter take turns through the administrators' routes: load, canary, move the
name, move the alias, unload. Clients ask by name, by alias and by ``name:revision`` all the time.

    python -m benchmarks.serving.hot_swap --cycles 50 --output hot-swap.json

The default is a tiny model, trained for a moment, behind the real engine, so that cycles are quick;
``--root DIR --sources A B --base BASE`` takes two real revisions instead, and ``--fake`` the fake
engine.
"""

import argparse
import asyncio
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.serving.load import OK, count, made_texts, percentile
from benchmarks.serving.process import ServerProcess, Usage, serving
from benchmarks.serving.report import Verdict, above, below, conclude, equals
from benchmarks.serving.tiny import tiny_revisions
from benchmarks.serving.wire import Reply, Wire

__all__ = ["judge", "main", "swap"]

NAME = "swapped"
ALIAS = f"{NAME}@prod"
PROBS_TOLERANCE = 2e-3
MAX_MEMORY = 1.05
MAX_MORE_FILES = 8
MAX_MORE_THREADS = 4
NUM_TEXTS = 6


@dataclass
class Published:
    """When each revision could be the answer to a name.

    Attributes:
        spans: Name -> revision -> spans of time, the last one perhaps open (infinite).
    """

    spans: dict[str, dict[str, list[list[float]]]] = field(default_factory=dict)

    def allow(self, model: str, revision: str) -> None:
        """From now on a revision may answer a name."""
        spans = self.spans.setdefault(model, {}).setdefault(revision, [])
        if not spans or spans[-1][1] != float("inf"):
            spans.append([time.monotonic(), float("inf")])

    def end(self, model: str, revision: str) -> None:
        """From now on it may not, for requests that are sent later."""
        spans = self.spans.get(model, {}).get(revision)
        if spans:
            spans[-1][1] = time.monotonic()

    def fits(self, model: str, revision: str, reply: Reply) -> bool:
        """Whether a revision was published for a name between a request and its answer."""
        from_s, to_s = reply.sent_s, reply.sent_s + reply.took_s
        spans = self.spans.get(model, {}).get(revision, [])
        return any(begin <= to_s and end >= from_s for begin, end in spans)


@dataclass
class Traffic:
    """Clients that never stop, and what they saw.

    Attributes:
        wire: Connections.
        published: What may answer what.
        exact: Revisions that may be asked by name and revision now.
        inside: Requests under way for each of those.
    """

    wire: Wire
    published: Published
    exact: list[str] = field(default_factory=list)
    inside: dict[str, int] = field(default_factory=dict)
    replies: list[Reply] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    probs: dict[tuple[str, str], list[float]] = field(default_factory=dict)
    worst_difference: float = 0.0
    stopped: bool = False

    async def client(self, number: int) -> None:
        """Ask by name, alias and revision in turn until stopped."""
        texts = made_texts(NUM_TEXTS)
        turn = number
        while not self.stopped:
            turn += 1
            text = texts[turn % len(texts)]
            revision = self.exact[turn % len(self.exact)] if self.exact else ""
            model = (NAME, ALIAS, f"{NAME}:{revision}")[turn % 3 if revision else turn % 2]
            self.inside[model] = self.inside.get(model, 0) + 1
            body = {"model": model, "input": text, "seed": 0}
            reply = await self.wire.ask("POST", "/v1/classify", body)
            self.inside[model] -= 1
            self._note(model, text, reply)

    def _note(self, model: str, text: str, reply: Reply) -> None:
        self.replies.append(Reply(reply.status, reply.sent_s, reply.took_s, error=reply.error))
        if reply.status != OK:
            self.wrong.append(f"{model}: {reply.status} {reply.error}{reply.body[:300]!r}")
            return
        answer = reply.json()
        name, _, revision = answer["model"].partition(":")
        exact = model.partition(":")[2]
        fits = revision == exact if exact else self.published.fits(model, revision, reply)
        if name != NAME or not fits:
            self.wrong.append(f"{model}: answered by {answer['model']}")
            return
        probs = answer["data"][0]["probs"]
        known = self.probs.setdefault((revision, text), probs)
        difference = max(abs(a - b) for a, b in zip(known, probs, strict=True))
        self.worst_difference = max(self.worst_difference, difference)

    async def leave(self, revision: str) -> None:
        """Ask for a revision by name no more, and wait until nobody does."""
        self.exact = [one for one in self.exact if one != revision]
        while self.inside.get(f"{NAME}:{revision}", 0):  # noqa: ASYNC110 - one count per name
            await asyncio.sleep(0.001)


class Admin:
    """What an administrator does, one step after the other."""

    def __init__(self, wire: Wire, traffic: Traffic) -> None:
        self._wire = wire
        self._traffic = traffic
        self.current: str | None = None
        self.took_s: list[float] = []

    async def _call(self, method: str, path: str, body: Any = None) -> Any:
        reply = await self._wire.ask(method, path, body)
        self.took_s.append(reply.took_s)
        if reply.status not in (200, 201):
            raise RuntimeError(f"{method} {path}: {reply.status} {reply.error}{reply.body!r}")
        return reply.json()

    async def load(self, source: str, *, activate: bool) -> str:
        """Load a directory under the one name; return its revision."""
        body = {"source": source, "name": NAME, "activate": activate}
        return str((await self._call("POST", "/v1/adapters", body))["revision"])

    async def point(self, *revisions: str) -> None:
        """Let the alias stand for revisions, each equally often."""
        targets = [{"model": f"{NAME}:{one}", "weight": 1.0} for one in revisions]
        await self._call("PUT", f"/v1/aliases/{ALIAS}", {"targets": targets})

    async def begin(self, source: str) -> None:
        """Load the first revision and name it; no traffic yet."""
        self.current = await self.load(source, activate=True)
        await self.point(self.current)
        for model in (NAME, ALIAS):
            self._traffic.published.allow(model, self.current)
        self._traffic.exact = [self.current]

    async def cycle(self, source: str) -> None:
        """Replace the current revision by the one in a directory."""
        traffic, old = self._traffic, self.current
        assert old is not None  # noqa: S101 - begin comes first
        new = await self.load(source, activate=False)
        if new == old:
            raise RuntimeError(f"{source} holds the revision that is served already, {old}")
        traffic.exact = [old, new]
        traffic.published.allow(ALIAS, new)
        await self.point(new, old)
        traffic.published.allow(NAME, new)
        await self.load(source, activate=True)
        traffic.published.end(NAME, old)
        await self.point(new)
        traffic.published.end(ALIAS, old)
        await traffic.leave(old)
        await self._call("DELETE", f"/v1/adapters/{NAME}:{old}")
        self.current = new


async def swap(
    server: ServerProcess, sources: Sequence[str], *, cycles: int, clients: int
) -> dict[str, Any]:
    """Run all cycles under traffic; return what was found."""
    wire = Wire(server.port)
    traffic = Traffic(wire, Published())
    admin = Admin(wire, traffic)
    await admin.begin(sources[0])
    asking = [asyncio.create_task(traffic.client(number)) for number in range(clients)]
    samples: list[Usage] = []
    began_s = time.monotonic()
    try:
        for cycle in range(cycles):
            await admin.cycle(sources[(cycle + 1) % 2])
            samples.append(server.usage())
    finally:
        elapsed_s = time.monotonic() - began_s
        traffic.stopped = True
        await asyncio.gather(*asking, return_exceptions=True)
        await wire.close()
    took_s = [reply.took_s for reply in traffic.replies]
    return {
        "cycles": len(samples),
        "clients": clients,
        "seconds": elapsed_s,
        "answers": count(traffic.replies),
        "wrong": len(traffic.wrong),
        "first_wrong": traffic.wrong[:5],
        "revisions": sorted({revision for revision, _ in traffic.probs}),
        "largest_difference_within_a_revision": traffic.worst_difference,
        "smallest_difference_between_revisions": _between(traffic.probs),
        "latency": {"p50_s": percentile(took_s, 0.5), "p99_s": percentile(took_s, 0.99)},
        "admin_call_p50_s": statistics.median(admin.took_s),
        "usage": _growth(samples),
    }


def _between(probs: dict[tuple[str, str], list[float]]) -> float:
    """Return how little two revisions differ on any text; 0 when there is nothing to compare."""
    texts = {text for _, text in probs}
    found = []
    for text in texts:
        answers = [value for (_, asked), value in probs.items() if asked == text]
        if len(answers) == 2:  # noqa: PLR2004
            found.append(max(abs(a - b) for a, b in zip(*answers, strict=True)))
    return min(found, default=0.0)


def _growth(samples: Sequence[Usage]) -> dict[str, dict[str, float]]:
    """Return medians of the second and the last quarter; the first is for warming up."""
    quarter = max(1, len(samples) // 4)
    early, late = samples[quarter : 2 * quarter] or samples[:1], samples[-quarter:]
    return {
        name: {
            "early": statistics.median(getattr(s, name) for s in early),
            "late": statistics.median(getattr(s, name) for s in late),
        }
        for name in ("rss_mb", "files", "threads")
    }


def judge(found: dict[str, Any], cycles: int, *, content: bool) -> list[Verdict]:
    """Return the verdicts; ``content`` says whether the revisions are really different models."""
    usage = found["usage"]
    failed = sum(n for status, n in found["answers"].items() if status != str(OK))
    verdicts = [
        equals("cycles", found["cycles"], cycles),
        equals("failed requests", failed, 0),
        equals("wrong-revision answers", found["wrong"] - failed, 0),
        below("memory, last quarter / second", _ratio(usage["rss_mb"]), MAX_MEMORY),
        below("more open files", _more(usage["files"]), MAX_MORE_FILES),
        below("more threads", _more(usage["threads"]), MAX_MORE_THREADS),
    ]
    if content:
        within = found["largest_difference_within_a_revision"]
        between = found["smallest_difference_between_revisions"]
        verdicts += [
            below("difference within a revision", within, PROBS_TOLERANCE),
            above("difference between revisions", between, 2 * PROBS_TOLERANCE),
        ]
    return verdicts


def _ratio(value: dict[str, float]) -> float:
    return value["late"] / value["early"]


def _more(value: dict[str, float]) -> float:
    return value["late"] - value["early"]


def main(arguments: list[str] | None = None) -> int:
    """Run the cycles, print and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cycles", type=int, default=50)
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--fake", action="store_true", help="the fake engine")
    parser.add_argument("--root", type=Path, help="adapter root with both revisions")
    parser.add_argument("--sources", nargs=2, help="names of their directories")
    parser.add_argument("--base", help="base model of both")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        return _run(options, Path(folder))


def _run(options: argparse.Namespace, folder: Path) -> int:
    sources = options.sources or ["rev-a", "rev-b"]
    root, environment = options.root or folder / "root", {}
    if options.fake:
        for source in sources:
            (root / source).mkdir(parents=True)
        command = [sys.executable, "-m", "tests.support.serve_fake"]
        command += ["--adapter-root", str(root), "--state-dir", str(folder)]
    else:
        base = options.base
        if options.root is None:
            base = str(tiny_revisions(folder, sources))
        program = "from server.cli import main; main()"
        command = [sys.executable, "-c", program, "serve", str(root / sources[0])]
        command += ["--base", base, "--device", "cpu"]
        environment = {"DALORRA_ADAPTER_ROOT": str(root), "DALORRA_STATE_DIR": str(folder)}
    with serving(command, folder / "server.log", environment=environment) as server:
        try:
            work = swap(server, sources, cycles=options.cycles, clients=options.clients)
            found = asyncio.run(work)
        except RuntimeError:
            sys.stderr.write(server.log_tail())
            raise
    verdicts = judge(found, options.cycles, content=not options.fake)
    return conclude("hot_swap", found, verdicts, options.output)


if __name__ == "__main__":
    sys.exit(main())
