"""What the connections of one server share: their limits, and which of them hold no request."""

import json
import uuid
from dataclasses import dataclass
from typing import Literal, Protocol

from uvicorn.protocols.http.httptools_impl import STATUS_LINE

from server.errors import ApiError, problem_body
from server.middleware import SECURITY_HEADERS
from server.settings import Settings
from server.telemetry import Telemetry

__all__ = ["Connection", "ConnectionGate", "ConnectionLimits"]


class Connection(Protocol):
    """What the gate needs of a connection; it is its own identity."""

    def cut(self) -> None:
        """End the connection now, whatever it is doing."""
        ...

    def __hash__(self) -> int: ...


@dataclass(frozen=True, slots=True)
class ConnectionLimits:
    """The bounds of all connections; times in seconds. See ``Settings`` for their meaning."""

    max_connections: int
    max_header_bytes: int
    header_timeout_s: float
    body_timeout_s: float
    write_timeout_s: float

    @classmethod
    def of(cls, settings: Settings) -> "ConnectionLimits":
        """Return the limits in some settings."""
        return cls(
            max_connections=settings.max_connections,
            max_header_bytes=settings.max_header_bytes,
            header_timeout_s=settings.header_timeout_s,
            body_timeout_s=settings.body_timeout_s,
            write_timeout_s=settings.write_timeout_s,
        )


class ConnectionGate:
    """What the connections of one server share: their limits, and which of them hold no request.

    Args:
        limits: The bounds.
        telemetry: Counts connections that are refused or cut.
        error_base: Prefix of the ``type`` of every error.
    """

    def __init__(self, limits: ConnectionLimits, telemetry: Telemetry, error_base: str) -> None:
        self.limits = limits
        self._telemetry = telemetry
        self._error_base = error_base
        # dicts for their order: the first one has waited longest
        self._strangers: dict[Connection, None] = {}
        self._idle: dict[Connection, None] = {}

    def make_room(self, open_connections: int) -> bool:
        """Return whether one more may come in; cuts a waiting one if it must."""
        if open_connections < self.limits.max_connections:
            return True
        self._telemetry.rejected("connections")
        for waiting in (self._strangers, self._idle):
            if waiting:
                next(iter(waiting)).cut()
                return True
        return False

    def waits(self, connection: Connection, *, stranger: bool) -> None:
        """Note that a connection holds no request from now on."""
        self.works(connection)
        (self._strangers if stranger else self._idle)[connection] = None

    def works(self, connection: Connection) -> None:
        """Note that a connection holds a request, or is gone."""
        self._strangers.pop(connection, None)
        self._idle.pop(connection, None)

    def count(self, reason: Literal["slow_client", "too_large"]) -> None:
        """Count a client that was cut or refused."""
        self._telemetry.rejected(reason)

    def problem(self, error: ApiError) -> bytes:
        """Return a whole HTTP answer, for what never becomes a request."""
        request_id = uuid.uuid4().hex
        body = problem_body(error, instance="/", request_id=request_id, type_base=self._error_base)
        content = json.dumps(body).encode("ascii")
        headers = (
            (b"content-type", b"application/problem+json"),
            (b"content-length", str(len(content)).encode("ascii")),
            (b"x-request-id", request_id.encode("ascii")),
            *SECURITY_HEADERS,
            (b"connection", b"close"),
        )
        lines = b"".join(name + b": " + value + b"\r\n" for name, value in headers)
        return STATUS_LINE[error.status] + lines + b"\r\n" + content
