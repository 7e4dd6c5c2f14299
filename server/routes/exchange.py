"""One classification over HTTP, whatever shape its route speaks.

Deadline, permit, body, disconnect and refusals are the same for all of them: a route brings the
function that reads its body, and writes the outcome in its own words.
"""

import asyncio
import time
from collections.abc import Callable, Coroutine, Mapping
from contextlib import ExitStack
from typing import Any, TypeVar

from fastapi import Request, Response
from starlette.requests import ClientDisconnect

from server.batching import QueueFullError
from server.errors import ApiError
from server.middleware import arrival_s
from server.parsing import check_body_headers, read_body
from server.ports import Priority
from server.schemas import ClassifyRequest
from server.service import Outcome, Progress, Service, service_of
from server.settings import Settings
from server.tracing import record_stages

__all__ = ["HEADER_PARAMETERS", "Parse", "answer", "exchange", "in_words_of", "stages"]

T = TypeVar("T")
Parse = Callable[[bytes, Settings], ClassifyRequest]

HEADER_PARAMETERS: list[dict[str, object]] = [
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
    {
        "name": "X-Priority",
        "in": "header",
        "required": False,
        "schema": {"type": "string", "enum": ["interactive", "batch"], "default": "interactive"},
        "description": "`batch` lets requests go first that somebody waits for.",
    },
]
"""The headers of a request, as the OpenAPI document shows them."""

_REJECTIONS = {
    "body_too_large": "too_large",
    "too_many_rows": "too_large",
    "not_ready": "not_ready",
    "engine_unavailable": "not_ready",
    "draining": "draining",
    "request_timeout": "slow_client",
}


async def exchange(request: Request, parse: Parse) -> tuple[ClassifyRequest, Outcome]:
    """Read a request's body, classify it, and return both.

    Args:
        request: The request; nothing of its body has been read.
        parse: Makes the parsed request from the body; raises ``ApiError``.

    Raises:
        ApiError: Whatever stands between the request and its answer.
    """
    service = service_of(request)
    timeout_s = _timeout_s(request, service.settings)
    priority = _priority(request)
    try:
        service.lifecycle.require_serving()
        check_body_headers(request, service.settings.max_body_bytes)
        deadline_s = arrival_s(request) + timeout_s
        async with asyncio.timeout(deadline_s - time.monotonic()):
            return await _run(service, request, parse, deadline_s, priority)
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
        if error.code in _REJECTIONS:
            service.telemetry.rejected(_REJECTIONS[error.code])
        raise


async def _run(
    service: Service, request: Request, parse: Parse, deadline_s: float, priority: Priority
) -> tuple[ClassifyRequest, Outcome]:
    progress = Progress()
    try:
        with ExitStack() as place:
            patience_s = deadline_s - time.monotonic()
            permit = place.enter_context(service.admission.enter(priority, patience_s))
            parsed = parse(await read_body(request, service.settings), service.settings)
            if priority == "interactive" and parsed.asked_priority == "batch":
                place.close()  # and take a place among those that can wait
                priority = "batch"
                permit = place.enter_context(service.admission.enter(priority, patience_s))
            _log(request, rows=len(parsed.items))
            work = service.classify(parsed, permit, deadline_s, progress, priority)
            outcome = await _while_connected(request, work)
    except ClientDisconnect:
        service.telemetry.cancelled(running=progress.running)
        raise ApiError("client_disconnected", "the client left before the answer") from None
    _note(request, outcome)
    return parsed, outcome


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


def _priority(request: Request) -> Priority:
    asked = request.headers.get("x-priority", "interactive")
    if asked == "interactive" or asked == "batch":  # noqa: PLR1714 - the checker narrows by these
        return asked
    raise ApiError(
        "bad_header",
        "X-Priority must be interactive or batch",
        errors=({"code": "X-Priority"},),
    )


def stages(outcome: Outcome) -> dict[str, float]:
    """Return how long each stage took, in seconds; what is shared with others counts in full."""
    answer = outcome.answer
    return {
        "queue": answer.queue_s,
        "tokenize": outcome.tokenize_s,
        "forward": answer.forward_s,
        "uq": answer.uq_s,
    }


def _note(request: Request, outcome: Outcome) -> None:
    """Leave the facts for the log line and the trace."""
    times = stages(outcome)
    _log(
        request,
        model=outcome.card.name,
        revision=outcome.card.revision,
        tokens=_num_tokens(outcome),
        **{f"{name}_ms": round(seconds * 1000, 2) for name, seconds in times.items()},
    )
    record_stages(request.scope, times)


def _log(request: Request, **facts: object) -> None:
    request.scope.setdefault("dalorra.log", {}).update(facts)


def _num_tokens(outcome: Outcome) -> int:
    return sum(row.num_tokens for row in outcome.rows)


def answer(request: Request, outcome: Outcome, write: Callable[[], str]) -> Response:
    """Return an answer, with the headers that all shapes have.

    Args:
        request: The request, for its telemetry.
        outcome: What was found out.
        write: Returns the body as JSON; its time is counted as that of the stage ``serialize``.
    """
    began_s = time.monotonic()
    text = write()
    service_of(request).telemetry.stage("serialize", time.monotonic() - began_s)
    timings = (f"{name};dur={seconds * 1000:.2f}" for name, seconds in stages(outcome).items())
    headers = {
        "X-Model-Revision": outcome.card.revision,
        "X-Compute-Tokens": str(_num_tokens(outcome) * outcome.key.sampling.passes),
        "Server-Timing": ", ".join(timings),
    }
    return Response(text, media_type="application/json", headers=headers)


def in_words_of(error: ApiError, pointers: Mapping[str, str]) -> ApiError:
    """Return an error as a route says it that speaks another shape than ``/v1/classify``.

    Args:
        error: An error in the words of ``ClassifyRequest``.
        pointers: From a pointer there to the one here, such as ``#/input`` to ``#/inputs``. What
            lies below a pointer goes with it.
    """

    def here(text: str) -> str:
        for there, own in pointers.items():
            if text == there or text.startswith((f"{there}/", f"{there}:")):
                return own + text.removeprefix(there)
        return text

    detail, faults = here(error.detail), error.errors
    if faults and faults[0].get("code") == "wrong_input_form":
        detail = f"{error.detail.partition(':')[0]}, which only /v1/classify can carry"
    faults = tuple(
        {**fault, "pointer": here(str(fault["pointer"]))} if "pointer" in fault else fault
        for fault in faults
    )
    return ApiError(error.code, detail, errors=faults, headers=error.headers, status=error.status)
