"""What one app is made of, and the straight line of one classification.

Permit -> schema -> encode -> reserve tokens -> engine -> decision -> telemetry -> answer. HTTP
stays in ``routes``; this file sees parsed requests and plain values.
"""

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import cast

from fastapi import Request

from server.batching import Admission, Answer, BatchFailedError, DeadlinePassedError, Permit, Ticket
from server.decision import Verdict
from server.encoding import check_kind, encode
from server.errors import ApiError
from server.feedback import FeedbackStore, PredictionClaim, PredictionSigner, make_nonce
from server.lifecycle import Lifecycle
from server.logs import current_request_id
from server.ports import (
    AdapterCard,
    BatchKey,
    EncodedRow,
    EngineStoppedError,
    RowScores,
    Sampling,
)
from server.registry import AdapterRegistry
from server.ruling import Ruling, rule
from server.schemas import ClassifyRequest
from server.settings import Settings
from server.telemetry import Telemetry

__all__ = ["Outcome", "Progress", "Service", "service_of", "sign"]


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


@dataclass(frozen=True)
class Service:
    """The parts of one app.

    ``what_if`` is one thread of its own, so that questions about policies wait for each other and
    never hold up an answer.
    """

    settings: Settings
    telemetry: Telemetry
    registry: AdapterRegistry
    admission: Admission
    lifecycle: Lifecycle
    encoders: ThreadPoolExecutor
    what_if: ThreadPoolExecutor
    signer: PredictionSigner
    feedback: FeedbackStore | None

    async def classify(
        self, request: ClassifyRequest, permit: Permit, deadline_s: float, progress: Progress
    ) -> Outcome:
        """Answer every row of a request.

        Args:
            request: The parsed request.
            permit: Takes the request's rows and tokens; the caller gives it back.
            deadline_s: When the answer is worthless, in seconds on the monotonic clock.
            progress: Filled in on the way.

        Raises:
            ApiError: The request cannot be answered as it stands.
            QueueFullError: There is no room for its rows or tokens.
            TimeoutError: The deadline passed in the queue.
        """
        engine = self.lifecycle.engine
        card = self.registry.find(request.model)
        sampling = resolve_sampling(request, card)
        ruling = rule(card, request.policy, sampling, self.settings.locked_policy)
        questions = request.questions()
        check_kind(request, questions[0], card)
        permit.reserve_rows(len(questions))

        began_s = time.monotonic()
        loop = asyncio.get_running_loop()
        rows = await loop.run_in_executor(self.encoders, encode, engine, card, request, questions)
        key = BatchKey(card.name, sampling)
        mask_set = await loop.run_in_executor(self.encoders, engine.mask_set, key)
        tokenize_s = time.monotonic() - began_s
        self.telemetry.stage("tokenize", tokenize_s)
        longest = max(row.num_tokens for row in rows)
        permit.reserve_tokens(longest * len(rows) * sampling.passes)

        ticket = Ticket(key, rows, deadline_s=deadline_s, request_id=current_request_id())
        answer = await self._ask(ticket, progress)
        verdicts = tuple(
            ruling.decide(scores, truncated=row.truncated)
            for row, scores in zip(rows, answer.rows, strict=True)
        )
        outcome = Outcome(
            card=card,
            key=key,
            ruling=ruling,
            rows=rows,
            answer=answer,
            verdicts=verdicts,
            prediction_ids=sign(self.signer, card, ruling, key.sampling, answer.rows, verdicts),
            mask_set=mask_set,
            tokenize_s=tokenize_s,
        )
        self._observe(outcome)
        return outcome

    def _observe(self, outcome: Outcome) -> None:
        """Count what was answered; rows of another sampling stay out of the drift metrics."""
        answered = zip(outcome.rows, outcome.answer.rows, outcome.verdicts, strict=True)
        for row, scores, verdict in answered:
            self.telemetry.prediction(outcome.card, row, scores, verdict)
            if outcome.ruling.default_sampling:
                self.telemetry.drift(outcome.card, scores)

    async def _ask(self, ticket: Ticket, progress: Progress) -> Answer:
        progress.ticket = ticket
        try:
            self.lifecycle.batcher.submit(ticket)
            return await asyncio.wrap_future(ticket.future)
        except EngineStoppedError:
            raise ApiError(
                "engine_unavailable",
                "the engine stopped before it could answer",
                headers={"Retry-After": "5"},
            ) from None
        except BatchFailedError:
            detail = f"the engine failed on this request; report request id {ticket.request_id}"
            raise ApiError("internal_error", detail) from None
        except DeadlinePassedError:
            raise TimeoutError from None


def sign(
    signer: PredictionSigner,
    card: AdapterCard,
    ruling: Ruling,
    sampling: Sampling,
    rows: tuple[RowScores, ...],
    verdicts: tuple[Verdict, ...],
) -> tuple[str, ...]:
    """Return the signed id of every row: what was answered, by whom, under which promise."""
    issued_at = int(time.time())
    claims = (
        PredictionClaim(
            adapter=card.name,
            revision=card.revision,
            label=scores.label,
            confidence=scores.confidence,
            decision=verdict.decision,
            policy=ruling.policy.name if ruling.policy else None,
            target_risk=ruling.target_risk,
            num_samples=sampling.num_samples,
            seed=sampling.seed,
            estimator=sampling.estimator,
            issued_at=issued_at,
            nonce=make_nonce(),
            default_sampling=ruling.default_sampling,
        )
        for scores, verdict in zip(rows, verdicts, strict=True)
    )
    return tuple(signer.sign(claim) for claim in claims)


def service_of(request: Request) -> Service:
    """Return the parts of the app that a request came to."""
    return cast("Service", request.app.state.service)


def resolve_sampling(request: ClassifyRequest, card: AdapterCard) -> Sampling:
    """Return the sampling of a request: the adapter's defaults with what the request changes.

    Raises:
        ApiError: 422 when several samples are asked of something that has one function only.
    """
    estimator = request.estimator or card.defaults.estimator
    single = estimator == "mean_mask" or card.point_method
    if single and request.num_samples not in (None, 1):
        reason = (
            f"adapter {card.name} does not sample (method {card.method})"
            if card.point_method
            else "the mean_mask estimator is one deterministic pass"
        )
        raise ApiError(
            "invalid_request",
            f"num_samples must be 1 or left out: {reason}",
            errors=({"pointer": "#/num_samples", "limit": 1, "actual": request.num_samples},),
        )
    defaults = card.defaults
    return replace(
        defaults,
        estimator=estimator,
        num_samples=1 if single else (request.num_samples or defaults.num_samples),
        # one function has no seed; leaving the default lets such rows share batches
        seed=defaults.seed if single or request.seed is None else request.seed,
    )
