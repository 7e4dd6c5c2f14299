"""The one place where callers are let in: before the body is read, before the router is asked.

Answering a caller without a key costs one hash: no body, no thread, nothing per address that could
be filled. Addresses are not throttled for wrong keys: nobody guesses 256 random bits, and behind a
proxy all clients share one address.
"""

from collections.abc import MutableMapping
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.auth.exposure import names_loopback
from server.auth.keys import ApiKey
from server.auth.rate import Allowance
from server.auth.ring import KeyRing
from server.auth.table import is_public, needed_scopes, route_template
from server.errors import ApiError, problem_response
from server.logs import note_exchange
from server.telemetry import Telemetry

__all__ = ["Doors"]

_CHALLENGE = 'Bearer realm="dalorra"'
_MAX_KEY_CHARS = 512


class Doors:
    """ASGI middleware inside the envelope and around the router.

    Without keys everybody may do everything; the command line then listens on loopback only.

    Args:
        app: What is behind the doors.
        keys: The keys in force; None when there are none.
        local_only: Without keys, refuse whoever calls this machine by another name than loopback's.
        telemetry: Counts who is refused.
        error_base: Prefix of the ``type`` of every error.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        keys: KeyRing | None,
        local_only: bool,
        telemetry: Telemetry,
        error_base: str,
    ) -> None:
        self._app = app
        self._keys = keys
        self._local_only = local_only
        self._telemetry = telemetry
        self._error_base = error_base

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let an exchange in, or answer it."""
        if scope["type"] == "websocket":  # no route has one, so none can be reached by one
            await send({"type": "websocket.close", "code": 1008})
            return
        if scope["type"] != "http" or is_public(scope["path"]):
            await self._app(scope, receive, send)
            return
        try:
            allowance = self._admit(scope)
        except ApiError as error:
            await self._refuse(scope, error)(scope, receive, send)
            return
        if allowance is not None:
            send = _marked(send, allowance)
        await self._app(scope, receive, send)

    def _admit(self, scope: Scope) -> Allowance | None:
        if self._keys is not None:
            return self._admit_by_key(self._keys, scope)
        if self._local_only and not names_loopback(_values(scope, b"host")):
            self._telemetry.rejected("auth")
            raise ApiError(
                "bad_host",
                "without API keys this server answers to localhost, 127.0.0.1 and [::1] only; set "
                "api_keys_file, or allow_unauthenticated",
            )
        return None

    def _admit_by_key(self, keys: KeyRing, scope: Scope) -> Allowance | None:
        key = self._authenticate(keys, scope)
        scope["dalorra.caller"] = key.id
        note_exchange("caller", key.id)
        needed = needed_scopes(scope["path"])
        if not needed:  # unknown, or a route that the table forgot: the router is not asked
            raise ApiError("not_found", "there is no such route")
        if missing := needed.difference(key.scopes):
            self._telemetry.rejected("auth")
            raise _lacks(key, " ".join(sorted(missing)))
        allowance = keys.take(key)
        if allowance is not None and not allowance.allowed:
            self._telemetry.rejected("rate_limit")
            raise _too_often(allowance)
        return allowance

    def _authenticate(self, keys: KeyRing, scope: Scope) -> ApiKey:
        presented = _values(scope, b"authorization")
        try:
            if not presented:
                raise _unauthorized("this route needs an API key: Authorization: Bearer KEY")
            key = keys.find(_bearer(presented))
            if key is None:
                raise _unauthorized("the API key is not known here", wrong=True)
            if keys.has_expired(key):
                raise _unauthorized("the API key has expired", wrong=True)
        except ApiError:
            self._telemetry.rejected("auth")
            raise
        return key

    def _refuse(self, scope: Scope, error: ApiError) -> ASGIApp:
        known = route_template(scope["path"]) != "unmatched"
        return problem_response(
            error,
            instance=scope["path"] if known else "/",
            request_id=str(scope["dalorra.request_id"]),
            type_base=self._error_base,
        )


def _values(scope: Scope, name: bytes) -> list[str]:
    return [value.decode("latin-1") for key, value in scope["headers"] if key == name]


def _bearer(presented: list[str]) -> str:
    """Return the key in the one Authorization header that there must be."""
    scheme, _, key = presented[0].strip().partition(" ")
    key = key.strip()
    if len(presented) > 1 or scheme.lower() != "bearer" or not 1 <= len(key) <= _MAX_KEY_CHARS:
        raise _unauthorized("the Authorization header must be: Bearer KEY")
    return key


def _unauthorized(detail: str, *, wrong: bool = False) -> ApiError:
    challenge = f'{_CHALLENGE}, error="invalid_token"' if wrong else _CHALLENGE
    return ApiError("unauthorized", detail, headers={"WWW-Authenticate": challenge})


def _lacks(key: ApiKey, missing: str) -> ApiError:
    challenge = f'{_CHALLENGE}, error="insufficient_scope", scope="{missing}"'
    return ApiError(
        "forbidden",
        f"this API key lacks the scope {missing}; it has: {', '.join(sorted(key.scopes))}",
        headers={"WWW-Authenticate": challenge},
    )


def _too_often(allowance: Allowance) -> ApiError:
    return ApiError(
        "rate_limited",
        f"this API key may ask {allowance.limit} times in {allowance.window_s} s",
        errors=({"code": "rate_limit", "limit": allowance.limit},),
        headers=allowance.headers,
    )


def _marked(send: Send, allowance: Allowance) -> Send:
    """Return a ``send`` that tells the client how its rate stands."""

    async def send_marked(message: Message) -> None:
        if message["type"] == "http.response.start":
            _add(message, allowance.headers)
        await send(message)

    return send_marked


def _add(message: MutableMapping[str, Any], headers: dict[str, str]) -> None:
    raw = [(name.lower().encode("ascii"), value.encode("ascii")) for name, value in headers.items()]
    message["headers"] = [*message.get("headers", ()), *raw]
