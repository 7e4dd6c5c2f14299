"""Both clients against the real app, over ASGI and over sockets."""

import asyncio
import contextlib
import random
import signal
import socket
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from dalorra.client import (
    ApiError,
    AsyncClient,
    Client,
    Conflict,
    ConnectionFailed,
    DalorraError,
    DeadlineExceeded,
    InvalidRequest,
    NotFound,
    Overloaded,
    Question,
    Retries,
    Row,
    Text,
    UnreadableAnswer,
)
from dalorra.client.transport import MAX_ANSWER_BYTES
from tests.integration.test_api_lifecycle import Process, serving
from tests.support.api import Api, async_test, running, until
from tests.support.client_drivers import DRIVERS, Calls, Driver
from tests.support.fake_engine import QUIZ, TOPICS_CERTIFIED, FakeEngine

SURE, UNCLEAR, LOST = "a sure thing", "unclear", "lost words"
SOON = Retries(base_s=0.001, cap_s=0.002)

both = pytest.mark.parametrize("driver", DRIVERS, ids=lambda driver: driver.__name__)


@contextlib.asynccontextmanager
async def asking(api: Api, driver: Driver, **arguments: Any) -> AsyncIterator[Calls]:
    arguments = {"url": "http://localhost", "retries": SOON, **arguments}
    async with driver(httpx.ASGITransport(api.app), **arguments) as client:
        yield client


@both
@async_test
async def test_answers_are_those_of_the_api(driver: Driver) -> None:
    async with running() as api, asking(api, driver) as client:
        plain = (await api.classify({"input": [SURE, LOST], "top_k": 2})).json()
        answer = await client.classify([SURE, LOST], top_k=2, request_id="r-1")
        assert (answer.model, answer.request_id) == (plain["model"], "r-1")
        for row, wanted in zip(answer.rows, plain["data"], strict=True):
            found = row.model_dump(mode="json")
            own = {"input", "final_label", "settled_by", "prediction_id"}
            for name in found.keys() & wanted.keys() - own:
                expected = wanted[name]
                if name == "uncertainty":
                    expected = {key: expected[key] for key in found[name]}
                assert found[name] == expected, name
        assert [row.input for row in answer.rows] == [SURE, LOST]
        assert answer.sampling.mask_set == plain["sampling"]["mask_set"]


@both
@async_test
async def test_questions_policies_and_options_reach_the_engine(driver: Driver) -> None:
    async with (
        running(FakeEngine(TOPICS_CERTIFIED, QUIZ)) as api,
        asking(api, driver) as client,
    ):
        question = Question(question="a sure mammal", choices=("trout", "whale"), id="q1")
        (row,) = (await client.classify(question, model="quiz", num_samples=2, seed=3)).rows
        assert (row.id, row.labels, row.input) == ("q1", ("A", "B"), question)
        text = Text(text=SURE, id="t1")
        answer = await client.classify(text, model="topics", policy={"max_risk": 0.06})
        assert answer.policy is not None
        assert answer.policy.guarantee is not None
        assert (answer.policy.name, answer.policy.guarantee.target_risk) == ("risk_0.05", 0.05)
        named = await client.classify(SURE, model="topics", policy="risk_0.1")
        assert named.policy is not None
        assert named.policy.name == "risk_0.1"


@both
@async_test
async def test_hooks_settle_rows_of_the_real_server(driver: Driver) -> None:
    def escalate(row: Row) -> str | None:
        return {"unclear": "fraud"}.get(str(row.input))

    async with running() as api, asking(api, driver) as client:
        answer = await client.classify(
            [SURE, UNCLEAR, LOST], on_review=escalate, on_abstain=escalate
        )
        decided = [(row.final_label, row.settled_by) for row in answer.rows]
        assert decided[1:] == [("fraud", "on_review"), (None, None)]
        assert decided[0] == (answer.rows[0].label, "model")


@async_test
async def test_a_hook_of_the_asyncio_client_may_be_a_coroutine() -> None:
    async def escalate(row: Row) -> str | None:
        await asyncio.sleep(0)
        return f"asked about {row.input}"

    async with running() as api, asking(api, DRIVERS[1]) as client:
        (row,) = (await client.classify(LOST, on_abstain=escalate)).rows
        assert (row.final_label, row.settled_by) == (f"asked about {LOST}", "on_abstain")


@both
@async_test
async def test_what_a_hook_raises_reaches_the_caller(driver: Driver) -> None:
    def fail(_row: Row) -> str | None:
        raise LookupError("nobody is there")

    async with running() as api, asking(api, driver) as client:
        with pytest.raises(LookupError, match="nobody is there"):
            await client.classify(LOST, on_abstain=fail)
        assert (await client.classify(SURE)).rows[0].decision == "accept"


