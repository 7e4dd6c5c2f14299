"""The envelope of every HTTP exchange: id, headers, metrics, a log line, errors of last resort.

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

from server.errors import ApiError, problem_response
from server.logs import request_id_scope
from server.telemetry import Telemetry

__all__ = ["Envelope", "arrival_s", "request_id_of", "route_template"]

logger = logging.getLogger(__name__)

_VALID_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
_ROUTES = frozenset(
    {
        "/v1/classify",
        "/classify",
        "/v1/feedback",
        "/v1/policies/evaluate",
        "/v1/models",
        "/version",
        "/openapi.json",
        "/docs",
    }
)
_QUIET = frozenset(
    {
        "/health",
        "/health/live",
        "/health/ready",
        "/health/startup",
        "/livez",
        "/readyz",
        "/metrics",
    }
)


def route_template(path: str) -> str | None:
    """Return the route of a path as telemetry names it; None for probes and ``/metrics``."""
    if path in _QUIET:
        return None
    if path in _ROUTES:
        return path
    if not path.startswith("/v1/models/"):
        return "unmatched"
    curve = "/risk-coverage" if path.endswith("/risk-coverage") else ""
    return "/v1/models/{model_id}" + curve


def request_id_of(request: Request) -> str:
    """Return the id of an exchange, as sent back in ``X-Request-Id``."""
    return str(request.scope["dalorra.request_id"])


def arrival_s(request: Request) -> float:
    """Return when an exchange began, in seconds on the monotonic clock."""
    return float(request.scope["dalorra.arrival_s"])


class Envelope:
    """ASGI middleware around the whole app."""

    def __init__(self, app: ASGIApp, telemetry: Telemetry, error_base: str) -> None:
        self._app = app
        self._telemetry = telemetry
        self._error_base = error_base

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one HTTP exchange; everything else (lifespan) passes through."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        scope["dalorra.request_id"] = _request_id(scope)
        scope["dalorra.arrival_s"] = time.monotonic()
        with request_id_scope(scope["dalorra.request_id"]):
            await self._exchange(scope, receive, send)

    async def _exchange(self, scope: Scope, receive: Receive, send: Send) -> None:
        route = route_template(scope["path"])
        status: int | None = None

        async def send_marked(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                _add_headers(message, scope["dalorra.request_id"])
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
            instance=scope["path"],
            request_id=request_id,
            type_base=self._error_base,
        )

    def _note(self, scope: Scope, route: str, status: int) -> None:
        duration_s = time.monotonic() - scope["dalorra.arrival_s"]
        method = scope["method"] if scope["method"] in _METHODS else "OTHER"
        self._telemetry.request_ended(method, route, status, duration_s)
        logger.info(
            "request",
            extra={
                "method": method,
                "route": route,
                "status": status,
                "duration_ms": round(duration_s * 1000, 2),
            },
        )


def _request_id(scope: Scope) -> str:
    """Return the client's id when it is a valid one, else a new one."""
    for name, value in scope["headers"]:
        if name == b"x-request-id" and _VALID_ID.fullmatch(text := value.decode("latin-1")):
            return text
    return uuid.uuid4().hex


def _add_headers(message: MutableMapping[str, Any], request_id: str) -> None:
    headers = list(message.get("headers", ()))
    headers.append((b"x-request-id", request_id.encode("ascii")))
    if not any(name.lower() == b"cache-control" for name, _ in headers):
        headers.append((b"cache-control", b"no-store"))
    message["headers"] = headers
