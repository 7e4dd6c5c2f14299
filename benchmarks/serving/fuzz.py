"""Give hostile bytes to everything that takes bytes from outside, a great many times.

Each target (see ``tests/hostile``) runs in a process of its own, with a bound on its memory and on
the time of one case, so that neither a crash nor a hang ends the program. A case is known by its
target, the seed and its number; the bytes of failed ones are written beside the result. With
``--engine atheris`` the code that cases reach decides what is spoilt next.

    python -m benchmarks.serving.fuzz --cases 100000 --seed 1 --output fuzz.json
"""

import argparse
import base64
import importlib
import multiprocessing
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from multiprocessing.connection import Connection
from pathlib import Path
from random import Random
from typing import Any

from benchmarks.serving.report import Verdict, above, conclude, equals

__all__ = ["attack", "main"]

MEMORY_BYTES = 2 * 2**30
"""What a target may take beyond what its imports took."""

MAX_KEPT = 20
_EVERY = 500  # cases between two signs of life


class _CaseTimeoutError(Exception):
    """One case took too long."""


def main(arguments: list[str] | None = None) -> int:
    """Run all cases, print and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=100_000, help="over all targets together")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--case-seconds", type=float, default=10.0, help="most time of one case")
    parser.add_argument(
        "--engine",
        choices=["mutator", "atheris"],
        default="mutator",
        help="what chooses the cases: chance, or the code they reach (needs atheris)",
    )
    parser.add_argument("--only", nargs="+", help="names of targets; all if left out")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args(arguments)
    from tests.hostile.every_target import WEIGHTS, every_target  # noqa: PLC0415 - slow to import

    with tempfile.TemporaryDirectory() as folder:
        names = options.only or list(every_target(Path(folder)))
    weights = {name: WEIGHTS.get(name, 1.0) for name in names}
    shares = {n: -int(-options.cases * w // sum(weights.values())) for n, w in weights.items()}
    how = {"engine": options.engine, "seed": options.seed, "case_s": options.case_seconds}
    found: dict[str, Any] = {**how}
    found["targets"] = {name: attack(name, cases, how) for name, cases in shares.items()}
    _keep_failures(found["targets"], options.output)
    return conclude("fuzz", found, _judge(found["targets"], options.cases), options.output)


def _judge(targets: dict[str, dict[str, Any]], cases: int) -> list[Verdict]:
    tried = sum(target["cases"] for target in targets.values())
    return [
        above("cases tried", tried, cases),
        *(equals(f"{name}: failures", t["num_failures"], 0) for name, t in targets.items()),
    ]


def attack(name: str, cases: int, options: dict[str, Any]) -> dict[str, Any]:
    """Try one target in a process of its own.

    Args:
        name: Of the target.
        cases: How many to try.
        options: ``engine``, ``seed`` and ``case_s``, the most time of one case in seconds; the
            process is ended when nothing comes of it for ten times as long and a minute.

    Returns:
        Cases tried, outcomes, the slowest case, memory, and the failures.
    """
    context = multiprocessing.get_context("spawn")
    mine, theirs = context.Pipe(duplex=False)
    worker = context.Process(target=_work, args=(theirs, name, options, cases), daemon=True)
    began_s = time.monotonic()
    worker.start()
    theirs.close()
    last: dict[str, Any] = {"cases": 0, "outcomes": {}, "num_failures": 0, "failures": []}
    try:
        while not last.get("done"):
            if not mine.poll(60 + 10 * options["case_s"]):
                last = _lost(last, "hung")
                break
            last = mine.recv()
            sys.stderr.write(f"\r{name}: {last['cases']}/{cases} {last['outcomes']}   ")
    except EOFError:
        worker.join(10)
        last = _lost(last, f"the process ended with exit code {worker.exitcode}")
    finally:
        worker.kill()
        worker.join(10)
        sys.stderr.write("\n")
    return {**last, "seconds": round(time.monotonic() - began_s, 1)}


def _lost(last: dict[str, Any], error: str) -> dict[str, Any]:
    """Return the report of a target whose process is gone: the case is among the next ones."""
    failure = {"case": last["cases"], "error": error, "place": "", "bytes": ""}
    failures = [*last["failures"], failure]
    return {**last, "num_failures": last["num_failures"] + 1, "failures": failures}


def _work(report: Connection, name: str, options: dict[str, Any], cases: int) -> None:
    """Try every case and report now and then; runs in the target's own process."""
    with tempfile.TemporaryDirectory() as folder:
        if options["engine"] == "atheris":
            _follow_coverage(report, name, options, cases, Path(folder))
            return
        from tests.hostile.every_target import every_target  # noqa: PLC0415 - here only

        target = every_target(Path(folder))[name]
        _limit_memory()
        trial = _Trial(report, target, options, cases)
        for number in range(cases):
            trial.run(target.case(number, options["seed"]))