@both
@async_test
async def test_feedback_is_stored_once(driver: Driver, tmp_path: Path) -> None:
    async with running(state_dir=tmp_path) as api, asking(api, driver) as client:
        (row,) = (await client.classify(SURE)).rows
        first = await client.feedback(row.prediction_id, row.label, source="agent")
        again = await client.feedback(row.prediction_id, row.label)
        assert (first.outcome, first.stored, again.stored) == ("correct", True, False)
        with pytest.raises(Conflict):
            await client.feedback(row.prediction_id, None)
        with pytest.raises(NotFound):
            await client.feedback("no-such-id", "billing")


@both
@async_test
async def test_models_and_readiness(driver: Driver) -> None:
    engine = FakeEngine(TOPICS_CERTIFIED, QUIZ)
    engine.load_gate.clear()
    async with running(engine, wait=False) as api, asking(api, driver) as client:
        assert not await client.ready()
        engine.load_gate.set()
        await api.service.lifecycle.loaded()
        assert await client.ready()
        models = {model.id: model for model in await client.models()}
        assert models.keys() == {"topics", "quiz"}
        assert models["topics"].labels == TOPICS_CERTIFIED.labels
        assert models["topics"].policies[0].guarantee is not None
        assert models["topics"].limits["max_rows"] == 64


@both
@async_test
async def test_refusals_are_typed_and_not_repeated(driver: Driver) -> None:
    async with running() as api, asking(api, driver) as client:
        with pytest.raises(NotFound) as missing:
            await client.classify(SURE, model="topic")
        assert "topics" in missing.value.errors[0]["close_names"]
        with pytest.raises(InvalidRequest) as invalid:
            await client.classify(SURE, num_samples=1000)
        assert invalid.value.status == 422
        assert isinstance(invalid.value, ApiError)
        route = "/v1/classify"
        sent = {"method": "POST", "route": route}
        assert await api.metric("http_requests_total", status="404", **sent) == 1
        assert await api.metric("http_requests_total", status="422", **sent) == 1


@both
@async_test
async def test_a_full_server_is_asked_again_until_there_is_room(driver: Driver) -> None:
    async with running(max_requests=1) as api:
        slept: list[float] = []

        class Told(random.Random):
            """Lets the request that is inside finish as soon as a retry is being planned."""

            def uniform(self, a: float, b: float) -> float:
                slept.append(b)
                api.engine.gate.set()
                return a

        api.engine.gate.clear()
        inside = asyncio.create_task(api.classify({"input": "first"}))
        await until(api.engine.entered.is_set)
        retries = Retries(base_s=0.001, cap_s=0.002, stream=Told())
        async with asking(api, driver, retries=retries) as client:
            answer = await client.classify(SURE)
        assert answer.rows[0].decision == "accept"
        assert slept
        assert (await inside).status_code == 200
        assert await api.metric("rejections_total", reason="queue_full") >= 1
        await api.check_healthy()


class OneAfterAnother(httpx.AsyncBaseTransport):
    """A balancer: each attempt goes to the next server, and the last one gets the rest.

    It has another server at hand, so it lets nobody wait for the one that refused.
    """

    def __init__(self, *apps: Any) -> None:
        self._left = [httpx.ASGITransport(app) for app in apps]
        self.used = 0
        self.asked_to_wait: list[str] = []

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        self.used += 1
        transport = self._left.pop(0) if len(self._left) > 1 else self._left[0]
        response = await transport.handle_async_request(request)
        if (wait := response.headers.get("retry-after")) is not None:
            self.asked_to_wait.append(wait)
            response.headers["retry-after"] = "0"
        return response


@both
@async_test
async def test_a_server_that_is_about_to_stop_hands_over_to_another(driver: Driver) -> None:
    async with running() as stopping, running() as other:
        await stopping.service.lifecycle.stop()
        balancer = OneAfterAnother(stopping.app, other.app)
        async with driver(balancer, url="http://localhost", retries=SOON) as client:
            answer = await client.classify(SURE)
        assert answer.rows[0].decision == "accept"
        assert balancer.used == 2
        assert len(balancer.asked_to_wait) == 1
        assert len(other.engine.batches) == 1


@both
@async_test
async def test_a_deadline_reaches_the_server_and_ends_the_wait(driver: Driver) -> None:
    async with running() as api, asking(api, driver, timeout_s=0.05) as client:
        api.engine.gate.clear()
        with pytest.raises((DeadlineExceeded, Overloaded)):
            await client.classify(SURE)
        await api.check_healthy()


@pytest.fixture(scope="module")
def server() -> Any:
    with serving() as process:
        process.port = process.read_log("listening")["port"]
        process.read_log("ready")
        yield process


@both
@async_test
async def test_over_a_socket(driver: Driver, server: Process) -> None:
    async with driver(url=server.url, max_connections=2) as client:
        assert await client.ready()
        texts = [f"a sure thing {n}" for n in range(8)]
        answers = await asyncio.gather(*(client.classify(text) for text in texts))
        assert [answer.rows[0].input for answer in answers] == texts
        assert {answer.rows[0].decision for answer in answers} == {"accept"}


