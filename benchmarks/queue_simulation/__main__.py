"""Simulate the queue of replicas, or check the simulation against a server on this machine.

    python -m benchmarks.queue_simulation --rate 8 --replicas 2
    python -m benchmarks.queue_simulation --check --output benchmarks/results/queue-simulation.json

Without ``--check`` replicas are what a check has found, by default the last one; ``--arrivals``
may be a file, see ``recorded``.
"""

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.output import publish
from benchmarks.queue_simulation.arrivals import Arrival, bursty, of_lengths, recorded
from benchmarks.queue_simulation.calibration import replica_of
from benchmarks.queue_simulation.check import add_check_options, check, judge
from benchmarks.queue_simulation.outcomes import summarise
from benchmarks.queue_simulation.simulation import BALANCERS, simulate
from benchmarks.serving.load import poisson
from benchmarks.serving.report import conclude
from benchmarks.serving.subject import add_options

RESULT = Path(__file__).parents[1] / "results" / "queue-simulation.json"


def main(arguments: list[str] | None = None) -> int:
    """Simulate or check, print and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="against a server on this machine")
    parser.add_argument("--measured", type=Path, default=RESULT, help="result of a check")
    parser.add_argument("--arrivals", default="poisson", help="poisson, bursty or a file")
    parser.add_argument("--rate", type=float, default=1.0, help="requests a second")
    parser.add_argument("--replicas", type=int, default=1)
    parser.add_argument("--balancer", choices=list(BALANCERS), default="least-connections")
    parser.add_argument("--seed", type=int, default=0)
    add_check_options(parser)
    add_options(parser)
    options = parser.parse_args(arguments)
    if options.check:
        found = check(options)
        return conclude("queue-simulation", found, judge(found), options.output)
    publish(_simulated(options), options.output)
    return 0


def _simulated(options: argparse.Namespace) -> dict[str, Any]:
    measured = json.loads(options.measured.read_text(encoding="utf-8"))
    model = replace(replica_of(measured["replica"]), deadline_s=options.deadline_ms / 1000)
    arrivals = _arrivals(options, measured["lengths"])
    run = simulate(arrivals, model, replicas=options.replicas, balancer=BALANCERS[options.balancer])
    seconds = max(arrival.at_s for arrival in arrivals)
    return {
        **summarise(run.outcomes, seconds),
        "utilisation": run.utilisation,
        "rows_per_batch": run.rows_per_batch,
    }


def _arrivals(options: argparse.Namespace, lengths: list[int]) -> list[Arrival]:
    processes = {"poisson": poisson, "bursty": bursty}
    if options.arrivals not in processes:
        return recorded(Path(options.arrivals), lengths)
    moments = processes[options.arrivals](options.rate, options.seconds, options.seed)
    return list(of_lengths(moments, lengths))


if __name__ == "__main__":
    sys.exit(main())
