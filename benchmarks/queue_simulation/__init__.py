"""The server's queue as a discrete-event simulation, checked against a real server.

Admission and the choice of batches are the server's own code (``server.batching``); what is
modelled is when requests arrive, how long a batch takes and what a request costs outside of it.
"""

from benchmarks.queue_simulation.arrivals import Arrival, bursty, of_lengths, recorded
from benchmarks.queue_simulation.capacity import highest_rate, saturated_rate
from benchmarks.queue_simulation.outcomes import Outcome, summarise
from benchmarks.queue_simulation.service import Bound, Linear, Service
from benchmarks.queue_simulation.simulation import (
    BALANCERS,
    Balancer,
    ReplicaModel,
    Run,
    simulate,
)

__all__ = [
    "BALANCERS",
    "Arrival",
    "Balancer",
    "Bound",
    "Linear",
    "Outcome",
    "ReplicaModel",
    "Run",
    "Service",
    "bursty",
    "highest_rate",
    "of_lengths",
    "recorded",
    "saturated_rate",
    "simulate",
    "summarise",
]
