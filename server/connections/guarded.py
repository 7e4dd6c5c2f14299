"""uvicorn's HTTP protocol with an end to every wait."""

import asyncio
from collections.abc import Callable
from typing import Any, Literal

from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState

from server.connections.gate import ConnectionGate
from server.errors import ApiError

__all__ = ["GuardedConnection", "guarded_by"]

LINGER_S = 2.0  # for a refused client to read its answer before the connection is reset
# Requests that wait behind the one that is answered. They cost no more than a line to send, and
# each is kept with all its parts, so one read from the socket could hold fifteen thousand of them.
MAX_PIPELINED = 16
_Wait = Literal["head", "idle", "rest"]


def guarded_by(gate: ConnectionGate) -> Callable[..., "GuardedConnection"]:
    """Return what uvicorn calls with keywords of its own for the protocol of a new connection."""

    def make(
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> "GuardedConnection":
        return GuardedConnection(gate, config, server_state, app_state, _loop)

    return make


class GuardedConnection(HttpToolsProtocol):
    """uvicorn's protocol with an end to every wait."""

    def __init__(
        self,
        gate: ConnectionGate,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self._gate = gate
        self._limits = gate.limits
        self._refused = False  # whatever else comes is not looked at
        self._in_head = True  # between two messages, or within a head
        self._begun = False  # the first byte of a message has come
        self._had_request = False
        self._is_last = False  # no other request will be read
        self._head_bytes = 0  # of names and values
        self._raw_bytes = 0  # received without a head or a piece of a body becoming complete
        self._waiting: _Wait | None = None
        self._read_timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None

    # -- the connection -----------------------------------------------------------------------

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Take a new connection, or close it at once."""
        if not self._gate.make_room(len(self.connections)):
            self._refused = True
            self.transport = transport
            transport.abort()
            return
        super().connection_made(transport)
        self._gate.waits(self, stranger=True)
        self._wait("head", self._limits.header_timeout_s)

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the connection."""
        self._gate.works(self)
        self._stop_waiting()
        self._stop_write_timer()
        super().connection_lost(exc)

    def cut(self) -> None:
        """End the connection now, whatever it is doing."""
        self._refused = True
        self._gate.works(self)
        self.connections.discard(self)
        self.transport.abort()

    # -- reading ------------------------------------------------------------------------------

    def data_received(self, data: bytes) -> None:
        """Take what has come in."""
        if self._refused:
            return
        if self._in_head and self._is_free and self._waiting != "head":
            self._wait("head", self._limits.header_timeout_s)
        self._raw_bytes += len(data)
        super().data_received(data)
        if self._raw_bytes > self._limits.max_header_bytes and not self._refused:
            self._refuse_head()

    def on_message_begin(self) -> None:
        """Begin a head."""
        if self._refused:
            return
        self._begun = True
        self._head_bytes = 0
        super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        """Take a piece of the request line."""
        if not self._refused:
            self._head_bytes += len(url)
            super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """Take a header; those after a body change nothing any more."""
        if self._in_head and not self._refused:
            self._head_bytes += len(name) + len(value)
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """Hand a request to the app, unless its head is too large."""
        if self._refused:
            return
        if self._head_bytes > self._limits.max_header_bytes:
            self._refuse_head()
            return
        parser: Any = self.parser
        upgrade = bool(parser.should_upgrade())
        if upgrade and _announces_body(self.headers):
            # the parser takes no body then, so it would read it as the next request
            detail = "a request that asks for an upgrade must have no body"
            self._refuse(ApiError("http_error", detail, status=400))
            return
        super().on_headers_complete()  # raises when the target is no URL
        if len(self.pipeline) > MAX_PIPELINED:
            self._gate.count("too_large")
            self.cut()
            return
        self._is_last = upgrade
        if upgrade:
            self.cycle.keep_alive = False
        self._in_head = False
        self._had_request = True
        self._raw_bytes = 0
        self._stop_waiting()
        self._gate.works(self)

    def on_body(self, body: bytes) -> None:
        """Take a piece of a body."""
        self._raw_bytes = 0
        if not self._refused:
            super().on_body(body)

    def on_message_complete(self) -> None:
        """End a request; when it was answered long ago, the next one is waited for."""
        if self._refused:
            return
        super().on_message_complete()
        self._in_head = True
        self._begun = False
        self._raw_bytes = 0
        if self._is_last:  # what follows is in the protocol that it asked for, and is not served
            self._refused = True
            return
        if self._is_free:
            self._wait_for_next()

    def on_response_complete(self) -> None:
        """End an answer; wait for the next request, or for the rest of this one."""
        super().on_response_complete()
        self._watch_writing()
        if self.transport.is_closing() or not self._is_free:
            return
        if self._in_head:
            self._wait_for_next()
        else:
            self._wait("rest", self._limits.body_timeout_s)

    def _unsupported_upgrade_warning(self) -> None:
        """Say nothing: anybody could fill the log with it."""

    def send_400_response(self, msg: str) -> None:  # noqa: ARG002 - uvicorn's own words
        """Answer what is not HTTP."""
        self._refuse(ApiError("http_error", "this is not a valid HTTP request", status=400))

    @property
    def _is_free(self) -> bool:
        """Whether no request is being answered."""
        return self.cycle is None or self.cycle.response_complete

    def _wait_for_next(self) -> None:
        self._gate.waits(self, stranger=not self._had_request)
        if self._begun:  # it came together with the one before
            self._wait("head", self._limits.header_timeout_s)
        else:
            self._wait("idle", self.timeout_keep_alive)

    def _refuse_head(self) -> None:
        self._gate.count("too_large")
        limit = self._limits.max_header_bytes
        detail = f"request line and headers are larger than max_header_bytes ({limit})"
        self._refuse(ApiError("headers_too_large", detail, errors=({"limit": limit},)))

    def _refuse(self, error: ApiError) -> None:
        """Answer with an error and end the connection; without an answer while one is under way."""
        if self._refused:
            return
        self._refused = True
        if not self._is_free or not self._in_head:
            self.cut()
            return
        self.transport.write(self._gate.problem(error))
        if not self.transport.can_write_eof():
            self.transport.close()
            self._watch_writing()
            return
        # closing with unread bytes would reset the connection and could take the answer along
        self.transport.write_eof()
        self._wait("rest", LINGER_S)

    # -- time ---------------------------------------------------------------------------------

    def _wait(self, waiting: _Wait, timeout_s: float) -> None:
        self._stop_waiting()
        self._waiting = waiting
        self._read_timer = self.loop.call_later(timeout_s, self._waited_too_long)

    def _stop_waiting(self) -> None:
        if self._read_timer is not None:
            self._read_timer.cancel()
        self._read_timer = self._waiting = None

    def _waited_too_long(self) -> None:
        if self._waiting != "idle" and not self._refused:
            self._gate.count("slow_client")
        self.cut()

    # -- writing ------------------------------------------------------------------------------

    def pause_writing(self) -> None:
        """Start the client's time to take what was written."""
        super().pause_writing()
        self._watch_writing()

    def resume_writing(self) -> None:
        """Give the client new time for what is left."""
        super().resume_writing()
        self._stop_write_timer()
        self._watch_writing()

    def _watch_writing(self) -> None:
        if self._write_timer is None and self.transport.get_write_buffer_size():
            self._write_timer = self.loop.call_later(
                self._limits.write_timeout_s, self._written_too_slowly
            )

    def _written_too_slowly(self) -> None:
        self._write_timer = None
        if self.transport.get_write_buffer_size():
            self._gate.count("slow_client")
            self.cut()

    def _stop_write_timer(self) -> None:
        if self._write_timer is not None:
            self._write_timer.cancel()
        self._write_timer = None


def _announces_body(headers: list[tuple[bytes, bytes]]) -> bool:
    """Return whether a head says that a body follows."""
    return any(
        name == b"transfer-encoding" or (name == b"content-length" and value.strip(b"0 ") != b"")
        for name, value in headers
    )
