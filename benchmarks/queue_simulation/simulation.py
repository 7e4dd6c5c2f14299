"""The events of a server's queue: arrival, admission, encoding, batch, answer.

A replica admits and batches with the server's own ``Admission`` and ``next_batch``, on a clock that
jumps from event to event. Requests pass through its event loop one after the other, then wait for
the engine. Not modelled: failures, priorities, clients that leave; a batch that runs is finished
although nobody waits for it any more.
"""

import heapq
import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial

from benchmarks.queue_simulation.arrivals import Arrival
from benchmarks.queue_simulation.outcomes import Fate, Outcome
from benchmarks.queue_simulation.service import Service
from server.batching import (
    Admission,
    AdmissionLimits,
    BatchLimits,
    DeadlinePassedError,
    Pending,
    Permit,
    QueueFullError,
    Ticket,
    next_batch,
)
from server.ports import BatchKey, EncodedRow, Sampling

__all__ = ["BALANCERS", "Balancer", "ReplicaModel", "Run", "simulate"]


@dataclass(frozen=True)
class ReplicaModel:
    """What is known about one replica.

    Attributes:
        service: How long a batch takes.
        batch: Bounds of one batch.
        admission: Bounds of what is inside.
        samples: M.
        deadline_s: Of every request, from its arrival.
        front_s: What a request takes of the event loop, which does one thing at a time.
        delay_s: What a client waits besides: parts that do not hold up anyone else.
        unpadded: Whether rows share a pass without padding.
    """

    service: Service
    batch: BatchLimits
    admission: AdmissionLimits
    samples: int
    deadline_s: float = 30.0
    front_s: float = 0.0
    delay_s: float = 0.0
    unpadded: bool = False


@dataclass
class Run:
    """What happened.

    Attributes:
        outcomes: One for each request, in the order of their ends.
        batches: Rows of every batch.
        busy_s: Time that each replica's engine worked.
        ended_s: When the last request ended.
    """

    outcomes: list[Outcome] = field(default_factory=list)
    batches: list[int] = field(default_factory=list)
    busy_s: list[float] = field(default_factory=list)
    ended_s: float = 0.0

    @property
    def utilisation(self) -> float:
        """Share of the time that an engine worked, mean over replicas."""
        return sum(self.busy_s) / len(self.busy_s) / self.ended_s

    @property
    def rows_per_batch(self) -> float:
        """Mean rows of a batch."""
        return sum(self.batches) / len(self.batches)


