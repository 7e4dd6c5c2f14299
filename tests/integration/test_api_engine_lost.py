"""An engine that dies or hangs: told at once, replaced a bounded number of times, counted."""

import asyncio
import threading
from collections.abc import Callable
from typing import Any

import pytest

from server.ports import (
    EncodedRow,
    EngineFatalError,
    EngineStoppedError,
    Question,
    Truncate,
)
from tests.integration.test_api_bad_input import check_problem
from tests.support.api import Api, async_test, running, until
from tests.support.fake_engine import FakeEngine, LostError

STALL_S = 0.3


def ask(api: Api, text: str) -> "asyncio.Task[Any]":
    return asyncio.create_task(api.classify({"input": text}))


def dies_of(error: BaseException) -> Callable[[list[str]], None]:
    def fault(_texts: list[str]) -> None:
        raise error

    return fault


async def block_with_one_waiting(api: Api) -> "list[asyncio.Task[Any]]":
    """Keep the engine busy with one request while another waits."""
    api.engine.gate.clear()
    running_task = ask(api, "blocker")
    await until(api.engine.entered.is_set)
    waiting = ask(api, "waiting")
    await until(lambda: api.service.lifecycle.batcher.num_waiting == 1)
    return [running_task, waiting]


async def reach(api: Api, phase: str) -> None:
    await until(lambda: api.service.lifecycle.phase == phase)


async def restarted(api: Api, times: int) -> None:
    """Return when so many restarts have begun and the last of them is through."""
    registry, labels = api.service.telemetry.registry, {"reason": "dead"}
    name = "dalorra_engine_restarts_total"
    await until(lambda: registry.get_sample_value(name, labels) == times)
    await reach(api, "serving")


async def check_restarted(api: Api, spare: FakeEngine) -> None:
    """The next engine answers, and nothing is left of the last one."""
    await reach(api, "serving")
    assert (await api.client.get("/health/ready")).status_code == 200
    assert await api.metric("adapter_loaded", adapter="topics") == 1
    api.engine = spare
    await api.check_healthy()
    assert spare.batches == [["a sure thing"]]


@pytest.mark.parametrize("error", [LostError(), EngineFatalError("device lost")])
@async_test
async def test_a_dead_engine_fails_who_waits_and_is_replaced(error: BaseException) -> None:
    spare = FakeEngine()
    spare.load_gate.clear()
    async with running(FakeEngine(), spare) as api:
        tasks = await block_with_one_waiting(api)
        api.engine.fault = dies_of(error)
        api.engine.gate.set()
        for task in tasks:
            response = await task
            check_problem(response, 503, "engine_unavailable")
            assert response.headers["retry-after"] == "5"
        await reach(api, "restarting")
        await until(lambda: api.engine.closed)  # its memory is free before the next one loads
        response = await api.classify({"input": "next"})
        check_problem(response, 503, "engine_unavailable")
        assert response.headers["retry-after"] == "5"
        check_problem(await api.client.get("/health/ready"), 503, "engine_unavailable")
        for path in ("/health/live", "/health/startup", "/metrics"):
            assert (await api.client.get(path)).status_code == 200
        assert await api.metric("adapter_loaded", adapter="topics") == 0
        api.check_idle()

        spare.load_gate.set()
        await check_restarted(api, spare)
        assert await api.metric("engine_restarts_total", reason="dead") == 1
        assert await api.metric("engine_restarts_total", reason="hung") == 0
        assert await api.metric("batch_failures_total", reason="fatal") == 1


@async_test
async def test_a_lost_engine_is_told_even_before_the_supervisor_knows() -> None:
    spare = FakeEngine()
    async with running(FakeEngine(), spare) as api:
        lifecycle = api.service.lifecycle
        assert lifecycle.engine is api.engine
        lifecycle.batcher.abandon()
        assert lifecycle.phase == "serving"
        check_problem(await api.client.get("/health/ready"), 503, "engine_unavailable")
        await restarted(api, 1)
        assert lifecycle.engine is spare
        await check_restarted(api, spare)


@async_test
async def test_a_hung_engine_turns_readiness_off_and_is_replaced_by_another() -> None:
    spare = FakeEngine()
    spare.load_gate.clear()
    async with running(FakeEngine(), spare, stall_s=STALL_S) as api:
        hung = api.engine
        for task in await block_with_one_waiting(api):
            check_problem(await task, 503, "engine_unavailable")
        check_problem(await api.client.get("/health/ready"), 503, "engine_unavailable")
        assert (await api.client.get("/health/live")).status_code == 200
        api.check_idle()
        spare.load_gate.set()
        await check_restarted(api, spare)
        assert await api.metric("engine_restarts_total", reason="hung") == 1
        assert await api.metric("batch_failures_total", reason="hung") == 1
        assert not hung.closed  # a thread is still in it

        hung.gate.set()  # and comes back late: nobody gets a second answer, and it is let go
        await until(lambda: hung.closed)
        assert hung.batches == [["blocker"]]
        await api.check_healthy()
        assert await api.metric("batch_failures_total", reason="error") == 0