def _follow_coverage(
    report: Connection, name: str, options: dict[str, Any], cases: int, folder: Path
) -> None:
    """Let atheris choose what to spoil next, by the code that a case reaches; never returns.

    The mutator stays our own, so that documents keep enough of their structure.
    """
    atheris: Any = importlib.import_module("atheris")  # optional: pip install atheris

    with atheris.instrument_imports(include=["server", "dalorra_core"]):
        from tests.hostile.every_target import every_target  # noqa: PLC0415
    target = every_target(folder)[name]
    corpus = folder / "corpus"
    corpus.mkdir()
    for number, seed in enumerate(target.seeds):
        (corpus / str(number)).write_bytes(seed)
    trial = _Trial(report, target, options, cases)

    def one_input(document: bytes) -> None:
        trial.run(document)
        if trial.state["done"]:
            shutil.rmtree(folder, ignore_errors=True)
            os._exit(0)  # libFuzzer has no other way to stop in good order

    def mutate(document: bytes, most: int, seed: int) -> bytes:
        return target.mutate(document or target.seeds[0], Random(seed))[:most]  # noqa: S311

    quiet = ["-verbosity=0", "-print_final_stats=0", f"-seed={options['seed']}", "-max_len=65536"]
    atheris.Setup(["fuzz", *quiet, str(corpus)], one_input, custom_mutator=mutate)
    atheris.Fuzz()


class _Trial:
    """Runs cases and keeps the books."""

    def __init__(
        self, report: Connection, target: Any, options: dict[str, Any], cases: int
    ) -> None:
        self._report = report
        self._target = target
        self._case_s = options["case_s"]
        self._cases = cases
        self._outcomes: Counter[str] = Counter()
        self.state: dict[str, Any] = {
            "cases": 0,
            "num_failures": 0,
            "failures": [],
            "slowest_s": 0.0,
            "slowest_case": 0,
            "done": False,
        }
        signal.signal(signal.SIGALRM, _on_alarm)

    def run(self, document: bytes) -> None:
        """Try one case; the last one sends the whole report."""
        state, number = self.state, self.state["cases"]
        began_s = time.perf_counter()
        signal.setitimer(signal.ITIMER_REAL, self._case_s)
        try:
            self._outcomes[self._target.check(document)] += 1
        except BaseException as error:  # noqa: BLE001 - whatever comes out is the finding
            self._outcomes["failed"] += 1
            _note_failure(state, document, error)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        took_s = time.perf_counter() - began_s
        if took_s > state["slowest_s"]:
            state["slowest_s"], state["slowest_case"] = took_s, number
        state["cases"] = number + 1
        if state["cases"] == self._cases:
            state["done"] = True
            state["peak_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        if state["done"] or number % _EVERY == 0:
            self._report.send({**state, "outcomes": dict(self._outcomes)})


def _on_alarm(_signal: int, _frame: object) -> None:
    raise _CaseTimeoutError("the case took too long")


def _limit_memory() -> None:
    used = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    limit = used * resource.getpagesize() + MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def _note_failure(state: dict[str, Any], document: bytes, error: BaseException) -> None:
    state["num_failures"] += 1
    place = traceback.extract_tb(error.__traceback__)[-1]
    where = f"{Path(place.filename).name}:{place.lineno} {type(error).__name__}"
    if len(state["failures"]) >= MAX_KEPT or where in {f["place"] for f in state["failures"]}:
        return
    kept = {"case": state["cases"], "error": str(error)[:500], "place": where}
    state["failures"].append({**kept, "bytes": base64.b64encode(document).decode()})


def _keep_failures(targets: dict[str, dict[str, Any]], output: Path | None) -> None:
    """Write the bytes of failed cases beside the result; they belong into tests/hostile/corpus."""
    for name, target in targets.items():
        for failure in target["failures"]:
            content = base64.b64decode(failure.pop("bytes"))
            if output is None or not content:
                continue
            folder = output.with_suffix("") / name
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"case{failure['case']}").write_bytes(content)


if __name__ == "__main__":
    sys.exit(main())
