"""The manager on a fake engine: staged loads, replacement, eviction, aliases, a lost engine."""

import asyncio
import threading
from pathlib import Path

import pytest

from server.adapters import AdapterManager, Alias, Target
from server.errors import ApiError
from server.ports import (
    AdapterBaseMismatchError,
    AdapterCard,
    AdapterLoadError,
    AdapterSelfTestError,
    AdapterUntrustedError,
)
from server.settings import Settings
from server.telemetry import Telemetry
from tests.support.adapter_bench import MIB, V1, V2, V3, Bench
from tests.support.api import async_test, until
from tests.support.fake_engine import QUIZ, TOPICS, FakeEngine


@async_test
async def test_a_loaded_adapter_answers_by_its_name(tmp_path: Path) -> None:
    bench = Bench(tmp_path).start()
    assert await bench.load("v1") == "topics:3f9a00112233"
    async with bench.manager.lease("topics", "id") as lease:
        assert lease.card.revision == V1.revision
        assert lease.engine is bench.engine
    assert bench.metric("adapters", state="resident") == 1
    assert bench.metric("adapter_memory_bytes", adapter="topics", revision=V1.revision) == MIB


@async_test
async def test_an_adapter_can_be_served_under_another_name(tmp_path: Path) -> None:
    bench = Bench(tmp_path).start()
    await bench.load("v1", "triage")
    with pytest.raises(ApiError):
        bench.manager.registry.find("topics")
    assert bench.manager.registry.find("triage").card.name == "triage"


@async_test
async def test_a_half_loaded_adapter_is_never_found(tmp_path: Path) -> None:
    bench = Bench(tmp_path).start()
    bench.engine.load_gate.clear()
    loading = asyncio.create_task(bench.load("v1"))
    await until(lambda: bench.manager.residency._waiting == 1)
    with pytest.raises(ApiError):
        bench.manager.registry.find("topics")
    bench.engine.load_gate.set()
    await loading
    assert bench.manager.registry.find("topics").resident


@async_test
async def test_replacing_an_adapter_lets_it_finish_what_it_answers(tmp_path: Path) -> None:
    bench = Bench(tmp_path).start()
    await bench.load("v1")
    async with bench.manager.lease("topics", "id") as lease:
        await bench.load("v2")
        assert bench.ids == [f"topics:{V2.revision}"]
        assert f"topics:{V1.revision}" in bench.in_memory  # it still answers the lease
        assert lease.card.revision == V1.revision
        async with bench.manager.lease("topics", "id") as newer:
            assert newer.card.revision == V2.revision
    await bench.settled()
    assert bench.in_memory == {f"topics:{V2.revision}"}
    assert bench.metric("adapter_info", **_info(V1)) is None


@async_test
async def test_loading_the_same_revision_again_keeps_its_series(tmp_path: Path) -> None:
    """As after a recalibration: same tensors, another manifest."""
    bench = Bench(tmp_path).start()
    await bench.load("v1")
    await bench.load("v1")
    await bench.settled()
    assert len(bench.engine.cards) == 1
    assert bench.metric("adapter_info", **_info(V1)) == 1


@async_test
async def test_not_activating_leaves_the_bare_name_alone(tmp_path: Path) -> None:
    bench = Bench(tmp_path).start()
    await bench.load("v1")
    await bench.load("v2", activate=False)
    assert bench.manager.registry.find("topics").revision == V1.revision
    assert bench.manager.registry.find(f"topics:{V2.revision}").revision == V2.revision


@async_test
async def test_a_pinned_or_aliased_revision_outlives_its_replacement(tmp_path: Path) -> None:
    bench = Bench(tmp_path).start()
    await bench.load("v1", pin=True)
    await bench.load("v2")
    bench.manager.set_alias(Alias("topics@canary", (Target(f"topics:{V2.revision}"),)))
    await bench.load("v3")
    assert {slot.revision for slot in bench.manager.registry.slots} == {
        V1.revision,
        V2.revision,
        V3.revision,
    }


