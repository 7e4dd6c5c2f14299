"""What can go wrong between a question and its answer.

::

    DalorraError
    ├── ApiError            the server refused; code, detail, status, request_id, errors
    │   ├── InvalidRequest  400, 413, 422 and other 4xx: mend the request, do not repeat it
    │   ├── Unauthorized    401: no key, or one that is not known
    │   ├── Forbidden       403: the key may not do this
    │   ├── NotFound        404: no such adapter, prediction or route
    │   ├── Conflict        409: such as another label that is stored already
    │   ├── Overloaded      429, 503: retry_after_s says when to come back
    │   └── ServerFailed    500 and the like; request_id is what to report
    ├── ConnectionFailed    nobody answered: nobody listens, or the connection broke off; a 500 or
    │                       502 that no Dalorra server wrote says that of one behind a proxy
    ├── DeadlineExceeded    no answer within timeout_s
    └── UnreadableAnswer    an answer came, and is not one of a Dalorra server

No message holds a text that was sent, or the key.
"""

import json
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any

__all__ = [
    "ApiError",
    "Conflict",
    "ConnectionFailed",
    "DalorraError",
    "DeadlineExceeded",
    "Forbidden",
    "InvalidRequest",
    "NotFound",
    "Overloaded",
    "ServerFailed",
    "Unauthorized",
    "UnreadableAnswer",
    "api_error",
]


class DalorraError(Exception):
    """Whatever keeps an answer from you."""


class ApiError(DalorraError):
    """The server refused.

    Attributes:
        code: The machine-readable name of the error, stable between versions.
        detail: One sentence for a person.
        status: HTTP status.
        request_id: By which the server's logs know the request; None when no server of ours spoke.
        errors: One mapping per fault, with ``pointer`` and what else is known.
        retry_after_s: When to come back, in seconds; None when the server does not say.
    """

    def __init__(
        self,
        code: str,
        detail: str,
        *,
        status: int,
        request_id: str | None = None,
        errors: Sequence[Mapping[str, Any]] = (),
        retry_after_s: float | None = None,
    ) -> None:
        place = f" (request id {request_id})" if request_id else ""
        super().__init__(f"{code}: {detail}{place}")
        self.code = code
        self.detail = detail
        self.status = status
        self.request_id = request_id
        self.errors = tuple(errors)
        self.retry_after_s = retry_after_s


class InvalidRequest(ApiError):
    """The request cannot be answered as it stands."""


class Unauthorized(ApiError):
    """There is no key, or the server does not know it."""


class Forbidden(ApiError):
    """The key may not do this."""


class NotFound(ApiError):
    """No such adapter, prediction or route; ``errors[0]["close_names"]`` may know the right one."""


class Conflict(ApiError):
    """What is stored says something else."""


class Overloaded(ApiError):
    """The server has no room or is not ready now; it was tried again as often as allowed."""


class ServerFailed(ApiError):
    """The server failed on this request."""


class ConnectionFailed(DalorraError):
    """No answer came: nobody listens there, or the connection broke off, here or behind a proxy."""


class DeadlineExceeded(DalorraError):
    """No answer came in time.

    Attributes:
        timeout_s: The time there was, in seconds, all attempts and waits together.
    """

    def __init__(self, timeout_s: float) -> None:
        super().__init__(f"no answer within {timeout_s:g} s")
        self.timeout_s = timeout_s


class UnreadableAnswer(DalorraError):
    """An answer came, and is not one of a Dalorra server that this version knows."""


_KINDS: Mapping[int, type[ApiError]] = {
    HTTPStatus.UNAUTHORIZED: Unauthorized,
    HTTPStatus.FORBIDDEN: Forbidden,
    HTTPStatus.NOT_FOUND: NotFound,
    HTTPStatus.CONFLICT: Conflict,
    HTTPStatus.TOO_MANY_REQUESTS: Overloaded,
    HTTPStatus.SERVICE_UNAVAILABLE: Overloaded,
}
_LOST_BEHIND = (HTTPStatus.INTERNAL_SERVER_ERROR, HTTPStatus.BAD_GATEWAY)
"""What proxies say (Ray's the first) when a server ends under a request."""


def api_error(
    status: int, headers: Mapping[str, str], body: bytes, retry_after_s: float | None
) -> ApiError | ConnectionFailed:
    """Return the error that an answer other than 2xx stands for.

    Args:
        status: HTTP status, from 300.
        headers: By lower-case name.
        body: A problem document of the server's, or whatever stood in its way has to say.
        retry_after_s: As ``Retry-After`` says, in seconds.

    Example:
        >>> api_error(429, {}, b'{"code": "queue_full", "detail": "no room"}', 2.0)
        Overloaded('queue_full: no room')
    """
    server = status >= HTTPStatus.INTERNAL_SERVER_ERROR
    kind = _KINDS.get(status, ServerFailed if server else InvalidRequest)
    problem = _problem(body)
    if status in _LOST_BEHIND and "code" not in problem:
        return ConnectionFailed(f"whoever stands before the server answered {status}")
    request_id = problem.get("request_id") or headers.get("x-request-id")
    errors = problem.get("errors")
    return kind(
        str(problem.get("code", "http_error")),
        str(problem.get("detail", f"status {status}, without a reason that can be read")),
        status=status,
        request_id=str(request_id) if request_id else None,
        errors=[fault for fault in errors if isinstance(fault, dict)]
        if isinstance(errors, list)
        else (),
        retry_after_s=retry_after_s,
    )


def _problem(body: bytes) -> dict[str, Any]:
    try:
        document = json.loads(body)
    except (ValueError, RecursionError):
        return {}
    return document if isinstance(document, dict) else {}
