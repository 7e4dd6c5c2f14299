"""Readiness that means it: self tests, failed batches, clocks; liveness that asks nobody."""

import asyncio
import threading
import time
from collections.abc import Callable

import pytest

from server.ports import SelfTest
from tests.integration.test_api_bad_input import check_problem
from tests.support.api import Api, async_test, running, until
from tests.support.fake_engine import QUIZ, TOPICS, FakeEngine

WHOSE = {"adapter": "topics", "revision": TOPICS.revision}
SOON_S = 0.3


class ProbedEngine(FakeEngine):
    """Its self tests can be held up, and made to raise."""

    def __init__(self) -> None:
        super().__init__(TOPICS, QUIZ)
        self.test_gate = threading.Event()
        self.test_gate.set()
        self.tested: list[str] = []
        self.test_fault: Callable[[str], None] = lambda _key: None

    def self_test(self, adapter: str) -> SelfTest:
        self.tested.append(adapter)
        self.test_gate.wait(10)
        self.test_fault(adapter)
        return super().self_test(adapter)


async def status(api: Api, path: str = "/health/ready") -> int:
    return (await api.client.get(path)).status_code


async def reach(api: Api, wanted: int) -> None:
    """Return when readiness has this status; fail after twenty seconds."""
    end_s = time.monotonic() + 20
    while await status(api) != wanted:
        assert time.monotonic() < end_s, f"readiness never became {wanted}"
        await asyncio.sleep(0.001)


async def unready_because(api: Api, words: str) -> str:
    """Return why readiness is off, when that has these words; fail after twenty seconds."""
    end_s = time.monotonic() + 20
    while words not in (detail := (await api.client.get("/health/ready")).json().get("detail", "")):
        assert time.monotonic() < end_s, detail
        await asyncio.sleep(0.001)
    check_problem(await api.client.get("/health/ready"), 503, "engine_unavailable")
    return detail


async def ask(api: Api, text: str, priority: str = "interactive") -> int:
    body = {"input": text, "model": "topics"}
    return (await api.classify(body, X_Priority=priority)).status_code


@async_test
async def test_every_adapter_is_tested_again_and_again() -> None:
    engine = ProbedEngine()
    async with running(engine, selftest_interval_s=SOON_S) as api:
        await until(lambda: len(engine.tested) >= 4)
        assert set(engine.tested) == {"topics", "quiz"}
        assert await status(api) == 200


@async_test
async def test_a_failed_self_test_turns_readiness_off_and_names_the_adapter() -> None:
    engine = ProbedEngine()
    async with running(engine, selftest_interval_s=SOON_S) as api:
        engine.selftest_error = 0.25
        detail = await unready_because(api, f"adapter topics:{TOPICS.revision} fails its self test")
        assert "largest difference 0.25, limit 0.001" in detail
        assert await api.metric("selftest_ok", **WHOSE) == 0
        assert await api.metric("selftest_max_abs_error", **WHOSE) == 0.25
        assert await status(api, "/health/live") == 200
        assert await ask(api, "x") == 200  # readiness is advice; who comes is still answered

        engine.selftest_error = 1e-7
        await reach(api, 200)
        assert await api.metric("selftest_ok", **WHOSE) == 1
        assert await api.metric("selftest_max_abs_error", **WHOSE) == 1e-7


@async_test
async def test_a_self_test_that_raises_is_a_failed_one() -> None:
    def fault(key: str) -> None:
        if key == "quiz":
            raise FloatingPointError("4711")

    engine = ProbedEngine()
    async with running(engine, selftest_interval_s=SOON_S) as api:
        engine.test_fault = fault
        detail = await unready_because(api, "fails its self test")
        assert detail == f"adapter quiz:{QUIZ.revision} fails its self test: FloatingPointError"
        assert await api.metric("selftest_ok", **WHOSE) == 1
        engine.test_fault = lambda _key: None
        await reach(api, 200)


