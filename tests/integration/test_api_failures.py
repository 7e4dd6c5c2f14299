"""Every way to fail, on the fake engine; after each the next request succeeds."""

import asyncio
import logging
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
from starlette.types import Message

from server.lifecycle import Lifecycle
from server.logs import JsonFormatter
from server.ports import (
    BatchRow,
    BatchScores,
    EngineMemoryError,
    EngineUnavailableError,
    RowScores,
    Wanted,
)
from tests.integration.test_api_bad_input import check_problem
from tests.support.api import Api, async_test, running, same_answer, until
from tests.support.fake_engine import FakeEngine


def ask(api: Api, body: Any, **headers: str) -> "asyncio.Task[Any]":
    return asyncio.create_task(api.classify(body, **headers))


async def block(api: Api) -> "asyncio.Task[Any]":
    """Keep the engine busy with a request of its own."""
    api.engine.gate.clear()
    task = ask(api, {"input": "blocker"})
    await until(api.engine.entered.is_set)
    return task


@async_test
async def test_a_full_queue_says_429_and_when_to_come_back() -> None:
    async with running(max_rows=2, max_queued_rows=2) as api:
        blocker = await block(api)
        second = ask(api, {"input": "waiting"})
        await until(lambda: api.service.admission.num_rows == 2)
        response = await api.classify({"input": "too many"})
        body = check_problem(response, 429, "queue_full")
        assert body["errors"] == [{"code": "rows", "limit": 2}]
        assert body["error"]["type"] == "rate_limit_error"
        assert int(response.headers["retry-after"]) >= 1
        assert await api.metric("rejections_total", reason="queue_full") == 1
        api.engine.gate.set()
        assert (await blocker).status_code == (await second).status_code == 200
        await api.check_healthy()


@async_test
async def test_a_full_queue_refuses_before_the_body_is_read() -> None:
    async with running(max_requests=1) as api:
        blocker = await block(api)
        response = await api.client.post(
            "/v1/classify", content=b"not even JSON", headers={"content-type": "application/json"}
        )
        check_problem(response, 429, "queue_full")
        api.engine.gate.set()
        await blocker
        await api.check_healthy()


@async_test
async def test_rows_that_do_not_fit_beside_others_are_refused() -> None:
    async with running(max_rows=3, max_queued_rows=3) as api:
        blocker = await block(api)
        check_problem(await api.classify({"input": ["a", "b", "c"]}), 429, "queue_full")
        api.engine.gate.set()
        await blocker
        await api.check_healthy()


@async_test
async def test_tokens_that_do_not_fit_beside_others_are_refused() -> None:
    async with running(max_queued_tokens=100) as api:
        blocker = await block(api)  # 3 tokens times 4 samples
        response = await api.classify({"input": "word " * 30})
        body = check_problem(response, 429, "queue_full")
        assert body["errors"] == [{"code": "tokens", "limit": 100}]
        api.engine.gate.set()
        await blocker
        await api.check_healthy()


@async_test
async def test_the_deadline_passes_in_the_queue() -> None:
    async with running() as api:
        blocker = await block(api)
        response = await api.classify({"input": "late"}, X_Request_Timeout_Ms="30")
        body = check_problem(response, 504, "deadline_exceeded")
        assert "0.03 s" in body["detail"]
        assert await api.metric("rejections_total", reason="deadline") == 1
        api.engine.gate.set()
        assert (await blocker).status_code == 200
        await api.check_healthy()
        assert ["late"] not in api.engine.batches


@async_test
async def test_the_deadline_passes_while_running() -> None:
    async with running(request_timeout_s=0.5) as api:
        api.engine.gate.clear()
        check_problem(await api.classify({"input": "slow"}), 504, "deadline_exceeded")
        assert api.engine.batches == [["slow"]]
        api.engine.gate.set()
        response = await api.classify({"input": "x"}, X_Request_Timeout_Ms="60000")
        assert response.status_code == 200
        api.check_idle()


@async_test
async def test_the_deadline_passes_while_encoding() -> None:
    async with running() as api:
        api.engine.encode_gate.clear()
        response = await api.classify({"input": "slow"}, X_Request_Timeout_Ms="30")
        check_problem(response, 504, "deadline_exceeded")
        api.engine.encode_gate.set()
        await api.check_healthy()
        assert ["slow"] not in api.engine.batches


