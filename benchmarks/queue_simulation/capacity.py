"""What replicas carry: at most, and within a bound on the slowest answers."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from benchmarks.queue_simulation.arrivals import Arrival, of_lengths
from benchmarks.queue_simulation.outcomes import summarise
from benchmarks.queue_simulation.simulation import BALANCERS, Balancer, ReplicaModel, simulate
from benchmarks.serving.load import poisson
from server.batching import AdmissionLimits

__all__ = ["highest_rate", "saturated_rate"]

_UNBOUNDED = AdmissionLimits(10**9, 10**9, 10**12)
_STEPS = 9  # of the bisection: the rate to 0.2 % of the largest
_MAX_REFUSED = 0.001
_SKIPPED = 0.1  # of the time, while the queue fills

Moments = Callable[[float, float], Iterable[float]]
"""From requests a second and seconds to their moments."""


def saturated_rate(model: ReplicaModel, lengths: Sequence[int], requests: int = 640) -> float:
    """Return the requests of one row a second that one replica answers when enough of them wait."""
    model = replace(model, admission=_UNBOUNDED, deadline_s=math.inf)
    run = simulate((Arrival(0.0, (lengths[n % len(lengths)],)) for n in range(requests)), model)
    return requests / run.ended_s


def highest_rate(  # noqa: PLR0913  each says something else about the question
    model: ReplicaModel,
    lengths: Sequence[int],
    p99_s: float,
    *,
    replicas: int = 1,
    balancer: Balancer = BALANCERS["least-connections"],
    moments: Moments = poisson,
    requests: int = 5000,
) -> float:
    """Return the requests a second at which 99 % of the answers come within a bound.

    Not more than one in a thousand may be refused or late. By bisection, between nothing and what
    saturates the replicas.

    Args:
        model: Of one replica.
        lengths: Tokens of the rows, in turn; one row a request.
        p99_s: The bound, in seconds.
        replicas: How many.
        balancer: Chooses among them.
        moments: The process of arrivals.
        requests: So many come, on average, at every rate that is tried.

    Returns:
        The rate; 0 where even a single request takes longer.
    """

    def holds(rate: float) -> bool:
        seconds = requests / rate
        arrivals = of_lengths(moments(rate, seconds), lengths)
        run = simulate(arrivals, model, replicas=replicas, balancer=balancer)
        found = summarise(run.outcomes, seconds, _SKIPPED * seconds)
        return found["p99_s"] <= p99_s and found["shed"] + found["late"] <= _MAX_REFUSED

    if model.front_s + model.service([max(lengths)], model.samples) + model.delay_s > p99_s:
        return 0.0
    low, high = 0.0, replicas * saturated_rate(model, lengths)
    for _ in range(_STEPS):
        middle = (low + high) / 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low
