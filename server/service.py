"""What one app is made of, and the straight line of one classification.

Permit -> schema -> adapter -> encode -> reserve tokens -> engine -> decision -> telemetry. HTTP
stays in ``routes``; this file sees parsed requests and plain values.
"""

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import cast

from fastapi import Request

from server.adapters import AdapterManager, Lease
from server.batching import (
    Admission,
    Answer,
    Batcher,
    BatchFailedError,
    BatchTooLargeError,
    DeadlinePassedError,
    Permit,
    Ticket,
)
from server.claims import sign_answers
from server.decision import Verdict
from server.encoding import check_kind, encode
from server.errors import ApiError
from server.feedback import FeedbackStore, PredictionSigner
from server.lifecycle import Lifecycle
from server.logs import current_request_id
from server.ports import (
    AdapterCard,
    BatchKey,
    EncodedRow,
    EngineStoppedError,
    EngineUnavailableError,
    Priority,
)
from server.ruling import Ruling, rule
from server.sampling import resolve_sampling
from server.schemas import ClassifyRequest
from server.settings import Settings
from server.shadow import Compared, Shadows
from server.telemetry import Telemetry

__all__ = ["Outcome", "Progress", "Service", "engine_stopped", "service_of"]

RETRY_S = 5


@dataclass(slots=True)
class Progress:
    """How far a request has come; read when its client leaves."""

    ticket: Ticket | None = None

    @property
    def running(self) -> bool:
        """Whether the engine has begun with it."""
        return self.ticket is not None and self.ticket.started


@dataclass(frozen=True, slots=True)
class Outcome:
    """Everything an answer is written from.

    Attributes:
        card: The adapter that answered.
        key: Adapter and sampling.
        ruling: The policy that decided, and what it promises here.
        rows: The encoded rows, in the order of the input.
        answer: Their scores and times.
        verdicts: Their decisions.
        prediction_ids: Their signed ids.
        mask_set: Id of the sample set; None when nothing was sampled.
        tokenize_s: Time spent on encoding.
    """

    card: AdapterCard
    key: BatchKey
    ruling: Ruling
    rows: tuple[EncodedRow, ...]
    answer: Answer
    verdicts: tuple[Verdict, ...]
    prediction_ids: tuple[str, ...]
    mask_set: str | None
    tokenize_s: float


@dataclass(frozen=True, slots=True)
class _Terms:
    """When and how urgently an answer is wanted, and what it may take."""

    permit: Permit
    deadline_s: float
    priority: Priority
    progress: Progress