@async_test
async def test_the_deadline_passes_while_the_body_comes() -> None:
    async with running() as api:

        async def chunks() -> AsyncIterator[bytes]:
            yield b'{"input": '
            await asyncio.sleep(60)

        response = await api.client.post(
            "/v1/classify",
            content=chunks(),
            headers={"content-type": "application/json", "x-request-timeout-ms": "30"},
        )
        check_problem(response, 504, "deadline_exceeded")
        await api.check_healthy()


class Client:
    """A client that speaks ASGI by hand, so that it can leave at any moment."""

    def __init__(self, api: Api, chunks: list[bytes], *, complete: bool = True) -> None:
        self._messages: asyncio.Queue[Message] = asyncio.Queue()
        for place, chunk in enumerate(chunks):
            more = place < len(chunks) - 1 or not complete
            self._messages.put_nowait({"type": "http.request", "body": chunk, "more_body": more})
        self.sent: list[Message] = []
        scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": "POST",
            "scheme": "http",
            "path": "/v1/classify",
            "raw_path": b"/v1/classify",
            "root_path": "",
            "query_string": b"",
            "headers": [(b"content-type", b"application/json"), (b"host", b"localhost")],
            "client": ("127.0.0.1", 1),
            "server": ("127.0.0.1", 80),
        }
        self.done = asyncio.create_task(api.app(scope, self._messages.get, self._send))

    async def _send(self, message: Message) -> None:
        self.sent.append(message)

    async def leave(self) -> None:
        self._messages.put_nowait({"type": "http.disconnect"})
        await self.done


@async_test
async def test_a_client_that_leaves_the_queue_costs_nothing() -> None:
    async with running() as api:
        blocker = await block(api)
        client = Client(api, [b'{"input": "gone"}'])
        await until(lambda: api.service.lifecycle.batcher.num_waiting == 1)
        await client.leave()
        assert await api.metric("cancelled_total", phase="queued") == 1
        api.engine.gate.set()
        assert (await blocker).status_code == 200
        await api.check_healthy()
        assert ["gone"] not in api.engine.batches
        left = {"method": "POST", "route": "/v1/classify", "status": "499"}
        assert await api.metric("http_requests_total", **left) == 1


@async_test
async def test_a_client_that_leaves_while_running_disturbs_nobody() -> None:
    async with running() as api:
        api.engine.gate.clear()
        client = Client(api, [b'{"input": "gone"}'])
        await until(api.engine.entered.is_set)
        await client.leave()
        assert await api.metric("cancelled_total", phase="running") == 1
        await api.check_healthy()


@async_test
async def test_a_client_that_leaves_before_its_body_is_complete() -> None:
    async with running() as api:
        client = Client(api, [b'{"input": '], complete=False)
        await client.leave()
        assert await api.metric("cancelled_total", phase="queued") == 1
        await api.check_healthy()


