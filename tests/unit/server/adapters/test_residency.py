"""Loads that are left alone, loads that hang, and the memory that they must not leave behind."""

import asyncio
import contextlib
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from server.adapters import Alias, SavedState, Target
from server.adapters.saved import SavedAdapter
from server.errors import ApiError
from server.ports import AdapterCard, AdapterLoadError
from tests.support.adapter_bench import MIB, V1, V2, V3, Bench
from tests.support.api import async_test, until
from tests.support.fake_engine import QUIZ


def saved(
    source: str, card: AdapterCard, *, pinned: bool = False, current: bool = True
) -> SavedAdapter:
    who = {"name": card.name, "revision": card.revision, "source": source}
    return SavedAdapter(**who, pinned=pinned, current=current)


async def with_a_put_out(tmp_path: Path) -> Bench:
    """Return a bench with room for one: ``a`` is put out of memory, ``b`` is in it."""
    bench = Bench(tmp_path, adapter_memory_mb=1).start()
    await bench.load("v1", "a")
    await bench.load("v2", "b")
    await bench.settled()
    return bench


async def asked_and_left(bench: Bench, model: str) -> None:
    """Ask an adapter that is out of memory, and leave while it is being loaded."""
    bench.engine.load_gate.clear()

    async def ask() -> None:
        async with bench.manager.lease(model, "id"):
            raise AssertionError

    asking = asyncio.create_task(ask())
    await until(lambda: bench.manager.residency._waiting == 1)
    asking.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await asking


@async_test
async def test_the_budget_holds_when_nobody_waits_for_what_was_brought_back(
    tmp_path: Path,
) -> None:
    bench = await with_a_put_out(tmp_path)
    await asked_and_left(bench, "a")
    bench.engine.load_gate.set()
    await until(lambda: bench.manager.residency._waiting == 0)
    await bench.settled()
    assert bench.manager.residency.used_bytes <= MIB


@async_test
async def test_an_adapter_that_is_unloaded_while_it_comes_back_leaves_nothing(
    tmp_path: Path,
) -> None:
    bench = await with_a_put_out(tmp_path)
    await asked_and_left(bench, "a")
    bench.manager.unload("a")
    bench.engine.load_gate.set()
    await until(lambda: bench.manager.residency._waiting == 0)
    await bench.settled()
    assert bench.in_memory == {f"b:{V2.revision}"}
    shown = {"adapter": "a", "revision": V1.revision}
    assert bench.metric("adapter_memory_bytes", **shown) is None


@async_test
async def test_a_load_that_hangs_with_its_engine_holds_up_none_on_the_next(
    tmp_path: Path,
) -> None:
    bench = Bench(tmp_path).start()
    hung = bench.engine
    hung.load_gate.clear()
    loading = asyncio.create_task(bench.load("v1"))
    await until(lambda: bench.manager.residency._waiting == 1)
    await asyncio.sleep(0)
    bench.manager.detach()
    bench.engine = bench.new_engine()
    bench.manager.attach(bench.engine, ())
    try:
        with pytest.raises(ApiError) as caught:
            await asyncio.wait_for(loading, 5)
        assert caught.value.code == "engine_unavailable"
        assert await asyncio.wait_for(bench.load("v2"), 5) == f"topics:{V2.revision}"
    finally:
        hung.load_gate.set()


@async_test
async def test_a_load_that_has_not_begun_when_the_engine_is_lost_says_so(tmp_path: Path) -> None:
    bench = Bench(tmp_path).start()
    busy, free = threading.Event(), threading.Event()

    def block() -> None:
        busy.set()
        free.wait(10)

    threads = bench.manager.residency._threads
    assert threads is not None
    threads.submit(block)
    loading = asyncio.create_task(bench.load("v1"))
    await until(lambda: busy.is_set() and bench.manager.residency._waiting == 1)
    await asyncio.sleep(0)
    try:
        bench.manager.detach()
        with pytest.raises(ApiError) as caught:
            await loading
        assert caught.value.code == "engine_unavailable"
    finally:
        free.set()


@async_test
async def test_a_client_is_told_to_come_again_when_an_adapter_cannot_come_back(
    tmp_path: Path,
) -> None:
    """Its request is sound, and the administrator's business is not the client's."""
    bench = await with_a_put_out(tmp_path)
    bench.manager.pin("b", pinned=True)
    with pytest.raises(ApiError) as caught:
        async with bench.manager.lease("a", "id"):
            raise AssertionError
    assert (caught.value.status, caught.value.code) == (503, "engine_unavailable")
    assert "Retry-After" in caught.value.headers
    bench.manager.pin("b", pinned=False)
    (bench.root / "v1").rmdir()
    with pytest.raises(ApiError) as caught:
        async with bench.manager.lease("a", "id"):
            raise AssertionError
    assert (caught.value.status, caught.value.errors) == (503, ())


@async_test
async def test_an_adapter_given_at_start_stays_pinned(tmp_path: Path) -> None:
    """Put out of memory it could never come back: it has no directory under the root."""
    fixed = replace(QUIZ, memory_bytes=MIB)
    bench = Bench(tmp_path, fixed=[fixed], adapter_memory_mb=1).start()
    with pytest.raises(ApiError) as caught:
        bench.manager.pin("quiz", pinned=False)
    assert caught.value.status == 409
    with pytest.raises(ApiError, match="adapter_memory_mb"):
        await bench.load("v1")
    async with bench.manager.lease("quiz", "id") as lease:
        assert lease.card is fixed


