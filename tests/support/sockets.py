"""The whole server on a real socket, in this process."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

from server.app import create_app
from server.run import DrainingServer, make_server
from server.settings import Settings
from tests.support.api import until
from tests.support.fake_engine import FakeEngine

__all__ = ["port_of", "raw_exchange", "serving_on_a_socket"]

WAIT_S = 20.0


def port_of(server: DrainingServer) -> int:
    """Return the port a server listens on."""
    return server.servers[0].sockets[0].getsockname()[1]


@contextlib.asynccontextmanager
async def serving_on_a_socket(**settings: Any) -> AsyncIterator[DrainingServer]:
    """Serve the fake engine as the command line does, on a free port of this machine."""
    chosen = Settings(port=0, feedback_url="off", **settings)  # type: ignore[arg-type]
    server = make_server(create_app(FakeEngine, chosen), chosen)
    running = asyncio.create_task(server.serve())
    try:
        await until(lambda: server.started or running.done())
        await until(lambda: server._lifecycle.phase == "serving")
        yield server
    finally:
        server.should_exit = True
        await asyncio.wait_for(running, WAIT_S)


async def raw_exchange(port: int, data: bytes) -> tuple[int, bytes]:
    """Send bytes on a connection of their own; return the status and the rest of the answer."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(data)
        head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), WAIT_S)
        return int(head.split()[1]), head
    finally:
        writer.transport.abort()
