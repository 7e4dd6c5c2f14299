"""The envelope of every HTTP exchange: id, headers, trace, metrics, a log line, last-resort errors.

Pure ASGI, outermost, so that nothing leaves the server without them.
"""

import logging
import re
import time
import uuid
from collections.abc import MutableMapping
from typing import Any

from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.auth import route_template
from server.errors import ApiError, problem_response
from server.logs import request_id_scope
from server.telemetry import Telemetry
from server.tracing import Tracing

__all__ = [
    "SECURITY_HEADERS",
    "Envelope",
    "arrival_s",
    "instance_of",
    "request_id_of",
]

logger = logging.getLogger(__name__)

_VALID_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})

SECURITY_HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"content-security-policy", b"default-src 'none'; frame-ancestors 'none'"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"cache-control", b"no-store"),
)
"""On every answer that does not set its own: they tell a browser to do nothing with it."""

_TLS_ONLY = (b"strict-transport-security", b"max-age=31536000")


def instance_of(scope: Scope) -> str:
    """Return the path of an exchange for an error; ``/`` for one that no route has.

    What stands in an unknown path may be anything, a key in the wrong place too.
    """
    return str(scope["path"]) if route_template(scope["path"]) != "unmatched" else "/"


def request_id_of(request: Request) -> str:
    """Return the id of an exchange, as sent back in ``X-Request-Id``."""
    return str(request.scope["dalorra.request_id"])


def arrival_s(request: Request) -> float:
    """Return when an exchange began, in seconds on the monotonic clock."""
    return float(request.scope["dalorra.arrival_s"])


class Envelope:
    """ASGI middleware around the whole app.

    Gives what is inside ``scope["dalorra.request_id"]``, ``scope["dalorra.arrival_s"]`` and
    ``scope["dalorra.log"]``, a dict whose entries go on the exchange's log line.

    Args:
        app: The app.
        telemetry: Counts and times every exchange but probes and scrapes.
        error_base: Prefix of the ``type`` of every error.
        tracing: Knows the caller's trace, and opens a span where there is a collector.
    """

    def __init__(
        self,
        app: ASGIApp,
        telemetry: Telemetry,
        error_base: str,
        tracing: Tracing,
    ) -> None:
        self._app = app
        self._telemetry = telemetry
        self._error_base = error_base
        self._tracing = tracing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one HTTP exchange; everything else (lifespan) passes through."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        scope["dalorra.request_id"] = _request_id(scope)
        scope["dalorra.arrival_s"] = time.monotonic()
        scope["dalorra.log"] = {}
        with request_id_scope(scope["dalorra.request_id"]), self._tracing.exchange(scope):
            await self._exchange(scope, receive, send)

    async def _exchange(self, scope: Scope, receive: Receive, send: Send) -> None:
        route = scope["dalorra.route"] = route_template(scope["path"])
        status: int | None = None

        async def send_marked(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = scope["dalorra.status"] = message["status"]
                _add_headers(message, scope)
            await send(message)

        if route is not None:
            self._telemetry.request_began(route)
        try:
            await self._app(scope, receive, send_marked)
        except Exception as error:
            # a bug of ours; the client gets an id to report, the log gets the place
            logger.error("unexpected error", exc_info=error)  # noqa: TRY400 - text may be private
            if status is not None:
                raise
            await self._internal_error(scope)(scope, receive, send_marked)
        finally:
            if route is not None:
                self._note(scope, route, status or 499)

    def _internal_error(self, scope: Scope) -> ASGIApp:
        request_id = scope["dalorra.request_id"]
        return problem_response(
            ApiError("internal_error", f"an unexpected error; report request id {request_id}"),
            instance=instance_of(scope),
            request_id=request_id,
            type_base=self._error_base,
        )

    def _note(self, scope: Scope, route: str, status: int) -> None:
        duration_s = time.monotonic() - scope["dalorra.arrival_s"]
        method = scope["method"] if scope["method"] in _METHODS else "OTHER"
        exemplar = scope.get("dalorra.exemplar")
        self._telemetry.request_ended(method, route, status, duration_s, exemplar)
        line = {
            "method": method,
            "route": route,
            "status": status,
            "duration_ms": round(duration_s * 1000, 2),
        }
        logger.info("request", extra=line | scope["dalorra.log"])


def _request_id(scope: Scope) -> str:
    """Return the client's id when it is a valid one, else a new one."""
    for name, value in scope["headers"]:
        if name == b"x-request-id" and _VALID_ID.fullmatch(text := value.decode("latin-1")):
            return text
    return uuid.uuid4().hex


def _add_headers(message: MutableMapping[str, Any], scope: Scope) -> None:
    headers = list(message.get("headers", ()))
    own = {name.lower() for name, _ in headers}
    headers.append((b"x-request-id", scope["dalorra.request_id"].encode("ascii")))
    headers += [header for header in SECURITY_HEADERS if header[0] not in own]
    if scope.get("scheme") == "https":
        headers.append(_TLS_ONLY)
    message["headers"] = headers