class _Clock:
    """Does things at their time; of equal times the first that was asked for goes first."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self._order = itertools.count()
        self._events: list[tuple[float, int, Callable[[], None]]] = []

    def at(self, at_s: float, action: Callable[[], None]) -> None:
        heapq.heappush(self._events, (at_s, next(self._order), action))

    def run(self) -> None:
        while self._events:
            self.now_s, _, action = heapq.heappop(self._events)
            action()


class _Request:
    """One request inside a replica."""

    def __init__(self, arrival: Arrival, model: ReplicaModel) -> None:
        rows = tuple(
            EncodedRow(length, truncated=False, payload=None) for length in arrival.lengths
        )
        key = BatchKey("simulated", Sampling(model.samples), unpadded=model.unpadded)
        self.at_s = arrival.at_s
        self.ticket = Ticket(key, rows, deadline_s=arrival.at_s + model.deadline_s)
        self.left = len(rows)
        self.place = ExitStack()

    def enter(self, admission: Admission, patience_s: float) -> Permit:
        """Take a permit and reserve the rows; raises ``QueueFullError`` and holds nothing then."""
        with ExitStack() as place:
            permit = place.enter_context(admission.enter(patience_s=patience_s))
            permit.reserve_rows(self.left)
            self.place = place.pop_all()
        return permit


class _Replica:
    """One server: its event loop, its queue and its engine."""

    def __init__(self, model: ReplicaModel, clock: _Clock, run: Run) -> None:
        self.admission = Admission(model.admission)
        self._model, self._clock, self._run = model, clock, run
        self._place = len(run.busy_s)
        run.busy_s.append(0.0)
        self._requests: dict[Ticket, _Request] = {}
        self._waiting: list[Pending] = []
        self._working = False
        self._front_free_s = 0.0

    def arrive(self, arrival: Arrival) -> None:
        request = _Request(arrival, self._model)
        try:
            permit = request.enter(self.admission, self._model.deadline_s)
        except QueueFullError:
            self._end(request, "shed")
            return
        self._requests[request.ticket] = request
        self._front_free_s = max(self._clock.now_s, self._front_free_s) + self._model.front_s
        self._clock.at(self._front_free_s, partial(self._encoded, request, permit))
        if math.isfinite(request.ticket.deadline_s):
            self._clock.at(request.ticket.deadline_s, partial(self._expire, request))

    def _encoded(self, request: _Request, permit: Permit) -> None:
        if request.ticket not in self._requests:
            return
        try:
            permit.reserve_tokens(request.left * request.ticket.row_cost)
        except QueueFullError:
            self._end(request, "shed")
            return
        self._waiting.extend(request.ticket.pending(self._clock.now_s))
        self._look()

    def _look(self) -> None:
        """Let an idle engine take a batch, as its thread does when it is woken."""
        if self._working:
            return
        plan, (reason, wait_s) = next_batch(
            self._waiting,
            self._model.batch,
            now_s=self._clock.now_s,
            num_inside=self.admission.num_requests,
            stopping=False,
        )
        if reason is not None:
            self._waiting = list(plan.remaining)
            self._work(plan.rows)
            return
        self._waiting = [*plan.rows, *plan.remaining]
        if wait_s is not None:
            # later at least by the smallest step, or the time would never come
            later_s = math.nextafter(self._clock.now_s, math.inf)
            self._clock.at(max(later_s, self._clock.now_s + wait_s), self._look)

    def _work(self, rows: Sequence[Pending]) -> None:
        duration_s = self._model.service([row.num_tokens for row in rows], self._model.samples)
        self._working = True
        self._run.batches.append(len(rows))
        self._run.busy_s[self._place] += duration_s
        self._clock.at(self._clock.now_s + duration_s, partial(self._finish, rows, duration_s))

    def _finish(self, rows: Sequence[Pending], duration_s: float) -> None:
        self._working = False
        self.admission.observe_speed(sum(row.ticket.row_cost for row in rows), duration_s)
        for ticket, count in Counter(row.ticket for row in rows).items():
            request = self._requests.get(ticket)
            if request is None:
                continue
            request.left -= count
            if not request.left:
                self._end(request, "answered")
        self._look()

    def _expire(self, request: _Request) -> None:
        if request.ticket in self._requests:
            request.ticket.fail(DeadlinePassedError())
            self._end(request, "late")

    def _end(self, request: _Request, fate: Fate) -> None:
        self._requests.pop(request.ticket, None)
        request.place.close()
        self._run.ended_s = self._clock.now_s
        took_s = self._clock.now_s - request.at_s
        if fate == "answered":
            took_s += self._model.delay_s
        self._run.outcomes.append(Outcome(request.at_s, took_s, fate))


Balancer = Callable[[Sequence[int], int], int]
"""From the requests inside each replica and the request's number to the replica it goes to."""


def _round_robin(inside: Sequence[int], number: int) -> int:
    return number % len(inside)


def _least_connections(inside: Sequence[int], number: int) -> int:
    turn = number % len(inside)  # among equals the turn goes on
    return min(range(len(inside)), key=lambda i: (inside[i], (i - turn) % len(inside)))


BALANCERS: dict[str, Balancer] = {
    "least-connections": _least_connections,
    "round-robin": _round_robin,
}


def simulate(
    arrivals: Iterable[Arrival],
    model: ReplicaModel,
    *,
    replicas: int = 1,
    balancer: Balancer = _least_connections,
) -> Run:
    """Return what becomes of requests that come to equal replicas behind a balancer.

    Args:
        arrivals: In order of time.
        model: Of every replica.
        replicas: How many.
        balancer: Chooses a replica for each request; a request that is shed does not come again.
    """
    clock, run = _Clock(), Run()
    places = [_Replica(model, clock, run) for _ in range(replicas)]
    numbered = enumerate(arrivals)

    def admit() -> None:
        for number, arrival in itertools.islice(numbered, 1):
            clock.at(arrival.at_s, partial(_arrive, number, arrival))

    def _arrive(number: int, arrival: Arrival) -> None:
        chosen = balancer([replica.admission.num_requests for replica in places], number)
        places[chosen].arrive(arrival)
        admit()

    admit()
    clock.run()
    return run
