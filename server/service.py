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
from server.decision import Verdict, decide, missing_score
from server.errors import ApiError
from server.lifecycle import Lifecycle
from server.logs import current_request_id
from server.ports import (
    AdapterCard,
    BatchKey,
    ChoiceQuestion,
    EncodedRow,
    Engine,
    EngineStoppedError,
    Policy,
    Question,
    RowRejectedError,
    RowTooLongError,
    Sampling,
)
from server.registry import AdapterRegistry, find_policy
from server.schemas import ClassifyRequest
from server.settings import Settings
from server.telemetry import Telemetry

__all__ = ["Outcome", "Progress", "Service", "service_of"]


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
        policy: The rule that decided; None when the adapter has none.
        rows: The encoded rows, in the order of the input.
        answer: Their scores and times.
        verdicts: Their decisions.
        calibrated: Whether the policy was chosen for this sampling.
        mask_set: Id of the sample set; None when nothing was sampled.
        tokenize_s: Time spent on encoding.
    """

    card: AdapterCard
    key: BatchKey
    policy: Policy | None
    rows: tuple[EncodedRow, ...]
    answer: Answer
    verdicts: tuple[Verdict, ...]
    calibrated: bool
    mask_set: str | None
    tokenize_s: float


@dataclass(frozen=True)
class Service:
    """The parts of one app."""

    settings: Settings
    telemetry: Telemetry
    registry: AdapterRegistry
    admission: Admission
    lifecycle: Lifecycle
    encoders: ThreadPoolExecutor

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
        policy = find_policy(card, request.policy.name if request.policy else None)
        check_policy(policy, sampling, card)
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
            decide(policy, scores, truncated=row.truncated)
            for row, scores in zip(rows, answer.rows, strict=True)
        )
        default = sampling == card.defaults
        for row, scores, verdict in zip(rows, answer.rows, verdicts, strict=True):
            self.telemetry.prediction(card, row, scores, verdict)
            if default:
                self.telemetry.drift(card, scores)
        return Outcome(
            card=card,
            key=key,
            policy=policy,
            rows=rows,
            answer=answer,
            verdicts=verdicts,
            calibrated=default and policy is not None,
            mask_set=mask_set,
            tokenize_s=tokenize_s,
        )

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


def check_policy(policy: Policy | None, sampling: Sampling, card: AdapterCard) -> None:
    """Refuse a policy whose score this sampling cannot give.

    Raises:
        ApiError: 422 with the reason.
    """
    if policy is None:
        return
    missing = missing_score(policy, sampling, point_method=card.point_method)
    if missing is not None:
        raise ApiError(
            "policy_not_applicable",
            f"policy {policy.name} limits mutual_information, but {missing}",
            errors=({"pointer": "#/policy"},),
        )


def check_kind(request: ClassifyRequest, question: Question, card: AdapterCard) -> None:
    """Refuse texts for a multiple-choice adapter and questions for a text adapter.

    Raises:
        ApiError: 422 saying which form the adapter wants.
    """
    asked = "choice" if isinstance(question, ChoiceQuestion) else "text"
    if asked == card.kind:
        return
    wanted = "a text" if card.kind == "text" else "an object with question and choices"
    raise ApiError(
        "invalid_request",
        f"adapter {card.name} answers {card.kind} input: send {wanted} per row",
        errors=({"pointer": request.pointer(0), "code": "wrong_input_form"},),
    )


def encode(
    engine: Engine, card: AdapterCard, request: ClassifyRequest, questions: list[Question]
) -> tuple[EncodedRow, ...]:
    """Encode every row; runs in a thread.

    Raises:
        ApiError: 422 naming every row that cannot be encoded.
    """
    rows: list[EncodedRow] = []
    faults: list[dict[str, object]] = []
    for index, question in enumerate(questions):
        try:
            rows.append(engine.encode(card.name, question, request.truncate))
        except RowTooLongError as error:
            fault = {"code": "input_too_long", "limit": error.limit, "actual": error.actual}
            details = {"detail": str(error), "unit": "tokens"}
            faults.append({"pointer": request.pointer(index), **fault, **details})
        except RowRejectedError as error:
            fault = {"code": "input_rejected", "detail": str(error)}
            faults.append({"pointer": request.pointer(index), **fault})
    if faults:
        code = "input_too_long" if faults[0]["code"] == "input_too_long" else "input_rejected"
        detail = f"{faults[0]['pointer']}: {faults[0]['detail']}"
        raise ApiError(code, detail, errors=tuple(faults))
    return tuple(rows)