@async_test
async def test_a_failing_batch_fails_only_the_request_that_is_to_blame(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def fault(texts: list[str]) -> None:
        if "poison 4711" in texts:
            raise ValueError(f"cannot digest {texts}")

    async with running() as api:
        blocker = await block(api)
        bodies: list[dict[str, Any]] = [
            {"input": "good"},
            {"input": ["fine", "poison 4711"]},
            {"input": "other"},
        ]
        tasks = [ask(api, body, X_Request_Id=f"r{n}") for n, body in enumerate(bodies)]
        await until(lambda: api.service.lifecycle.batcher.num_waiting == 4)
        api.engine.fault = fault
        api.engine.gate.set()
        good, bad, other = [await task for task in tasks]
        assert (await blocker).status_code == good.status_code == other.status_code == 200
        body = check_problem(bad, 500, "internal_error")
        assert "r1" in body["detail"]
        assert "4711" not in bad.text
        await api.check_healthy()
        lines = [JsonFormatter().format(record) for record in caplog.records]
        assert any('"batch failed"' in line and "ValueError" in line for line in lines)
        assert not any("4711" in line for line in lines)


@pytest.mark.parametrize("error", [ValueError("4711"), FloatingPointError("NaN 4711")])
@async_test
async def test_an_engine_that_raises_fails_one_request_and_lives_on(error: Exception) -> None:
    def fault(_texts: list[str]) -> None:
        raise error

    async with running() as api:
        api.engine.fault = fault
        body = check_problem(await api.classify({"input": "x"}), 500, "internal_error")
        assert "4711" not in body["detail"]
        assert await api.metric("batch_failures_total", reason="error") == 1
        api.engine.fault = lambda _texts: None
        await api.check_healthy()


class Misshapen(FakeEngine):
    """Loses its last row, or leaves it out, while it is told to."""

    def __init__(self, *, lose: bool) -> None:
        super().__init__()
        self.lose = lose
        self.faulty = True

    def run_batch(self, rows: Sequence[BatchRow], wanted: Wanted) -> BatchScores:
        scores = super().run_batch(rows, wanted)
        if not self.faulty:
            return scores
        return replace(scores, rows=scores.rows[:-1] + (() if self.lose else (None,)))


@async_test
async def test_an_engine_whose_server_is_away_says_503_and_when_to_come_back() -> None:
    def fault(_texts: list[str]) -> None:
        raise EngineUnavailableError("http://secret-host is away")

    async with running() as api:
        api.engine.fault = fault
        response = await api.classify({"input": ["x", "y"]})
        body = check_problem(response, 503, "engine_unavailable")
        assert "secret-host" not in response.text
        assert "does not answer" in body["detail"]
        assert response.headers["retry-after"] == "5"
        assert await api.metric("batch_failures_total", reason="unavailable") == 1
        api.engine.fault = lambda _texts: None
        await api.check_healthy()


@pytest.mark.parametrize("lose", [True, False])
@async_test
async def test_an_answer_of_the_wrong_shape_is_never_given_to_anyone(lose: bool) -> None:
    engine = Misshapen(lose=lose)
    async with running(engine) as api:
        check_problem(await api.classify({"input": ["a", "b"]}), 500, "internal_error")
        assert await api.metric("batch_failures_total", reason="error") == 1
        engine.faulty = False
        await api.check_healthy()


def fits(num_rows: int) -> Callable[[list[str]], None]:
    def fault(texts: list[str]) -> None:
        if len(texts) > num_rows:
            raise EngineMemoryError(f"{texts} does not fit")

    return fault


@async_test
async def test_a_batch_out_of_memory_is_halved_and_answered() -> None:
    async with running() as api:
        expected = same_answer(await api.classify({"input": ["a", "b", "c", "d"]}))
        api.engine.fault = fits(2)
        response = await api.classify({"input": ["a", "b", "c", "d"]})
        assert response.status_code == 200
        assert same_answer(response) == expected
        assert await api.metric("batch_failures_total", reason="memory") == 1
        assert (await api.client.get("/health/ready")).status_code == 200
        await api.check_healthy()


@async_test
async def test_a_request_that_never_fits_fails_alone() -> None:
    async with running() as api:
        blocker = await block(api)
        tasks = [ask(api, {"input": text}) for text in ("small", "mini", "huge")]
        await until(lambda: api.service.lifecycle.batcher.num_waiting == 3)

        def fault(texts: list[str]) -> None:
            if "huge" in texts:
                raise EngineMemoryError(f"{texts} does not fit")

        api.engine.fault = fault
        api.engine.gate.set()
        answers = [await task for task in (blocker, *tasks)]
        assert [answer.status_code for answer in answers[:2]] == [200, 200]
        body = check_problem(answers[3], 503, "out_of_memory")
        assert "huge" not in body["detail"]
        assert answers[3].headers["retry-after"]
        alone = await api.classify({"input": "huge"})
        check_problem(alone, 503, "out_of_memory")
        assert api.engine.batches[-2:] == [["huge"], ["huge"]]  # retried once
        await api.check_healthy()


class Counting(FakeEngine):
    """Tells which rows it computed, one forward pass each, and what happens before each."""

    def __init__(self) -> None:
        super().__init__()
        self.chunk_rows = 1
        self.computed: list[str] = []
        self.before: Callable[[int], None] = lambda _done: None

    def _score(self, row: BatchRow) -> RowScores:
        self.computed.append(row.row.payload.text)  # type: ignore[attr-defined]
        self.before(len(self.computed))
        return super()._score(row)


@async_test
async def test_a_deadline_that_passes_while_computing_cancels_between_forward_passes() -> None:
    engine = Counting()
    async with running(engine) as api:
        late = ask(api, {"input": ["a", "b", "c", "d"]}, X_Request_Timeout_Ms="100")
        answered = threading.Event()
        late.add_done_callback(lambda _: answered.set())
        engine.before = lambda done: None if done != 2 else wait_for(answered)
        check_problem(await late, 504, "deadline_exceeded")
        engine.before = lambda _done: None
        await api.check_healthy()
        assert engine.computed == ["a", "b", "a sure thing"]  # c and d cost nothing
        for reason in ("error", "memory", "unavailable", "fatal", "hung"):
            assert await api.metric("batch_failures_total", reason=reason) == 0


@async_test
async def test_a_client_that_leaves_while_computing_cancels_between_forward_passes() -> None:
    engine = Counting()
    async with running(engine) as api:
        engine.gate.clear()
        client = Client(api, [b'{"input": ["a", "b", "c", "d"]}'])
        await until(engine.entered.is_set)
        left = threading.Event()
        second = threading.Event()

        def before(done: int) -> None:
            if done == 2:
                second.set()
                wait_for(left)

        engine.before = before
        engine.gate.set()
        await until(second.is_set)
        await client.leave()
        left.set()
        engine.before = lambda _done: None
        await api.check_healthy()
        assert engine.computed == ["a", "b", "a sure thing"]


def wait_for(event: threading.Event) -> None:
    assert event.wait(20)


@async_test
async def test_who_can_wait_lets_others_go_first_but_not_for_ever() -> None:
    async with running(max_batch_rows=1, batch_priority_delay_ms=600_000) as api:
        blocker = await block(api)
        texts = {"patient": "batch", "early": "interactive", "late": "interactive"}
        tasks: list[asyncio.Task[Any]] = []
        for text, priority in texts.items():
            tasks.append(ask(api, {"input": text}, X_Priority=priority))
            waiting = len(tasks)
            await until(lambda n=waiting: api.service.lifecycle.batcher.num_waiting == n)
        api.engine.gate.set()
        assert [(await task).status_code for task in (blocker, *tasks)] == [200] * 4
        assert api.engine.batches == [["blocker"], ["early"], ["late"], ["patient"]]
        await api.check_healthy()


@async_test
async def test_work_that_can_wait_leaves_room_for_work_that_cannot() -> None:
    async with running(max_requests=4, batch_priority_share=0.5) as api:
        blocker = await block(api)
        patient = ask(api, {"input": "patient"}, X_Priority="batch")
        more = ask(api, {"input": "more"}, X_Priority="batch")
        await until(lambda: api.service.lifecycle.batcher.num_waiting == 2)
        refused = await api.classify({"input": "too many"}, X_Priority="batch")
        body = check_problem(refused, 429, "queue_full")
        assert body["errors"] == [{"code": "requests", "limit": 2}]
        urgent = ask(api, {"input": "urgent"})
        await until(lambda: api.service.lifecycle.batcher.num_waiting == 3)
        api.engine.gate.set()
        assert [(await task).status_code for task in (blocker, patient, more, urgent)] == [200] * 4
        await api.check_healthy()


@async_test
async def test_before_the_model_is_loaded_only_liveness_is_good() -> None:
    engine = FakeEngine()
    engine.load_gate.clear()
    async with running(engine, wait=False) as api:
        assert (await api.client.get("/health/live")).status_code == 200
        assert (await api.client.get("/metrics")).status_code == 200
        for path in ("/health/ready", "/health/startup", "/v1/models", "/v1/models/topics"):
            response = await api.client.get(path)
            check_problem(response, 503, "not_ready")
            assert response.headers["retry-after"] == "5"
        check_problem(await api.classify({"input": "x"}), 503, "not_ready")
        engine.load_gate.set()
        await api.service.lifecycle.loaded()
        assert (await api.client.get("/health/ready")).status_code == 200
        await api.check_healthy()


@async_test
async def test_stopping_while_loading_waits_for_nothing() -> None:
    engine = FakeEngine()
    engine.load_gate.clear()
    async with running(engine, wait=False) as api:
        await until(engine.asked.is_set)
        await api.service.lifecycle.stop()
        assert api.service.lifecycle.abandoned
        check_problem(await api.classify({"input": "x"}), 503, "draining")
        assert not engine.closed


@async_test
async def test_a_failed_load_is_told_and_never_ready(caplog: pytest.LogCaptureFixture) -> None:
    engine = FakeEngine()
    engine.load_fault = ValueError("fingerprints differ: aa, bb")
    async with running(engine) as api:
        assert isinstance(api.service.lifecycle.failure, ValueError)
        assert (await api.client.get("/health/live")).status_code == 200
        for path in ("/health/ready", "/health/startup"):
            check_problem(await api.client.get(path), 503, "not_ready")
        check_problem(await api.classify({"input": "x"}), 503, "not_ready")
        assert await api.metric("adapter_load_failures_total") == 1
        lines = [JsonFormatter().format(record) for record in caplog.records]
        assert any("fingerprints differ" in line for line in lines)


@async_test
async def test_draining_answers_requests_but_is_not_ready() -> None:
    async with running() as api:
        api.service.lifecycle.begin_drain()
        check_problem(await api.client.get("/health/ready"), 503, "draining")
        assert (await api.client.get("/health/live")).status_code == 200
        assert (await api.client.get("/health/startup")).status_code == 200
        await api.check_healthy()


@async_test
async def test_stopping_while_busy_answers_everyone_first() -> None:
    async with running() as api:
        blocker = await block(api)
        waiting = ask(api, {"input": "waiting"})
        await until(lambda: api.service.lifecycle.batcher.num_waiting == 1)
        stopping = asyncio.create_task(api.service.lifecycle.stop())
        await until(lambda: api.service.lifecycle.phase == "stopped")
        check_problem(await api.classify({"input": "late"}), 503, "draining")
        api.engine.gate.set()
        assert (await blocker).status_code == (await waiting).status_code == 200
        await stopping
        assert api.engine.closed
        api.check_idle()


@async_test
async def test_stopping_gives_up_on_a_hung_engine() -> None:
    async with running(request_timeout_s=0.5, max_request_timeout_s=0.5) as api:
        blocker = await block(api)
        await api.service.lifecycle.stop()
        assert (await blocker).status_code in (503, 504)
        assert api.service.lifecycle.abandoned
        assert not api.engine.closed
        api.check_idle()


@pytest.mark.parametrize("path", ["/v1/models", "/health/ready"])
@async_test
async def test_a_bug_is_a_500_without_details(
    path: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with running() as api:

        def broken(_self: Lifecycle) -> None:
            raise KeyError("text 4711")

        with monkeypatch.context() as patch:
            patch.setattr(Lifecycle, "_serving_run", broken)
            response = await api.client.get(path, headers={"x-request-id": "bug-1"})
        body = check_problem(response, 500, "internal_error")
        assert body["detail"] == "an unexpected error; report request id bug-1"
        assert "4711" not in response.text
        lines = [JsonFormatter().format(record) for record in caplog.records]
        assert any("KeyError" in line for line in lines)
        assert not any("4711" in line for line in lines)
        await api.check_healthy()


@async_test
async def test_many_clients_at_once_all_get_their_own_answer() -> None:
    async with running(max_batch_rows=7) as api:
        texts = [f"text number {n}" for n in range(60)]
        answers = await asyncio.gather(*(api.classify({"input": text}) for text in texts))
        alone = [same_answer(await api.classify({"input": text})) for text in texts[:5]]
        assert [same_answer(answer) for answer in answers[:5]] == alone
        assert all(answer.status_code == 200 for answer in answers)
        api.check_idle()


@async_test
async def test_the_text_of_a_request_is_never_logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    async with running() as api:
        await api.classify({"input": "secret 4711", "metadata": {"a": "secret 4711"}})
        await api.classify({"input": ["secret 4711", 1]})
        await api.client.get("/secret-4711")
        ours = [r for r in caplog.records if r.name.startswith(("server", "uvicorn"))]
        assert ours
        assert not any("4711" in JsonFormatter().format(record) for record in ours)


@async_test
async def test_nothing_here_leaves_an_engine_thread_behind() -> None:
    await until(lambda: all(t.name != "dalorra-engine" for t in threading.enumerate()))