@async_test
async def test_an_adapter_that_an_alias_names_is_not_unloaded(tmp_path: Path) -> None:
    bench = Bench(tmp_path).start()
    await bench.load("v1")
    bench.manager.set_alias(Alias("topics@prod", (Target("topics"),)))
    with pytest.raises(ApiError, match="topics@prod") as caught:
        bench.manager.unload("topics")
    assert caught.value.status == 409
    bench.manager.remove_alias("topics@prod")
    bench.manager.unload("topics")
    await bench.settled()
    assert bench.engine.cards == {}


@async_test
async def test_the_adapter_given_at_start_is_not_unloaded(tmp_path: Path) -> None:
    bench = Bench(tmp_path, fixed=[QUIZ]).start()
    with pytest.raises(ApiError, match="started with it"):
        bench.manager.unload("quiz")


@async_test
async def test_without_a_root_the_adapters_are_fixed(tmp_path: Path) -> None:
    settings = Settings(state_dir=tmp_path)
    manager = AdapterManager(settings, Telemetry())
    manager.attach(FakeEngine(), (TOPICS,))
    with pytest.raises(ApiError) as caught:
        await manager.load("v1", name=None, pin=False, activate=True)
    assert caught.value.code == "adapters_fixed"
    assert await manager.stored() == []
    assert await manager.save() is False


@async_test
async def test_aliases_join_only_adapters_with_the_same_labels(tmp_path: Path) -> None:
    bench = Bench(tmp_path).start()
    await bench.load("v1")
    await bench.load("other")
    with pytest.raises(ApiError, match="same labels"):
        bench.manager.set_alias(Alias("topics@prod", (Target("topics"), Target("other"))))
    with pytest.raises(ApiError) as caught:
        bench.manager.set_alias(Alias("topics@prod", (Target("nobody"),)))
    assert caught.value.status == 404


# -- memory -------------------------------------------------------------------------------------


@async_test
async def test_the_one_unused_for_longest_makes_room_and_comes_back_when_asked(
    tmp_path: Path,
) -> None:
    bench = Bench(tmp_path, adapter_memory_mb=2).start()
    await bench.load("v1", "a")
    await bench.load("v2", "b")
    async with bench.manager.lease("a", "id"):
        pass  # b is now unused for longer
    await bench.load("v3", "c")
    states = {slot.name: slot.resident for slot in bench.manager.registry.slots}
    assert states == {"a": True, "b": False, "c": True}
    assert bench.metric("adapter_evictions_total") == 1
    assert bench.metric("adapters", state="evicted") == 1
    async with bench.manager.lease("b", "id") as lease:
        assert lease.card.revision == V2.revision
        assert lease.card.key in bench.engine.cards
    states = {slot.name: slot.resident for slot in bench.manager.registry.slots}
    assert states == {"a": False, "b": True, "c": True}
    await bench.settled()


@async_test
async def test_many_who_ask_an_evicted_adapter_at_once_load_it_once(tmp_path: Path) -> None:
    bench = Bench(tmp_path, adapter_memory_mb=1).start()
    await bench.load("v1", "a")
    await bench.load("v2", "b")
    loads: list[str] = []
    bench.engine.adapter_fault = loads.append

    async def ask() -> str:
        async with bench.manager.lease("a", "id") as lease:
            return lease.card.key

    keys = await asyncio.gather(*(ask() for _ in range(20)))
    assert len(set(keys)) == 1
    assert loads == ["v1"]


@async_test
async def test_pinned_adapters_and_those_in_use_never_make_room(tmp_path: Path) -> None:
    bench = Bench(tmp_path, adapter_memory_mb=2).start()
    await bench.load("v1", "a", pin=True)
    await bench.load("v2", "b")
    async with bench.manager.lease("b", "id"):
        with pytest.raises(ApiError, match="adapter_memory_mb") as caught:
            await bench.load("v3", "c")
        assert caught.value.code == "no_room"
    await bench.settled()
    assert bench.ids == [f"a:{V1.revision}", f"b:{V2.revision}"]


