"""Every way to fail, on the fake engine; after each the next request succeeds."""

import asyncio
import logging
import threading
from collections.abc import AsyncIterator
from typing import Any

import pytest
from starlette.types import Message

from server.lifecycle import Lifecycle
from server.logs import JsonFormatter
from server.ports import EngineFatalError
from tests.integration.test_api_bad_input import check_problem
from tests.support.api import Api, async_test, running, same_answer, until
from tests.support.fake_engine import FakeEngine, LostError


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
            "headers": [(b"content-type", b"application/json"), (b"host", b"dalorra")],
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


@pytest.mark.parametrize("error", [LostError(), EngineFatalError("device lost")])
@async_test
async def test_a_dead_engine_turns_readiness_off_and_answers_503(error: BaseException) -> None:
    def fault(_texts: list[str]) -> None:
        raise error

    async with running() as api:
        blocker = await block(api)
        waiting = ask(api, {"input": "waiting"})
        await until(lambda: api.service.lifecycle.batcher.num_waiting == 1)
        api.engine.fault = fault
        api.engine.gate.set()
        for task in (blocker, waiting):
            check_problem(await task, 503, "engine_unavailable")
        response = await api.classify({"input": "next"})
        check_problem(response, 503, "engine_unavailable")
        assert response.headers["retry-after"]
        for path in ("/health/ready", "/health/live"):
            check_problem(await api.client.get(path), 503, "engine_unavailable")
        assert await api.metric("adapter_loaded", adapter="topics") == 0
        api.check_idle()


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


@async_test
async def test_an_engine_stuck_with_one_batch_is_not_ready() -> None:
    async with running(stall_s=0.01) as api:
        blocker = await block(api)
        await until(lambda: api.service.lifecycle.batcher.running_for_s > 0.01)
        check_problem(await api.client.get("/health/ready"), 503, "engine_unavailable")
        assert (await api.client.get("/health/live")).status_code == 200
        api.engine.gate.set()
        await blocker
        await until(lambda: api.service.lifecycle.batcher.running_for_s == 0)
        assert (await api.client.get("/health/ready")).status_code == 200


@pytest.mark.parametrize("path", ["/v1/models", "/health/ready"])
@async_test
async def test_a_bug_is_a_500_without_details(
    path: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with running() as api:

        def broken(_self: Lifecycle) -> None:
            raise KeyError("text 4711")

        with monkeypatch.context() as patch:
            patch.setattr(Lifecycle, "require_serving", broken)
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