@async_test
async def test_an_adapter_that_leaves_during_its_self_test_does_not_fail_it() -> None:
    engine = ProbedEngine()
    async with running(engine, selftest_interval_s=SOON_S) as api:
        engine.test_gate.clear()
        await until(lambda: len(engine.tested) > 0)
        engine.cards.pop("quiz")  # from now on its self test would fail
        registry = api.service.adapters.registry
        registry.retire(registry.find("quiz"))
        engine.tested.clear()
        engine.test_gate.set()
        await until(lambda: engine.tested.count("topics") >= 2)
        assert await status(api) == 200


@async_test
async def test_a_self_test_that_finds_no_turn_holds_up_nothing_until_the_last_is_too_old() -> None:
    engine = ProbedEngine()
    async with running(engine, selftest_interval_s=1.0) as api:
        engine.test_gate.clear()
        await until(lambda: len(engine.tested) > 0)
        assert await status(api) == 200
        assert await ask(api, "x") == 200
        await unready_because(api, "the last self test was passed")  # after three intervals
        assert len(engine.tested) == 1  # and no second one was begun
        engine.test_gate.set()
        await reach(api, 200)


@async_test
async def test_a_server_without_adapters_has_nothing_to_test() -> None:
    engine = ProbedEngine()
    async with running(engine, selftest_interval_s=SOON_S) as api:
        registry = api.service.adapters.registry
        for slot in registry.slots:
            registry.retire(slot)
        run = api.service.lifecycle._serving_run()
        passed_s = run.tests._passed_s
        await until(lambda: run.tests._passed_s > passed_s)
        assert await status(api) == 200


@async_test
async def test_what_an_engine_says_of_itself_turns_readiness_off_and_on() -> None:
    async with running() as api:
        assert await status(api) == 200
        api.engine.problem = "what it computes with is away"
        await unready_because(api, "what it computes with is away")
        assert await status(api, "/health/live") == 200
        api.engine.problem = None
        assert await status(api) == 200


@async_test
async def test_failed_batches_in_a_row_turn_readiness_off_until_a_self_test_passes() -> None:
    def fault(_texts: list[str]) -> None:
        raise FloatingPointError("a probability is not finite")

    engine = ProbedEngine()
    async with running(engine, max_failed_batches=2) as api:
        engine.test_gate.clear()
        engine.fault = fault
        assert await ask(api, "x") == 500
        assert await status(api) == 200
        assert engine.tested == []  # the next self test is five minutes away
        assert await ask(api, "x") == 500
        assert await unready_because(api, "batches failed") == "the last 2 batches failed"
        assert await api.metric("batch_failures_total", reason="error") == 2
        await until(lambda: len(engine.tested) > 0)  # but now it comes soon

        engine.fault = lambda _texts: None
        engine.test_gate.set()
        await reach(api, 200)
        assert sorted(engine.tested) == ["quiz", "topics"]
        assert await ask(api, "x") == 200
        api.check_idle()


@async_test
async def test_a_batch_that_succeeds_turns_readiness_on_again() -> None:
    def fault(texts: list[str]) -> None:
        if "bad" in texts:
            raise ValueError

    engine = ProbedEngine()
    async with running(engine, max_failed_batches=1) as api:
        engine.test_gate.clear()
        engine.fault = fault
        assert await ask(api, "bad") == 500
        await reach(api, 503)
        assert await ask(api, "good") == 200
        await reach(api, 200)
        engine.test_gate.set()


@async_test
async def test_stopping_does_not_wait_for_a_self_test_that_hangs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("server.engine_run.LET_GO_S", 0.05)
    engine = ProbedEngine()
    async with running(engine, selftest_interval_s=SOON_S) as api:
        engine.test_gate.clear()
        await until(lambda: len(engine.tested) > 0)
        await api.service.lifecycle.stop()
        assert api.service.lifecycle.abandoned
        assert not engine.closed
        engine.test_gate.set()


