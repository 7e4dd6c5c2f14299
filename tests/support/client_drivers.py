"""Both clients of ``dalorra.client`` behind one face, so that each test drives the two of them."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx

from dalorra.client import AsyncClient, Client

__all__ = ["DRIVERS", "BridgedTransport", "Calls", "Driver", "asynchronous", "blocking"]

WAIT_S = 30.0

Calls = Any  # the calls of AsyncClient, whichever client carries them out
Driver = Callable[..., contextlib.AbstractAsyncContextManager[Calls]]


class BridgedTransport(httpx.BaseTransport):
    """Lets a blocking client, in a thread of its own, use a transport of the running event loop."""

    def __init__(self, transport: httpx.AsyncBaseTransport) -> None:
        self._transport = transport
        self._loop = asyncio.get_running_loop()

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        return asyncio.run_coroutine_threadsafe(self._exchange(request), self._loop).result(WAIT_S)

    async def _exchange(self, request: httpx.Request) -> httpx.Response:
        sent = httpx.Request(
            request.method, request.url, headers=request.headers, content=request.read()
        )
        response = await self._transport.handle_async_request(sent)
        content = await response.aread()
        return httpx.Response(response.status_code, headers=response.headers, content=content)


class _InThread:
    """A blocking client whose calls are awaited."""

    def __init__(self, client: Client) -> None:
        self._client = client

    def __getattr__(self, name: str) -> Callable[..., Any]:
        call = getattr(self._client, name)
        return lambda *args, **kwargs: asyncio.to_thread(call, *args, **kwargs)


@contextlib.asynccontextmanager
async def blocking(
    transport: httpx.AsyncBaseTransport | None = None, **arguments: Any
) -> AsyncIterator[Calls]:
    """Open the blocking client; ``transport`` is one of the event loop's."""
    bridged = None if transport is None else BridgedTransport(transport)
    with Client(transport=bridged, **arguments) as client:
        yield _InThread(client)


@contextlib.asynccontextmanager
async def asynchronous(
    transport: httpx.AsyncBaseTransport | None = None, **arguments: Any
) -> AsyncIterator[Calls]:
    """Open the asyncio client."""
    async with AsyncClient(transport=transport, **arguments) as client:
        yield client


DRIVERS: list[Driver] = [blocking, asynchronous]
