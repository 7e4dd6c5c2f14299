"""Connections under limits, on real sockets and in this process: nobody slow keeps a place."""

import asyncio
import contextlib
import json
import socket
from collections.abc import AsyncIterator
from typing import Any

import uvicorn
from starlette.types import Receive, Scope, Send
from uvicorn.server import ServerState

from server.connections import ConnectionGate, ConnectionLimits, guarded_by
from server.connections.guarded import MAX_PIPELINED
from server.telemetry import Telemetry
from tests.support.api import async_test, until

WAIT_S = 3.0
BIG = 32 * 2**20  # more than the buffers of a loopback connection hold
LIMITS = ConnectionLimits(
    max_connections=16,
    max_header_bytes=2048,
    header_timeout_s=30.0,
    body_timeout_s=30.0,
    write_timeout_s=30.0,
)


class Client:
    """One raw connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def answer(self) -> tuple[int, dict[str, str], bytes]:
        """Return status, headers and body of the next answer."""
        head = await asyncio.wait_for(self.reader.readuntil(b"\r\n\r\n"), WAIT_S)
        status, *lines = head.decode("latin-1").strip().split("\r\n")
        headers = dict(line.split(": ", 1) for line in lines)
        body = await asyncio.wait_for(
            self.reader.readexactly(int(headers["content-length"])), WAIT_S
        )
        return int(status.split()[1]), headers, body

    async def is_cut(self) -> bool:
        """Return True once the server has ended the connection, with nothing more said."""
        try:
            return await asyncio.wait_for(self.reader.read(), WAIT_S) == b""
        except ConnectionError:
            return True


class Listening:
    """A listening server, its app and its counts."""

    def __init__(self) -> None:
        self.port = 0
        self.state = ServerState()
        self.telemetry = Telemetry()
        self.go_on = asyncio.Event()
        self.seen: list[Scope] = []
        self.clients: list[Client] = []

    async def connect(self, receive_buffer: int | None = None) -> Client:
        sock = socket.socket()
        sock.setblocking(False)
        if receive_buffer is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", self.port))
        client = Client(*await asyncio.open_connection(sock=sock))
        self.clients.append(client)
        return client

    async def get(self, path: str = "/") -> int:
        """Return the status that a normal client gets on a connection of its own."""
        client = await self.connect()
        await client.send(request(path, "connection: close"))
        status, _, _ = await client.answer()
        client.writer.close()
        return status

    def rejected(self, reason: str) -> float:
        value = self.telemetry.registry.get_sample_value(
            "dalorra_rejections_total", {"reason": reason}
        )
        assert value is not None
        return value

    async def app(self, scope: Scope, _receive: Receive, send: Send) -> None:
        """Answer without reading a body; ``/wait`` when told to, ``/big`` with many bytes."""
        self.seen.append(scope)
        if scope["path"] == "/wait":
            await self.go_on.wait()
        body = b"x" * BIG if scope["path"] == "/big" else b"fine"
        headers = [(b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})


@contextlib.asynccontextmanager
async def listening(*, keep_alive_s: int = 30, **limits: Any) -> AsyncIterator[Listening]:
    served = Listening()
    values = {name: getattr(LIMITS, name) for name in LIMITS.__slots__} | limits
    gate = ConnectionGate(ConnectionLimits(**values), served.telemetry, "urn:test:")
    config = uvicorn.Config(
        served.app,
        interface="asgi3",
        lifespan="off",
        ws="none",
        log_config=None,
        timeout_keep_alive=keep_alive_s,
    )
    config.load()
    make = guarded_by(gate)
    server = await asyncio.get_running_loop().create_server(
        lambda: make(config=config, server_state=served.state, app_state={}), "127.0.0.1", 0
    )
    served.port = server.sockets[0].getsockname()[1]
    try:
        yield served
    finally:
        served.go_on.set()
        server.close()
        for client in served.clients:
            client.writer.transport.abort()
        await until(lambda: not served.state.connections and not served.state.tasks)


def request(path: str = "/", *headers: str, method: str = "GET") -> bytes:
    return "\r\n".join([f"{method} {path} HTTP/1.1", "host: a", *headers, "", ""]).encode()


# -- the head -------------------------------------------------------------------------------------


@async_test
async def test_a_head_that_never_ends_is_cut() -> None:
    async with listening(header_timeout_s=0.1) as served:
        starts = [b"", b"G", b"GET / HTTP/1.1\r\nhost: a\r\nx: y", b"\r\n\r\n"]
        clients = [await served.connect() for _ in starts]
        for client, start in zip(clients, starts, strict=True):
            await client.send(start)
        assert all([await client.is_cut() for client in clients])
        assert served.rejected("slow_client") == len(starts)
        assert await served.get() == 200


async def _trickle(client: Client, data: bytes) -> None:
    with contextlib.suppress(ConnectionError):
        while True:
            await client.send(data)
            await asyncio.sleep(0.01)


@async_test
async def test_bytes_that_trickle_in_do_not_lengthen_the_time() -> None:
    async with listening(header_timeout_s=0.2) as served:
        for start, more in ((b"GET / HTTP/1.1\r\nx: ", b"y"), (b"\r\n", b"\r\n")):
            client = await served.connect()
            await client.send(start)
            trickle = asyncio.create_task(_trickle(client, more))
            assert await client.is_cut()
            trickle.cancel()
        assert served.rejected("slow_client") == 2


@async_test
async def test_the_second_head_on_a_connection_has_its_time_too() -> None:
    async with listening(header_timeout_s=0.1) as served:
        client = await served.connect()
        await client.send(request())
        assert (await client.answer())[0] == 200
        await client.send(b"GET /aga")
        assert await client.is_cut()
        assert served.rejected("slow_client") == 1


@async_test
async def test_half_a_head_behind_a_whole_request_waits_for_its_answer_first() -> None:
    async with listening(header_timeout_s=0.1) as served:
        client = await served.connect()
        await client.send(request("/wait") + b"GET /aga")
        await until(lambda: bool(served.seen))
        await asyncio.sleep(0.3)  # three times the time of a head
        served.go_on.set()
        assert (await client.answer())[0] == 200
        assert await client.is_cut()


@async_test
async def test_a_head_in_pieces_is_whole_in_the_end() -> None:
    async with listening() as served:
        client = await served.connect()
        for byte in request("/a", "x-long: " + "y" * 500):
            await client.send(bytes([byte]))
        assert (await client.answer())[0] == 200
        assert served.seen[0]["path"] == "/a"
        assert len(dict(served.seen[0]["headers"])[b"x-long"]) == 500


@async_test
async def test_a_head_that_is_too_large_is_431() -> None:
    heads = [
        request("/", "x: " + "y" * 3000),
        request("/" + "y" * 3000),
        request("/", *[f"x-{number}: {'y' * 20}" for number in range(100)]),
        b"GET / HTTP/1.1\r\nx: " + b"y" * 3000,  # without an end
        b"\r\n" * 1500,
    ]
    async with listening() as served:
        for head in heads:
            client = await served.connect()
            await client.send(head)
            status, headers, body = await client.answer()
            assert status == 431
            assert headers["content-type"] == "application/problem+json"
            assert headers["x-content-type-options"] == "nosniff"
            problem = json.loads(body)
            assert problem["code"] == "headers_too_large"
            assert problem["request_id"] == headers["x-request-id"]
            assert "max_header_bytes" in problem["detail"]
            assert b"yyy" not in body
            assert await client.is_cut()
        assert served.rejected("too_large") == len(heads)
        assert served.seen == []
        assert await served.get() == 200


@async_test
async def test_a_huge_head_is_not_kept_while_it_comes() -> None:
    async with listening() as served:
        client = await served.connect()
        with contextlib.suppress(ConnectionError):
            await client.send(b"GET / HTTP/1.1\r\nx: " + b"y" * BIG)
        with contextlib.suppress(ConnectionError):
            assert (await client.answer())[0] == 431
        assert served.rejected("too_large") == 1


@async_test
async def test_endless_trailers_are_cut_and_are_no_headers() -> None:
    async with listening() as served:
        client = await served.connect()
        chunked = request("/wait", "transfer-encoding: chunked", method="POST")
        await client.send(chunked + b"2\r\n{}\r\n0\r\nauthorization: late\r\nx: ")
        await until(lambda: bool(served.seen))
        assert b"authorization" not in dict(served.seen[0]["headers"])
        with contextlib.suppress(ConnectionError):
            await client.send(b"y" * 5000)
            await client.send(b"y" * 5000)
        assert await client.is_cut()
        assert served.rejected("too_large") == 1


@async_test
async def test_what_is_not_http_is_400_and_not_repeated() -> None:
    wrong = [
        b"SECRET\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET /SECRET HTTP/1.1\r\nSECRET\r\n\r\n",
        b"GET / HTTP/1.1\r\ncontent-length: SECRET\r\n\r\n",
        b"POST / HTTP/1.1\r\ncontent-length: 3\r\ntransfer-encoding: chunked\r\n\r\nabc",
        b"CONNECT SECRET HTTP/1.1\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03SECRET",  # a TLS handshake
    ]
    async with listening() as served:
        for data in wrong:
            client = await served.connect()
            await client.send(data)
            status, headers, body = await client.answer()
            assert status == 400, data
            assert json.loads(body)["code"] == "http_error"
            assert "SECRET" not in str((headers, body))
            assert await client.is_cut()
        assert served.seen == []
        assert await served.get() == 200


# -- the body -------------------------------------------------------------------------------------


@async_test
async def test_a_body_that_nobody_reads_must_end() -> None:
    async with listening(body_timeout_s=0.1) as served:
        client = await served.connect()
        await client.send(request("/", "content-length: 100", method="POST"))
        assert (await client.answer())[0] == 200, "the answer did not wait for the body"
        trickle = asyncio.create_task(_trickle(client, b"z"))
        assert await client.is_cut()
        trickle.cancel()
        assert served.rejected("slow_client") == 1


@async_test
async def test_after_a_body_that_nobody_read_the_connection_goes_on() -> None:
    async with listening() as served:
        client = await served.connect()
        await client.send(request("/", "content-length: 100", method="POST"))
        assert (await client.answer())[0] == 200
        await client.send(b"z" * 60)
        await client.send(b"z" * 40)
        await client.send(request("/next"))
        assert (await client.answer())[0] == 200
        assert served.seen[1]["path"] == "/next"


@async_test
async def test_a_connection_is_idle_for_a_while_only() -> None:
    async with listening(keep_alive_s=0) as served:
        for body in (b"", b"z" * 5):
            client = await served.connect()
            await client.send(request("/", f"content-length: {len(body)}", method="POST"))
            assert (await client.answer())[0] == 200
            await client.send(body)
            assert await client.is_cut()
        assert served.rejected("slow_client") == 0


@async_test
async def test_requests_sent_together_are_answered_in_order() -> None:
    async with listening() as served:
        client = await served.connect()
        await client.send(request("/wait") + request("/b") + request("/c"))
        await until(lambda: bool(served.seen))
        served.go_on.set()
        assert [(await client.answer())[0] for _ in range(3)] == [200, 200, 200]
        assert [scope["path"] for scope in served.seen] == ["/wait", "/b", "/c"]


@async_test
async def test_requests_sent_together_are_a_bounded_number() -> None:
    async with listening() as served:
        client = await served.connect()
        await client.send(request("/wait") + request("/b") * MAX_PIPELINED)
        await until(lambda: bool(served.seen))
        served.go_on.set()
        assert [(await client.answer())[0] for _ in range(MAX_PIPELINED + 1)] == [200] * 17
        served.go_on.clear()
        flood = await served.connect()
        await flood.send(request("/wait") + request("/b") * 2000)
        assert await flood.is_cut()
        assert served.rejected("too_large") == 1
        assert len(served.seen) <= MAX_PIPELINED + 2


# -- upgrades -------------------------------------------------------------------------------------

UPGRADE = ("connection: Upgrade, HTTP2-Settings", "upgrade: h2c")


@async_test
async def test_the_body_of_an_upgrade_is_never_read_as_a_request() -> None:
    hidden = request("/hidden")
    for body in (f"content-length: {len(hidden)}", "transfer-encoding: chunked"):
        async with listening() as served:
            client = await served.connect()
            await client.send(request("/", *UPGRADE, body, method="POST"))
            status, headers, _ = await client.answer()
            assert (status, headers["connection"]) == (400, "close")
            with contextlib.suppress(ConnectionError):
                await client.send(hidden)
            assert await client.is_cut()
            assert served.seen == []


@async_test
async def test_an_upgrade_without_a_body_is_answered_as_if_it_were_none() -> None:
    async with listening() as served:
        client = await served.connect()
        await client.send(request("/a", *UPGRADE, "content-length: 0") + request("/b"))
        status, headers, body = await client.answer()
        assert (status, headers["connection"], body) == (200, "close", b"fine")
        assert await client.is_cut()
        assert [scope["path"] for scope in served.seen] == ["/a"]


# -- the answer -----------------------------------------------------------------------------------


@async_test
async def test_a_client_that_does_not_take_its_answer_is_cut() -> None:
    async with listening(write_timeout_s=0.2) as served:
        client = await served.connect(receive_buffer=4096)
        client.writer.transport.pause_reading()  # type: ignore[attr-defined]
        await client.send(request("/big"))
        await until(lambda: served.rejected("slow_client") == 1)
        await until(lambda: not served.state.connections)
        assert await served.get() == 200


@async_test
async def test_a_client_that_takes_its_answer_in_time_gets_all_of_it() -> None:
    async with listening(write_timeout_s=15.0) as served:
        client = await served.connect(receive_buffer=65536)
        await client.send(request("/big"))
        await asyncio.wait_for(client.reader.readuntil(b"\r\n\r\n"), WAIT_S)
        left = BIG
        while left:
            piece = await asyncio.wait_for(client.reader.read(2**20), WAIT_S)
            assert piece, "the answer was cut"
            left -= len(piece)
        assert served.rejected("slow_client") == 0


# -- how many -------------------------------------------------------------------------------------


@async_test
async def test_any_number_of_slow_connections_does_not_stop_a_normal_client() -> None:
    async with listening(max_connections=8) as served:
        for _ in range(3):
            for _ in range(20):
                client = await served.connect()
                await client.send(b"GET / HTTP/1.1\r\nx: ")
            assert await served.get() == 200
            assert len(served.state.connections) <= 8
        assert served.rejected("connections") > 0


@async_test
async def test_strangers_make_room_before_those_who_have_asked_before() -> None:
    async with listening(max_connections=3) as served:
        known = await served.connect()
        await known.send(request())
        await known.answer()
        strangers = [await served.connect() for _ in range(3)]
        assert await strangers[0].is_cut()
        await known.send(request())
        assert (await known.answer())[0] == 200


@async_test
async def test_a_connection_at_work_is_never_cut_for_a_new_one() -> None:
    async with listening(max_connections=2) as served:
        working = [await served.connect() for _ in range(2)]
        for client in working:
            await client.send(request("/wait"))
        await until(lambda: len(served.seen) == 2)
        assert await (await served.connect()).is_cut()
        assert served.rejected("connections") == 1
        served.go_on.set()
        assert [(await client.answer())[0] for client in working] == [200, 200]
        assert await served.get() == 200