@async_test
async def test_a_hung_engine_that_comes_back_while_the_next_one_works_disturbs_nobody() -> None:
    spare = FakeEngine()
    async with running(FakeEngine(), spare, stall_s=STALL_S) as api:
        hung = api.engine
        for task in await block_with_one_waiting(api):
            check_problem(await task, 503, "engine_unavailable")
        await reach(api, "serving")
        hung.fault = dies_of(LostError())
        hung.gate.set()
        await until(lambda: hung.closed)
        await check_restarted(api, spare)
        assert await api.metric("engine_restarts_total", reason="dead") == 0


@async_test
async def test_a_slow_engine_with_signs_of_life_is_left_alone() -> None:
    class Slow(FakeEngine):
        """Takes longer than is allowed for a batch, but not for a forward pass."""

        def run_batch(self, rows: Any, wanted: Any) -> Any:
            begin = threading.Event()
            for _ in range(6):
                begin.wait(STALL_S / 4)
                wanted(0)
            return super().run_batch(rows, wanted)

    async with running(Slow(), stall_s=STALL_S) as api:
        assert (await api.classify({"input": "x"})).status_code == 200
        assert await api.metric("engine_restarts_total", reason="hung") == 0
        await api.check_healthy()


@async_test
async def test_an_engine_that_is_lost_again_and_again_stays_dead() -> None:
    engine = FakeEngine()
    engine.fault = dies_of(LostError())
    async with running(engine, max_engine_restarts=2) as api:
        lifecycle = api.service.lifecycle
        for times in (0, 1, 2):
            await restarted(api, times)
            response = await api.classify({"input": "x"})
            check_problem(response, 503, "engine_unavailable")
        await reach(api, "dead")
        for path in ("/health/live", "/health/ready", "/livez"):
            check_problem(await api.client.get(path), 503, "engine_unavailable")
        for path in ("/v2/health/live", "/v2/health/ready"):
            assert (await api.client.get(path)).status_code == 503
        assert (await api.client.get("/health/startup")).status_code == 200
        check_problem(await api.classify({"input": "x"}), 503, "engine_unavailable")
        assert await api.metric("engine_restarts_total", reason="dead") == 2
        assert await api.metric("adapter_loaded", adapter="topics") == 0
        api.check_idle()
    assert not lifecycle.abandoned


@async_test
async def test_no_restart_at_all_may_be_chosen() -> None:
    engine = FakeEngine()
    engine.fault = dies_of(LostError())
    async with running(engine, max_engine_restarts=0) as api:
        check_problem(await api.classify({"input": "x"}), 503, "engine_unavailable")
        await reach(api, "dead")
        check_problem(await api.client.get("/health/live"), 503, "engine_unavailable")
        api.check_idle()


class FailsToLoad(FakeEngine):
    """Cannot be loaded so many times."""

    def __init__(self, failures: int) -> None:
        super().__init__()
        self.failures = failures

    def load(self) -> Any:
        self.failures -= 1
        if self.failures >= 0:
            raise OSError("a byte has changed")
        return super().load()


@async_test
async def test_a_restart_that_fails_is_tried_again() -> None:
    spare = FailsToLoad(2)
    async with running(FakeEngine(), spare, stall_s=STALL_S, max_engine_restarts=3) as api:
        api.engine.fault = dies_of(LostError())
        check_problem(await api.classify({"input": "x"}), 503, "engine_unavailable")
        await until(lambda: spare.failures < 0)
        await check_restarted(api, spare)
        assert await api.metric("engine_restarts_total", reason="dead") == 3
        assert await api.metric("adapter_load_failures_total") == 2


@async_test
async def test_restarts_that_fail_count_against_the_bound() -> None:
    spare = FailsToLoad(9)
    async with running(FakeEngine(), spare, stall_s=STALL_S, max_engine_restarts=2) as api:
        api.engine.fault = dies_of(LostError())
        check_problem(await api.classify({"input": "x"}), 503, "engine_unavailable")
        await reach(api, "dead")
        assert spare.failures == 7
        check_problem(await api.client.get("/health/live"), 503, "engine_unavailable")
        api.check_idle()