@dataclass(frozen=True)
class Service:
    """The parts of one app.

    ``what_if`` is one thread of its own, so that questions about policies wait for each other and
    never hold up an answer.
    """

    settings: Settings
    telemetry: Telemetry
    adapters: AdapterManager
    admission: Admission
    lifecycle: Lifecycle
    encoders: ThreadPoolExecutor
    what_if: ThreadPoolExecutor
    shadows: Shadows
    signer: PredictionSigner
    feedback: FeedbackStore | None

    async def classify(
        self,
        request: ClassifyRequest,
        permit: Permit,
        deadline_s: float,
        progress: Progress,
        priority: Priority = "interactive",
    ) -> Outcome:
        """Answer every row of a request.

        Args:
            request: The parsed request.
            permit: Takes the request's rows and tokens; the caller gives it back.
            deadline_s: When the answer is worthless, in seconds on the monotonic clock.
            progress: Filled in on the way.
            priority: Who goes first when not all can.

        Raises:
            ApiError: The request cannot be answered as it stands.
            QueueFullError: There is no room for its rows or tokens.
            TimeoutError: The deadline passed in the queue or in the engine.
        """
        self.lifecycle.require_serving()
        terms = _Terms(permit, deadline_s, priority, progress)
        async with self.adapters.lease(request.model, current_request_id()) as lease:
            outcome = await self._answer(lease, request, terms)
        self._observe(outcome)
        if (shadow := lease.shadow) is not None:
            self.shadows.start(_compared(outcome), lambda: self._ask_shadow(shadow, request))
        return outcome

    async def _answer(self, lease: Lease, request: ClassifyRequest, terms: _Terms) -> Outcome:
        card, engine = lease.card, lease.engine
        batcher = self.lifecycle.batcher  # of this engine: a row means nothing to another one
        sampling = resolve_sampling(request, card)
        ruling = rule(card, request.policy, sampling, self.settings.locked_policy)
        questions = request.questions()
        check_kind(request, questions[0], card)
        terms.permit.reserve_rows(len(questions))

        began_s = time.monotonic()
        loop = asyncio.get_running_loop()
        key = card.batch_key(sampling)
        try:
            rows = await loop.run_in_executor(
                self.encoders, encode, engine, card, request, questions
            )
            mask_set = await loop.run_in_executor(self.encoders, engine.mask_set, key)
        except EngineStoppedError:
            raise engine_stopped() from None
        tokenize_s = time.monotonic() - began_s
        self.telemetry.stage("tokenize", tokenize_s)
        longest = max(row.num_tokens for row in rows)
        terms.permit.reserve_tokens(longest * len(rows) * sampling.passes)

        ticket = Ticket(
            key,
            rows,
            deadline_s=terms.deadline_s,
            request_id=current_request_id(),
            priority=terms.priority,
        )
        answer = await self._ask(batcher, ticket, terms.progress)
        verdicts = tuple(
            ruling.decide(scores, truncated=row.truncated)
            for row, scores in zip(rows, answer.rows, strict=True)
        )
        return Outcome(
            card=card,
            key=key,
            ruling=ruling,
            rows=rows,
            answer=answer,
            verdicts=verdicts,
            prediction_ids=sign_answers(
                self.signer, card, ruling, sampling, answer.rows, verdicts, mask_set=mask_set
            ),
            mask_set=mask_set,
            tokenize_s=tokenize_s,
        )

    async def _ask_shadow(self, model: str, request: ClassifyRequest) -> Compared:
        """Answer a request once more with another adapter, when nothing better is to be done."""
        timeout_s = self.settings.request_timeout_s
        with self.admission.enter("batch", timeout_s) as permit:
            terms = _Terms(permit, time.monotonic() + timeout_s, "batch", Progress())
            async with (
                asyncio.timeout(timeout_s),
                self.adapters.lease(model, current_request_id()) as lease,
            ):
                return _compared(await self._answer(lease, request, terms))

    def _observe(self, outcome: Outcome) -> None:
        """Count what was answered; rows of another sampling stay out of the drift metrics."""
        answered = zip(outcome.rows, outcome.answer.rows, outcome.verdicts, strict=True)
        for row, scores, verdict in answered:
            self.telemetry.prediction(outcome.card, row, scores, verdict)
            if outcome.ruling.default_sampling:
                self.telemetry.drift(outcome.card, scores)

    async def _ask(self, batcher: Batcher, ticket: Ticket, progress: Progress) -> Answer:
        progress.ticket = ticket
        retry = {"Retry-After": str(RETRY_S)}
        try:
            batcher.submit(ticket)
            return await asyncio.wrap_future(ticket.future)
        except EngineStoppedError:
            raise engine_stopped() from None
        except EngineUnavailableError:
            detail = "what the engine computes with does not answer at the moment"
            raise ApiError("engine_unavailable", detail, headers=retry) from None
        except BatchTooLargeError:
            detail = "the engine ran out of memory on this request; send fewer or shorter rows"
            raise ApiError("out_of_memory", detail, headers=retry) from None
        except BatchFailedError:
            detail = f"the engine failed on this request; report request id {ticket.request_id}"
            raise ApiError("internal_error", detail) from None
        except DeadlinePassedError:
            raise TimeoutError from None


def engine_stopped() -> ApiError:
    """Return the answer to a request whose engine was lost under it."""
    return ApiError(
        "engine_unavailable",
        "the engine stopped before it could answer",
        headers={"Retry-After": str(RETRY_S)},
    )


def service_of(request: Request) -> Service:
    """Return the parts of the app that a request came to."""
    return cast("Service", request.app.state.service)


def _compared(outcome: Outcome) -> Compared:
    return Compared(
        outcome.card,
        tuple(scores.label for scores in outcome.answer.rows),
        tuple(verdict.decision for verdict in outcome.verdicts),
    )
