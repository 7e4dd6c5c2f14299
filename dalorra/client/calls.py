"""The calls themselves, as steps: everything that both clients do, once."""

import itertools
import json
import logging
import math
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from dalorra.client.answers import Answer, Feedback, Model, ModelList
from dalorra.client.errors import (
    ConnectionFailed,
    DalorraError,
    DeadlineExceeded,
    Overloaded,
    UnreadableAnswer,
    api_error,
)
from dalorra.client.hooks import Hooks, settle
from dalorra.client.questions import Options, Rows, as_items, classify_body
from dalorra.client.retries import Retries, read_retry_after
from dalorra.client.steps import Lost, Received, Send, Sleep, Steps

__all__ = ["MAX_DEADLINE_S", "Setup", "classify", "give_feedback", "list_models", "probe"]

logger = logging.getLogger(__name__)

M = TypeVar("M", bound=BaseModel)

MAX_DEADLINE_S = 120.0
"""Longest deadline that is told to a server, in seconds: servers refuse longer ones by default."""

_OK, _REFUSED, _GATEWAY_TIMEOUT = 200, 300, 504
_HEADER_VALUE = re.compile(r"[A-Za-z0-9._-]{1,128}")
_JSON = {"Content-Type": "application/json"}


@dataclass(frozen=True)
class Setup:
    """What all calls of one client share.

    Attributes:
        timeout_s: Time for a call that names none, in seconds, all attempts together.
        retries: When to try again.
        clock: Seconds on a clock that never goes back.
        wall_clock: Seconds since 1970, for a ``Retry-After`` that is a date.
    """

    timeout_s: float = 30.0
    retries: Retries = field(default_factory=Retries)
    clock: Callable[[], float] = time.monotonic
    wall_clock: Callable[[], float] = time.time

    def __post_init__(self) -> None:
        _check_timeout(self.timeout_s)


def _check_timeout(timeout_s: float) -> float:
    if not 0 < timeout_s < math.inf:
        raise ValueError(f"timeout_s must be above 0 and finite, got {timeout_s}")
    return timeout_s


def classify(setup: Setup, rows: Rows, hooks: Hooks, options: Options) -> Steps[Answer]:
    """Ask, and let the hooks settle what the model does not; hooks have all the time they want."""
    items = as_items(rows)
    headers = dict(_JSON)
    for option, header in (("priority", "X-Priority"), ("request_id", "X-Request-Id")):
        if option in options:
            headers[header] = _checked(option, str(options[option]))
    request = _Request("POST", "/v1/classify", headers, classify_body(items, options), timed=True)
    timeout_s = _check_timeout(options.get("timeout_s", setup.timeout_s))
    reply = yield from _exchange(setup, request, timeout_s)
    answer = _read(reply, Answer)
    if len(answer.rows) != len(items):
        raise UnreadableAnswer(f"{len(items)} questions were asked, {len(answer.rows)} answered")
    settled = []
    for row, item in zip(answer.rows, items, strict=True):
        settled.append((yield from settle(row.model_copy(update={"input": item}), hooks)))
    request_id = reply.headers.get("x-request-id")
    return answer.model_copy(update={"rows": tuple(settled), "request_id": request_id})


def _checked(option: str, value: str) -> str:
    """Return an option that goes into a header of its own, and must not be able to leave it."""
    if _HEADER_VALUE.fullmatch(value) is None:
        raise ValueError(f"{option} must be 1 to 128 of A-Za-z0-9._-")
    return value


def give_feedback(
    setup: Setup, prediction_id: str, label: str | None, source: str | None
) -> Steps[Feedback]:
    """Store the true label of an answer."""
    body = {"prediction_id": prediction_id, "label": label}
    if source is not None:
        body["source"] = source
    request = _Request("POST", "/v1/feedback", _JSON, json.dumps(body).encode())
    return _read((yield from _exchange(setup, request, setup.timeout_s)), Feedback)


def list_models(setup: Setup) -> Steps[tuple[Model, ...]]:
    """Return the adapters that can be asked."""
    reply = yield from _exchange(setup, _Request("GET", "/v1/models"), setup.timeout_s)
    return _read(reply, ModelList).data


def probe(setup: Setup) -> Steps[bool]:
    """Return whether the server welcomes traffic now; one attempt."""
    reply = yield Send("GET", "/health/ready", {}, None, setup.timeout_s)
    error = _refusal(setup, reply, setup.timeout_s)
    if isinstance(error, Overloaded | ConnectionFailed | DeadlineExceeded):
        return False
    if error is not None:
        raise error
    return True


@dataclass(frozen=True, slots=True)
class _Request:
    """A request, whatever its attempt; ``timed`` tells the server how long there is."""

    method: str
    path: str
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes | None = field(default=None, repr=False)
    timed: bool = False

    def attempt(self, left_s: float) -> Send:
        headers = dict(self.headers)
        if self.timed:
            told_ms = max(int(min(left_s, MAX_DEADLINE_S) * 1000), 1)
            headers["X-Request-Timeout-Ms"] = str(told_ms)
        return Send(self.method, self.path, headers, self.body, left_s)


def _exchange(setup: Setup, request: _Request, timeout_s: float) -> Steps[Received]:
    """Send until there is an answer, or no sense in sending again."""
    end_s = setup.clock() + timeout_s
    for attempt in itertools.count(1):
        left_s = end_s - setup.clock()
        if left_s <= 0:
            raise DeadlineExceeded(timeout_s)
        reply: Received | Lost = yield request.attempt(left_s)
        error = _refusal(setup, reply, timeout_s)
        if error is None and isinstance(reply, Received):
            return reply
        if not isinstance(error, Overloaded | ConnectionFailed):
            raise error or AssertionError("a lost request is a refusal")
        asked_s = error.retry_after_s if isinstance(error, Overloaded) else None
        wait_s = setup.retries.wait_s(attempt, asked_s)
        # a wait past the deadline would only tell later what is known now
        if attempt == setup.retries.max_attempts or setup.clock() + wait_s >= end_s:
            raise error
        logger.info("%s %s: %s; again in %.2f s", request.method, request.path, error, wait_s)
        yield Sleep(wait_s)
    raise AssertionError("attempts are counted without end")


def _refusal(setup: Setup, reply: Received | Lost, timeout_s: float) -> DalorraError | None:
    """Return why a reply is no answer; None when it is one."""
    if isinstance(reply, Lost) and reply.too_large:
        return UnreadableAnswer(reply.reason)
    if isinstance(reply, Lost):
        return DeadlineExceeded(timeout_s) if reply.timed_out else ConnectionFailed(reply.reason)
    if _OK <= reply.status < _REFUSED:
        return None
    if reply.status == _GATEWAY_TIMEOUT:
        return DeadlineExceeded(timeout_s)
    retry_after_s = read_retry_after(reply.headers, setup.wall_clock())
    return api_error(reply.status, reply.headers, reply.body, retry_after_s)


def _read(reply: Received, schema: type[M]) -> M:
    try:
        return schema.model_validate_json(reply.body)
    except ValidationError as error:
        places = {".".join(map(str, fault["loc"])) or "the body" for fault in error.errors()}
        detail = f"status {reply.status}, but not as expected: {', '.join(sorted(places)[:5])}"
    # outside of the clause: the validation error would show the answer
    raise UnreadableAnswer(detail)