@async_test
async def test_a_replacement_needs_no_room_beside_what_it_replaces(tmp_path: Path) -> None:
    bench = Bench(tmp_path, adapter_memory_mb=1).start()
    await bench.load("v1")
    await bench.load("v2")
    await bench.settled()
    assert bench.ids == [f"topics:{V2.revision}"]
    assert bench.metric("adapter_evictions_total") == 0


@async_test
async def test_an_adapter_whose_directory_changed_meanwhile_is_not_another(tmp_path: Path) -> None:
    bench = Bench(tmp_path, adapter_memory_mb=1).start()
    await bench.load("v1", "a")
    await bench.load("v2", "b")
    bench.engine.library["v1"] = V3
    with pytest.raises(ApiError, match="holds revision cccc00112233 now"):
        async with bench.manager.lease("a", "id"):
            raise AssertionError
    await until(lambda: f"a:{V3.revision}" not in bench.in_memory)


# -- what goes wrong ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "code", "status"),
    [
        (AdapterLoadError("a byte has changed"), "adapter_invalid", 422),
        (AdapterUntrustedError("not signed"), "adapter_untrusted", 422),
        (AdapterSelfTestError("off by 0.3"), "self_test_failed", 422),
        (AdapterBaseMismatchError("another base", expected="f1", found="f2"), "base_mismatch", 409),
    ],
)
def test_a_failed_load_leaves_everything_as_it_was(
    tmp_path: Path, error: Exception, code: str, status: int
) -> None:
    @async_test
    async def run() -> None:
        bench = Bench(tmp_path).start()
        await bench.load("v1")

        def fault(_: str) -> None:
            raise error

        bench.engine.adapter_fault = fault
        with pytest.raises(ApiError) as caught:
            await bench.load("v2")
        assert (caught.value.code, caught.value.status) == (code, status)
        if code == "base_mismatch":
            assert caught.value.errors[0]["expected"] == "f1"
            assert caught.value.errors[0]["found"] == "f2"
        assert bench.ids == [f"topics:{V1.revision}"]
        assert bench.metric("adapter_load_failures_total") == 1
        bench.engine.adapter_fault = lambda _: None
        assert await bench.load("v2") == f"topics:{V2.revision}"

    run()


@async_test
async def test_a_locked_policy_is_demanded_of_adapters_that_come_later(tmp_path: Path) -> None:
    bench = Bench(tmp_path, locked_policy="strict").start()
    with pytest.raises(ApiError, match="no policy of that name") as caught:
        await bench.load("v1")
    assert caught.value.code == "adapter_invalid"
    assert bench.engine.cards == {}


@async_test
async def test_loads_wait_in_a_short_line(tmp_path: Path) -> None:
    bench = Bench(tmp_path).start()
    bench.engine.load_gate.clear()
    loads = [asyncio.create_task(bench.load("v1", f"n{n}")) for n in range(4)]
    await until(lambda: bench.manager.residency._waiting == 4)
    with pytest.raises(ApiError) as caught:
        await bench.load("v1", "n4")
    assert caught.value.status == 429
    assert "Retry-After" in caught.value.headers
    bench.engine.load_gate.set()
    await asyncio.gather(*loads)
    assert len(bench.ids) == 4


# -- the engine is lost -------------------------------------------------------------------------