@async_test
async def test_a_restart_that_hangs_is_given_up() -> None:
    spare = FakeEngine()
    spare.load_gate.clear()
    # ten times the stall limit, or ten times the first load if that took longer
    async with running(FakeEngine(), spare, stall_s=0.05) as api:
        api.engine.fault = dies_of(LostError())
        check_problem(await api.classify({"input": "x"}), 503, "engine_unavailable")
        await reach(api, "dead")
        assert await api.metric("engine_restarts_total", reason="dead") == 1
        check_problem(await api.client.get("/health/live"), 503, "engine_unavailable")
        api.check_idle()
        await api.service.lifecycle.stop()
        assert api.service.lifecycle.abandoned


@async_test
async def test_stopping_during_a_restart_waits_for_nothing() -> None:
    spare = FakeEngine()
    spare.load_gate.clear()
    async with running(FakeEngine(), spare) as api:
        api.engine.fault = dies_of(LostError())
        check_problem(await api.classify({"input": "x"}), 503, "engine_unavailable")
        await reach(api, "restarting")
        lifecycle = api.service.lifecycle
        lifecycle.begin_drain()
        check_problem(await api.client.get("/health/ready"), 503, "engine_unavailable")
        await until(spare.asked.is_set)
        await lifecycle.stop()
        assert lifecycle.phase == "stopped"
        assert lifecycle.abandoned  # the load goes on in its thread until the process ends
        check_problem(await api.classify({"input": "x"}), 503, "draining")
        api.check_idle()


@async_test
async def test_an_engine_that_hangs_while_the_queue_is_finished_is_given_up() -> None:
    async with running(stall_s=STALL_S) as api:
        tasks = await block_with_one_waiting(api)
        await api.service.lifecycle.stop()  # the longest deadline is two minutes away
        for task in tasks:
            check_problem(await task, 503, "engine_unavailable")
        assert api.service.lifecycle.abandoned
        assert not api.engine.closed
        api.check_idle()


@async_test
async def test_draining_does_not_keep_a_lost_engine_from_being_replaced() -> None:
    spare = FakeEngine()
    async with running(FakeEngine(), spare) as api:
        api.service.lifecycle.begin_drain()
        api.engine.fault = dies_of(LostError())
        check_problem(await api.classify({"input": "x"}), 503, "engine_unavailable")
        await restarted(api, 1)
        check_problem(await api.client.get("/health/ready"), 503, "draining")
        api.engine = spare
        await api.check_healthy()


@async_test
async def test_an_engine_that_cannot_be_closed_is_replaced_all_the_same(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Sticky(FakeEngine):
        def close(self) -> None:
            raise EngineFatalError("the device is lost")

    spare = FakeEngine()
    async with running(Sticky(), spare) as api:
        api.engine.fault = dies_of(LostError())
        check_problem(await api.classify({"input": "x"}), 503, "engine_unavailable")
        await restarted(api, 1)
        await check_restarted(api, spare)
    assert any("could not be closed" in record.message for record in caplog.records)


@async_test
async def test_a_bug_in_the_supervision_is_not_silent(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with running() as api:

        def broken() -> None:
            raise KeyError("oops")

        monkeypatch.setattr(api.service.lifecycle._adapters, "detach", broken)
        api.engine.fault = dies_of(LostError())
        check_problem(await api.classify({"input": "x"}), 503, "engine_unavailable")
        await reach(api, "dead")
        check_problem(await api.client.get("/health/live"), 503, "engine_unavailable")
        assert any("supervision died" in record.message for record in caplog.records)
        monkeypatch.undo()


class ClosedEngine(FakeEngine):
    """Answers nothing once it is closed, as the real one."""

    def encode(self, adapter: str, question: Question, truncate: Truncate) -> EncodedRow:
        row = super().encode(adapter, question, truncate)
        if self.closed:
            raise EngineStoppedError
        return row


@async_test
async def test_a_request_that_is_being_encoded_when_its_engine_is_closed_is_told_too() -> None:
    engine = ClosedEngine()
    async with running(engine, FakeEngine()) as api:
        deadly = await block_with_one_waiting(api)
        engine.encode_gate.clear()
        encoding = ask(api, "still being encoded")
        await until(lambda: api.service.admission.num_rows == 3)
        engine.fault = dies_of(EngineFatalError("device lost"))
        engine.gate.set()
        await until(lambda: engine.closed)
        engine.encode_gate.set()
        for task in (*deadly, encoding):
            check_problem(await task, 503, "engine_unavailable")