@both
@async_test
async def test_nobody_listens(driver: Driver) -> None:
    with socket.socket() as taken:  # bound and not listening: nobody else gets the port
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        retries = Retries(max_attempts=3, base_s=0.001, cap_s=0.001)
        async with driver(url=url, retries=retries) as client:
            with pytest.raises(ConnectionFailed, match="could not connect"):
                await client.classify(SURE)
            assert not await client.ready()


@both
@async_test
async def test_a_server_that_hangs_is_left_when_the_time_is_up(driver: Driver) -> None:
    with socket.create_server(("127.0.0.1", 0)) as hanging:  # takes connections, never answers
        url = f"http://127.0.0.1:{hanging.getsockname()[1]}"
        async with driver(url=url, timeout_s=0.1) as client:
            with pytest.raises(DeadlineExceeded, match=r"0\.1 s"):
                await client.classify(SURE)


@contextlib.contextmanager
def listening(handle: Callable[[socket.socket], None]) -> Iterator[str]:
    """Take connections in a thread, one after another, each with its request already read."""

    def serve() -> None:
        with contextlib.suppress(OSError):  # closed by the test, or by the client
            while True:
                connection, _ = listener.accept()
                with connection, contextlib.suppress(OSError):
                    while b"\r\n\r\n" not in connection.recv(65_536):
                        pass
                    handle(connection)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        listener.shutdown(socket.SHUT_RDWR)
    thread.join(30)
    assert not thread.is_alive()


@both
@async_test
async def test_an_answer_that_trickles_is_left_when_the_time_is_up(driver: Driver) -> None:
    over = threading.Event()

    def trickle(connection: socket.socket) -> None:
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n")
        while not over.wait(0.01):  # until the client has had enough, too
            connection.sendall(b" ")

    with listening(trickle) as url:
        async with driver(url=url, timeout_s=0.2) as client:
            with pytest.raises(DeadlineExceeded):
                await client.classify(SURE)
        over.set()


@both
@async_test
async def test_a_connection_that_breaks_off_is_tried_again(driver: Driver) -> None:
    attempts: list[socket.socket] = []
    with listening(attempts.append) as url:
        retries = Retries(max_attempts=3, base_s=0.001, cap_s=0.001)
        async with driver(url=url, retries=retries) as client:
            with pytest.raises(ConnectionFailed, match="broke off"):
                await client.models()
    assert len(attempts) == 3


PLACES = ("http://evil.example/", "//evil.example", "mailto:a", "javascript:a()", "http://xn--/")


@both
@async_test
async def test_no_redirect_is_followed_and_none_breaks_the_client(driver: Driver) -> None:
    asked: list[str] = []

    for place in PLACES:

        def redirect(request: httpx.Request, place: str = place) -> httpx.Response:
            asked.append(request.url.host)
            return httpx.Response(307, headers={"Location": place})

        page = httpx.MockTransport(redirect)
        retries = Retries(max_attempts=1)
        async with driver(page, url="http://good", api_key="k", retries=retries) as client:
            with pytest.raises(DalorraError):
                await client.classify(SURE)
    assert asked == ["good"] * len(PLACES)


class Endless(httpx.AsyncByteStream, httpx.SyncByteStream):
    """An answer without an end."""

    def __init__(self) -> None:
        self.sent = 0

    def __iter__(self) -> Iterator[bytes]:
        while True:
            self.sent += CHUNK
            yield bytes(CHUNK)

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for chunk in iter(self):
            yield chunk


CHUNK = 16 * 2**20


@async_test
async def test_an_answer_without_an_end_is_left_before_it_fills_the_memory() -> None:
    answers = [Endless(), Endless()]
    pages = [
        httpx.MockTransport(lambda _request, one=one: httpx.Response(200, stream=one))
        for one in answers
    ]
    too_large = pytest.raises(UnreadableAnswer, match="more than")
    with Client("http://good", transport=pages[0]) as client, too_large:
        client.models()
    async with AsyncClient("http://good", transport=pages[1]) as client:
        with too_large:
            await client.models()
    for answer in answers:
        assert answer.sent <= MAX_ANSWER_BYTES + CHUNK


@both
@async_test
async def test_a_page_of_somebody_else_is_no_answer(driver: Driver) -> None:
    page = httpx.MockTransport(lambda _request: httpx.Response(200, text="<html>hello</html>"))
    async with driver(page, url="http://somewhere") as client:
        with pytest.raises(UnreadableAnswer):
            await client.classify(SURE)


def test_a_restart_of_the_server_is_ridden_out() -> None:
    with serving() as first:
        port = first.read_log("listening")["port"]
        first.read_log("ready")
        url = f"http://127.0.0.1:{port}"
        retries = Retries(max_attempts=100, base_s=0.05, cap_s=0.1)
        with Client(url, retries=retries, timeout_s=30) as client:
            assert client.classify(SURE).rows[0].decision == "accept"
            first.popen.send_signal(signal.SIGKILL)
            first.popen.wait(30)
            with serving("--port", str(port)) as second:
                assert client.classify(SURE).rows[0].decision == "accept"
                second.read_log("ready")