@async_test
async def test_a_load_that_finds_no_room_puts_nobody_out(tmp_path: Path) -> None:
    bench = Bench(tmp_path, adapter_memory_mb=2).start()
    await bench.load("v1", "idle")
    await bench.load("v2", "fixed", pin=True)
    bench.engine.library["v3"] = replace(V3, memory_bytes=2 * MIB)
    with pytest.raises(ApiError, match="the adapters would take 3145728 bytes") as caught:
        await bench.load("v3", "large")
    assert caught.value.code == "no_room"
    assert bench.manager.num_evicted == 0
    await bench.settled()


# -- what is loaded into a new engine -------------------------------------------------------------


@async_test
async def test_the_budget_holds_at_start_too(tmp_path: Path) -> None:
    state = SavedState(
        adapters=(
            saved("v1", V1, current=False),
            saved("v2", V2, current=False),
            saved("v3", V3, pinned=True),
        )
    )
    bench = Bench(tmp_path, adapter_memory_mb=2).start(state)
    assert len(bench.ids) == 3
    assert bench.manager.residency.used_bytes <= 2 * MIB
    assert bench.manager.registry.find("topics").resident
    await bench.settled()
    async with bench.manager.lease(f"topics:{V2.revision}", "id") as lease:
        assert lease.card.revision == V2.revision
    bench = Bench(tmp_path / "all", adapter_memory_mb=2)
    bench.manager.attach(bench.engine, ())
    assert (bench.manager.num_resident, bench.manager.num_evicted) == (2, 2)
    await bench.settled()


@async_test
async def test_what_is_saved_twice_is_in_memory_once(tmp_path: Path) -> None:
    """As when a directory's content was replaced and loaded again beside a pinned revision."""
    state = SavedState(adapters=(saved("v2", V1, pinned=True, current=False), saved("v2", V2)))
    bench = Bench(tmp_path).start(state)
    assert bench.ids == [f"topics:{V2.revision}"]
    assert len(bench.engine.cards) == 1


@async_test
async def test_a_name_that_meant_nothing_means_nothing_after_a_restart(tmp_path: Path) -> None:
    bench = Bench(tmp_path).start()
    await bench.load("v1", pin=True)
    await bench.load("v2")
    bench.manager.unload("topics")
    assert await bench.manager.save()
    again = Bench(tmp_path)
    again.manager.attach(again.engine, ())
    for one in (bench, again):
        assert one.ids == [f"topics:{V1.revision}"]
        with pytest.raises(ApiError) as caught:
            one.manager.registry.find("topics")
        assert caught.value.code == "model_not_found"


@async_test
async def test_an_adapter_that_fails_at_a_restart_of_the_engine_is_tried_again(
    tmp_path: Path,
) -> None:
    """A lost device takes a while to have room again, and a share to be mounted again."""
    bench = Bench(tmp_path).start()
    await bench.load("v1", pin=True)
    bench.manager.set_alias(Alias("topics@prod", (Target("topics"),)))
    bench.manager.detach()
    bench.engine = bench.new_engine()

    def fault(_: str) -> None:
        raise AdapterLoadError("it does not fit into memory")

    bench.engine.adapter_fault = fault
    bench.manager.attach(bench.engine, ())
    assert bench.manager.num_resident == 0
    bench.engine.adapter_fault = lambda _: None
    async with bench.manager.lease("topics@prod", "id") as lease:
        assert lease.card.revision == V1.revision
    assert bench.manager.registry.find("topics").pinned


# -- what is saved --------------------------------------------------------------------------------


@async_test
async def test_changes_in_quick_succession_are_saved_in_their_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = Bench(tmp_path).start()
    await bench.load("v1")
    state_path = tmp_path / "state" / "adapters.json"
    write, first = SavedState.write, threading.Event()
    begun: list[bool] = []

    def slow_at_first(state: SavedState, path: Path) -> None:
        begun.append(True)
        if len(begun) == 1:
            first.wait(1)  # as on a busy disk
        write(state, path)

    monkeypatch.setattr(SavedState, "write", slow_at_first)
    saves = [asyncio.create_task(bench.manager.save())]
    await until(lambda: bool(begun))
    bench.manager.unload("topics")
    saves.append(asyncio.create_task(bench.manager.save()))
    await asyncio.wait(saves, return_when=asyncio.FIRST_COMPLETED)
    first.set()
    assert await asyncio.gather(*saves) == [True, True]
    found = SavedState.read(state_path)
    assert found is not None
    assert found.adapters == ()


@async_test
async def test_a_root_that_is_gone_is_told(tmp_path: Path) -> None:
    bench = Bench(tmp_path).start()
    for name in bench.library:
        (bench.root / name).rmdir()
    bench.root.rmdir()
    with pytest.raises(ApiError) as caught:
        await bench.load("v1")
    assert caught.value.code == "source_not_found"
    assert await bench.manager.stored() == []
