"""A small HTTP/1.1 client for load: cheap, keeps connections, and accounts for every request."""

import asyncio
import contextlib
import json
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["LOST", "Reply", "Wire"]

LOST = 0
"""Status of a request that got no answer."""


@dataclass(frozen=True, slots=True)
class Reply:
    """What came of one request.

    Attributes:
        status: Of the answer; ``LOST`` when none came.
        sent_s: When the request was due, on the monotonic clock.
        took_s: From then to the whole answer.
        headers: Of the answer, names in lower case.
        body: Of the answer.
        error: Why there is no answer.
    """

    status: int
    sent_s: float
    took_s: float
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b""
    error: str = ""

    def json(self) -> Any:
        """Return the body as a document."""
        return json.loads(self.body)


class Wire:
    """Connections to one port of this machine.

    Args:
        port: On 127.0.0.1.
        most: Connections at a time; further requests wait for one.
        keep: Whether connections are used again.
    """

    def __init__(self, port: int, *, most: int = 900, keep: bool = True) -> None:
        self._port = port
        self._keep = keep
        self._idle: deque[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = deque()
        self._room = asyncio.Semaphore(most)

    async def ask(
        self,
        method: str,
        path: str,
        body: Any = None,
        headers: Mapping[str, str] | None = None,
        *,
        due_s: float | None = None,
        timeout_s: float = 180.0,
    ) -> Reply:
        """Send one request and return what came of it; never raises for a failed one.

        Args:
            method: Of HTTP.
            path: With its query.
            body: Sent as JSON; None sends none.
            headers: Further ones.
            due_s: When it should have been sent, on the monotonic clock; now if left out.
            timeout_s: When to give up.
        """
        sent_s = time.monotonic() if due_s is None else due_s
        content = b"" if body is None else json.dumps(body).encode()
        lines = [
            f"{method} {path} HTTP/1.1",
            "Host: 127.0.0.1",
            f"Content-Length: {len(content)}",
            "Content-Type: application/json",
            *(f"{name}: {value}" for name, value in (headers or {}).items()),
        ]
        message = "\r\n".join([*lines, "", ""]).encode("latin-1") + content
        async with self._room:
            try:
                async with asyncio.timeout(timeout_s):
                    status, found, answer = await self._exchange(message)
            except (OSError, EOFError, ValueError, TimeoutError) as error:
                took_s = time.monotonic() - sent_s
                return Reply(LOST, sent_s, took_s, error=f"{type(error).__name__}: {error}")
        return Reply(status, sent_s, time.monotonic() - sent_s, found, answer)

    async def _exchange(self, message: bytes) -> tuple[int, dict[str, str], bytes]:
        connection = self._idle.pop() if self._idle else None
        if connection is not None and connection[0].at_eof():
            await _closed(connection[1])  # the server closed it while it was idle
            connection = None
        if connection is None:
            connection = await asyncio.open_connection("127.0.0.1", self._port)
        reader, writer = connection
        kept = False
        try:
            writer.write(message)
            await writer.drain()
            status, headers = _parsed(await reader.readuntil(b"\r\n\r\n"))
            body = await reader.readexactly(int(headers.get("content-length", "0")))
            kept = self._keep and headers.get("connection", "") != "close"
        finally:
            if kept:
                self._idle.append(connection)
            else:
                await _closed(writer)
        return status, headers, body

    async def close(self) -> None:
        """Close the idle connections."""
        while self._idle:
            await _closed(self._idle.pop()[1])


async def _closed(writer: asyncio.StreamWriter) -> None:
    writer.close()
    with contextlib.suppress(OSError):
        await writer.wait_closed()


def _parsed(head: bytes) -> tuple[int, dict[str, str]]:
    first, *lines = head.decode("latin-1").rstrip("\r\n").split("\r\n")
    pairs = (line.partition(":") for line in lines)
    return int(first.split(" ")[1]), {name.lower(): value.strip() for name, _, value in pairs}