@async_test
async def test_a_new_engine_gets_what_was_in_memory(tmp_path: Path) -> None:
    bench = Bench(tmp_path, fixed=[QUIZ], adapter_memory_mb=2).start()
    await bench.load("v1", "a")
    await bench.load("v2", "b")
    await bench.load("v3", "c")  # puts a out
    bench.manager.detach()
    with pytest.raises(ApiError) as caught:
        async with bench.manager.lease("b", "id"):
            raise AssertionError
    assert caught.value.code == "engine_unavailable"
    bench.engine = bench.new_engine()
    await asyncio.to_thread(bench.manager.attach, bench.engine, bench.fixed)
    await bench.settled()
    assert {slot.name: slot.resident for slot in bench.manager.registry.slots} == {
        "a": False,
        "b": True,
        "c": True,
        "quiz": True,
    }
    async with bench.manager.lease("a", "id") as lease:
        assert lease.engine is bench.engine


@async_test
async def test_an_adapter_that_is_gone_by_then_is_out_of_memory(tmp_path: Path) -> None:
    bench = Bench(tmp_path).start()
    await bench.load("v1", "a")
    await bench.load("v2", "b")
    del bench.library["v1"]
    bench.manager.detach()
    bench.engine = bench.new_engine()
    bench.manager.attach(bench.engine, ())
    await bench.settled()
    assert bench.in_memory == {f"b:{V2.revision}"}
    assert bench.metric("adapters", state="evicted") == 1
    with pytest.raises(ApiError, match="cannot be loaded again now"):
        async with bench.manager.lease("a", "id"):
            raise AssertionError


@async_test
async def test_a_load_that_outlives_its_engine_says_so(tmp_path: Path) -> None:
    bench = Bench(tmp_path).start()
    old = bench.engine
    old.load_gate.clear()
    loading = asyncio.create_task(bench.load("v1"))
    await until(lambda: bench.manager.residency._waiting == 1)
    await asyncio.sleep(0)
    entered = threading.Event()
    old.adapter_fault = lambda _: entered.set()
    bench.manager.detach()
    bench.engine = bench.new_engine()
    bench.manager.attach(bench.engine, ())
    old.load_gate.set()
    with pytest.raises(ApiError):
        await loading
    assert bench.ids == []


# -- restarts of the process --------------------------------------------------------------------


@async_test
async def test_a_restart_repeats_what_administrators_did(tmp_path: Path) -> None:
    first = Bench(tmp_path).start()
    await first.load("v1", pin=True)
    await first.load("v2")
    first.manager.set_alias(Alias("topics@prod", (Target(f"topics:{V1.revision}", 2.0),)))
    assert await first.manager.save()

    second = Bench(tmp_path)
    second.manager.attach(second.engine, ())
    assert second.ids == first.ids
    assert second.manager.registry.find("topics").revision == V2.revision
    assert second.manager.registry.find(f"topics:{V1.revision}").pinned
    assert second.manager.registry.aliases == first.manager.registry.aliases


@async_test
async def test_without_saved_state_everything_under_the_root_is_loaded(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    del bench.engine.library["v3"]  # one that cannot be read is left out, and counted
    bench.manager.attach(bench.engine, ())
    assert {slot.name for slot in bench.manager.registry.slots} == {"topics", "other"}
    assert bench.metric("adapter_load_failures_total") == 1
    stored = {one.source: one.stored.problem for one in await bench.manager.stored()}
    assert stored == {"other": None, "v1": None, "v2": None, "v3": "no manifest.json"}


@async_test
async def test_a_root_where_nothing_can_be_loaded_fails_the_start(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    bench.engine.library.clear()
    with pytest.raises(AdapterLoadError, match="none of the 4 directories"):
        bench.manager.attach(bench.engine, ())


@async_test
async def test_state_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    bench = Bench(tmp_path).start()
    (tmp_path / "state" / "adapters.json").unlink()
    (tmp_path / "state").rmdir()
    (tmp_path / "state").write_text("a file where the directory was")
    await bench.load("v1")
    assert await bench.manager.save() is False


def _info(card: AdapterCard) -> dict[str, str]:
    return {
        "adapter": card.name,
        "revision": card.revision,
        "base": card.base,
        "mask_set": card.mask_set or "none",
        "rank": str(card.rank),
        "signed": "no",
    }