@async_test
async def test_a_self_test_in_a_dead_engine_is_waited_for_before_it_is_closed() -> None:
    closed_while_testing: list[bool] = []
    engine = ProbedEngine()
    spare = FakeEngine(TOPICS, QUIZ)

    def fault(_key: str) -> None:
        closed_while_testing.append(engine.closed)

    def lost(_texts: list[str]) -> None:
        raise SystemExit  # a thread cannot survive this

    async with running(engine, spare, selftest_interval_s=SOON_S) as api:
        engine.test_gate.clear()
        await until(lambda: len(engine.tested) > 0)
        engine.fault, engine.test_fault = lost, fault
        assert await ask(api, "x") == 503
        await until(lambda: api.service.lifecycle.phase == "restarting")
        engine.test_gate.set()
        await until(lambda: api.service.lifecycle.phase == "serving")
        assert engine.closed
        assert closed_while_testing == [False]
        assert await ask(api, "x") == 200


@async_test
async def test_liveness_asks_nobody_who_could_be_held_up() -> None:
    engine = ProbedEngine()
    async with running(engine, selftest_interval_s=SOON_S) as api:
        engine.gate.clear()
        engine.test_gate.clear()
        blocked = asyncio.create_task(ask(api, "x"))
        await until(engine.entered.is_set)
        with api.service.lifecycle.batcher._queue._changed:  # as if a thread died holding it
            assert await status(api, "/health/live") == 200
            assert await status(api, "/health/startup") == 200
            assert await status(api, "/health/ready") == 200
        engine.gate.set()
        engine.test_gate.set()
        assert await blocked == 200


@pytest.mark.parametrize("jump_s", [-86_400 * 365, 86_400 * 365])
@async_test
async def test_a_jump_of_the_clock_changes_nothing(
    jump_s: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = ProbedEngine()
    async with running(engine, batch_priority_delay_ms=50, selftest_interval_s=0.1) as api:
        engine.gate.clear()
        blocked = asyncio.create_task(ask(api, "blocker"))
        await until(engine.entered.is_set)
        late = asyncio.create_task(
            api.classify({"input": "late", "model": "topics"}, X_Request_Timeout_Ms="300")
        )
        patient = asyncio.create_task(ask(api, "patient", "batch"))
        await until(lambda: api.service.lifecycle.batcher.num_waiting == 2)
        before = time.time()
        monkeypatch.setattr(time, "time", lambda: before + jump_s)
        check_problem(await late, 504, "deadline_exceeded")  # when it was to be, not before
        tests = len(engine.tested)
        await until(lambda: len(engine.tested) >= tests + 2)
        assert await status(api) == 200
        engine.gate.set()
        assert await blocked == await patient == 200
        for loss in ("dead", "hung"):
            assert await api.metric("engine_restarts_total", reason=loss) == 0
        assert await ask(api, "x") == 200
        api.check_idle()


@async_test
async def test_supervision_wakes_twice_a_second_when_nothing_happens() -> None:
    async with running() as api:
        assert api.service.lifecycle._serving_run().tick_s == 0.5


@async_test
async def test_the_queue_is_shown_for_both_priorities_from_the_start() -> None:
    engine = FakeEngine()
    engine.load_gate.clear()
    async with running(engine, wait=False, max_batch_rows=1) as api:
        registry = api.service.telemetry.registry
        for family in ("depth", "tokens"):
            for priority in ("interactive", "batch"):
                name = f"dalorra_queue_{family}"
                assert registry.get_sample_value(name, {"priority": priority}) == 0
        engine.load_gate.set()
        await api.service.lifecycle.loaded()
        engine.gate.clear()
        tasks = [asyncio.create_task(ask(api, "blocker"))]
        await until(engine.entered.is_set)
        tasks += [
            asyncio.create_task(ask(api, "one two", priority))
            for priority in ("batch", "interactive", "batch")
        ]
        await until(lambda: api.service.lifecycle.batcher.num_waiting == 3)
        assert await api.metric("queue_depth", priority="batch") == 2
        assert await api.metric("queue_depth", priority="interactive") == 1
        assert await api.metric("queue_tokens", priority="batch") == 2 * 4 * 4
        assert await api.metric("queue_tokens", priority="interactive") == 4 * 4
        engine.gate.set()
        assert [await task for task in tasks] == [200] * 4
        await api.check_healthy()
