"""``POST /v1/classify`` and its alias: deadline, permit, body, disconnect; then the service."""

import asyncio
import time
import uuid
from collections.abc import Coroutine
from typing import Any, TypeVar

from fastapi import APIRouter, Request, Response
from starlette.requests import ClientDisconnect

from server.batching import QueueFullError
from server.errors import ApiError
from server.middleware import arrival_s
from server.parsing import check_body_headers, parse_request, read_body
from server.routes.documents import error_documents
from server.routes.present import present_rows, sampling_card
from server.routes.receipts import policy_card, prediction_sets_card
from server.schemas import ClassifyRequest, ClassifyResponse
from server.schemas.examples import CLASSIFY_EXAMPLES
from server.schemas.responses import Timings, Usage
from server.service import Outcome, Progress, Service, service_of
from server.settings import Settings

__all__ = ["router"]

T = TypeVar("T")
router = APIRouter(tags=["classify"])

_BODY = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {
                "schema": {"$ref": "#/components/schemas/ClassifyRequest"},
                "examples": CLASSIFY_EXAMPLES,
            }
        },
    },
    "parameters": [
        {
            "name": "X-Request-Timeout-Ms",
            "in": "header",
            "required": False,
            "schema": {"type": "integer", "minimum": 1},
            "description": "Deadline of this request in milliseconds; past it the answer is 504.",
        },
        {
            "name": "X-Request-Id",
            "in": "header",
            "required": False,
            "schema": {"type": "string", "pattern": "^[A-Za-z0-9._-]{1,128}$"},
            "description": "Sent back, and put on every log line; another form is replaced.",
        },
    ],
}


@router.post(
    "/v1/classify",
    operation_id="classify",
    summary="Classify texts, or answer multiple-choice questions, with uncertainty",
    response_model=ClassifyResponse,
    response_model_exclude_none=False,
    responses=error_documents(400, 404, 413, 415, 422, 429, 500, 503, 504),
    openapi_extra=_BODY,
)
@router.post("/classify", include_in_schema=False)
async def classify(request: Request) -> Response:
    """Answer every row with a label, calibrated probabilities, uncertainty and a decision.

    Abstaining is a 200: read `decision` and `reasons`.
    """
    service = service_of(request)
    timeout_s = _timeout_s(request, service.settings)
    try:
        service.lifecycle.require_serving()
        check_body_headers(request, service.settings.max_body_bytes)
        deadline_s = arrival_s(request) + timeout_s
        async with asyncio.timeout(deadline_s - time.monotonic()):
            return await _answer(service, request, deadline_s)
    except TimeoutError:
        service.telemetry.rejected("deadline")
        detail = f"no answer within the deadline of {timeout_s:g} s"
        raise ApiError("deadline_exceeded", detail) from None
    except QueueFullError as error:
        service.telemetry.rejected("queue_full")
        raise ApiError(
            "queue_full",
            str(error),
            errors=({"code": error.resource, "limit": error.limit},),
            headers={"Retry-After": str(error.retry_after_s)},
        ) from None
    except ApiError as error:
        _count_rejection(service, error)
        raise


async def _answer(service: Service, request: Request, deadline_s: float) -> Response:
    progress = Progress()
    try:
        with service.admission.enter() as permit:
            body = await read_body(request, service.settings.max_body_bytes)
            parsed = parse_request(body, service.settings)
            work = service.classify(parsed, permit, deadline_s, progress)
            outcome = await _while_connected(request, work)
    except ClientDisconnect:
        service.telemetry.cancelled(running=progress.running)
        raise ApiError("client_disconnected", "the client left before the answer") from None
    began_s = time.monotonic()
    response = _respond(parsed, outcome)
    service.telemetry.stage("serialize", time.monotonic() - began_s)
    return response


async def _while_connected(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Return what the work returns; drop it and raise ``ClientDisconnect`` if the client leaves."""
    task = asyncio.ensure_future(work)
    watcher = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        task.cancel()
        watcher.cancel()
        await asyncio.gather(task, watcher, return_exceptions=True)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _timeout_s(request: Request, settings: Settings) -> float:
    """Return the deadline a request asks for, in seconds from its arrival."""
    asked = request.headers.get("x-request-timeout-ms")
    if asked is None:
        return settings.request_timeout_s
    limit = int(settings.max_request_timeout_s * 1000)
    # nine digits are eleven days; more would only serve to overflow something
    if not (asked.isascii() and asked.isdecimal() and len(asked) <= 9 and 1 <= int(asked) <= limit):  # noqa: PLR2004
        raise ApiError(
            "bad_header",
            f"X-Request-Timeout-Ms must be a whole number between 1 and {limit}",
            errors=({"code": "X-Request-Timeout-Ms", "limit": limit},),
        )
    return int(asked) / 1000


def _count_rejection(service: Service, error: ApiError) -> None:
    reasons = {
        "body_too_large": "too_large",
        "too_many_rows": "too_large",
        "not_ready": "not_ready",
        "engine_unavailable": "not_ready",
        "draining": "draining",
    }
    if error.code in reasons:
        service.telemetry.rejected(reasons[error.code])


def _respond(request: ClassifyRequest, outcome: Outcome) -> Response:
    answer, card, ruling = outcome.answer, outcome.card, outcome.ruling
    model = f"{card.name}:{card.revision}"
    tokens = sum(row.num_tokens for row in outcome.rows)
    timings = Timings(
        queue_s=answer.queue_s,
        tokenize_s=outcome.tokenize_s,
        forward_s=answer.forward_s,
        uq_s=answer.uq_s,
    )
    body = ClassifyResponse(
        id=f"classify-{uuid.uuid4().hex}",
        created=int(time.time()),
        model=model,
        data=present_rows(request, outcome),
        policy=policy_card(ruling.policy, ruling.combined_with) if ruling.policy else None,
        prediction_sets=prediction_sets_card(card) if ruling.default_sampling else None,
        sampling=sampling_card(outcome.key.sampling, outcome.card, outcome.mask_set),
        usage=Usage(prompt_tokens=tokens, total_tokens=tokens),
        timings=timings if "timings" in request.include else None,
        metadata=request.metadata,
    )
    stages = timings.model_dump().items()
    headers = {
        "X-Model-Revision": card.revision,
        "X-Compute-Tokens": str(tokens * outcome.key.sampling.passes),
        "Server-Timing": ", ".join(
            f"{name.removesuffix('_s')};dur={seconds * 1000:.2f}" for name, seconds in stages
        ),
    }
    unasked = {"data": {"__all__": _unasked(request)}} | {
        name: True for name in ("timings", "metadata") if getattr(body, name) is None
    }
    text = body.model_dump_json(exclude=unasked)
    return Response(text, media_type="application/json", headers=headers)


def _unasked(request: ClassifyRequest) -> set[str]:
    """Return the optional fields of a row that the request did not ask for."""
    asked = {"top": request.top_k is not None, "samples": "samples" in request.include}
    return {name for name, wanted in asked.items() if not wanted}
