"""Which adapters are in memory: loads one at a time, makes room, unloads when nobody asks.

An adapter that was put out of memory stays known, and comes back when it is asked.
"""

import asyncio
import logging
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from server.adapters.faults import load_problem
from server.adapters.registry import AdapterRegistry
from server.adapters.slots import Slot
from server.errors import ApiError
from server.lookup import require_policy
from server.ports import AdapterCard, AdapterLoadError, Engine
from server.telemetry import Telemetry

__all__ = ["Residency"]

logger = logging.getLogger(__name__)

MAX_WAITING_LOADS = 4
RETRY_S = 5


class Residency:
    """The memory side of the adapters; used on the event loop only, but for ``load_now``.

    Args:
        registry: The adapters.
        budget_bytes: What they may take together; None for no bound.
        locked_policy: Every adapter with policies must have one of this name.
        telemetry: Told about loads, evictions and unloads.
    """

    def __init__(
        self,
        registry: AdapterRegistry,
        budget_bytes: int | None,
        locked_policy: str | None,
        telemetry: Telemetry,
    ) -> None:
        self.budget_bytes = budget_bytes
        self._registry = registry
        self._locked_policy = locked_policy
        self._telemetry = telemetry
        self._engine: Engine | None = None
        self._threads: ThreadPoolExecutor | None = None
        self._turn = asyncio.Lock()
        self._waiting = 0
        self._coming_back: dict[Slot, asyncio.Task[None]] = {}
        self._background: set[asyncio.Future[None]] = set()
        self._loading: asyncio.Future[AdapterCard] | None = None
        self._under_way: set[Future[AdapterCard]] = set()  # with those that hang in a lost engine

    @property
    def used_bytes(self) -> int:
        """What the adapters in memory take."""
        return _bytes_of({slot for slot in self._registry.slots if slot.resident})

    @property
    def loading(self) -> bool:
        """Whether a thread is still loading an adapter, into this engine or into a lost one."""
        return any(not load.done() for load in tuple(self._under_way))

    @property
    def engine(self) -> Engine:
        """The engine that adapters are loaded into.

        Raises:
            ApiError: 503 while there is none.
        """
        if self._engine is None:
            retry = {"Retry-After": str(RETRY_S)}
            raise ApiError("engine_unavailable", "the engine is not running", headers=retry)
        return self._engine

    def attach(self, engine: Engine) -> None:
        """Use this engine, with a thread of its own: one of the last engine's may hang."""
        self._engine = engine
        self._threads = ThreadPoolExecutor(1, thread_name_prefix="dalorra-adapters")

    def detach(self) -> None:
        """Let go of the engine; whoever waits for a load into it is told at once.

        That load may hang with the engine, and nobody on the next one should wait for it.
        """
        self._engine = None
        if self._loading is not None:
            self._loading.cancel()
        if self._threads is not None:
            self._threads.shutdown(wait=False, cancel_futures=True)
            self._threads = None

    def load_now(self, engine: Engine, directory: Path, name: str | None) -> AdapterCard:
        """Load an adapter in this thread, which may be any.

        Raises:
            AdapterLoadError: It cannot be served here.
        """
        try:
            card = engine.load_adapter(directory, name)
            try:
                require_policy((card,), self._locked_policy)
            except ValueError as error:
                engine.unload_adapter(card.key)
                raise AdapterLoadError(str(error)) from None
        except AdapterLoadError as error:
            self.not_loaded(directory.name, str(error))
            raise
        logger.info("adapter loaded", extra={"adapter": f"{card.name}:{card.revision}"})
        return card

    def not_loaded(self, source: str, reason: str) -> None:
        """Log and count an adapter that cannot be served."""
        self._telemetry.load_failed()
        logger.error("adapter not loaded", extra={"source": source, "reason": reason})

    async def load(self, directory: Path, name: str | None) -> AdapterCard:
        """Load an adapter beside running traffic.

        Raises:
            ApiError: It cannot be served, too many loads wait, or the engine was lost meanwhile.
        """
        if self._waiting >= MAX_WAITING_LOADS:
            raise ApiError(
                "queue_full",
                f"at most {MAX_WAITING_LOADS} loads of adapters wait at a time",
                errors=({"code": "loads", "limit": MAX_WAITING_LOADS},),
                headers={"Retry-After": str(RETRY_S)},
            )
        self._waiting += 1
        try:
            async with self._turn:
                engine, began_s = self.engine, time.monotonic()
                card = await self._in_thread(lambda: self.load_now(engine, directory, name))
        except AdapterLoadError as error:
            raise load_problem(error) from None
        finally:
            self._waiting -= 1
        if engine is not self._engine:
            raise _lost_meanwhile()
        self._telemetry.adapters_loaded((card,), time.monotonic() - began_s)
        return card

    async def bring_back(self, slot: Slot, directory: Path) -> None:
        """Load an adapter that was put out of memory; those who ask at the same time share it.

        It is loaded to the end, and room is made for it, even when all of them leave meanwhile.

        Raises:
            ApiError: It cannot be loaded any more, its directory holds another revision now, or
                there is no room.
        """
        if slot.resident:  # another request was faster
            return
        task = self._coming_back.get(slot)
        if task is None:
            task = self._coming_back[slot] = asyncio.ensure_future(self._reload(slot, directory))
            task.add_done_callback(lambda _: self._coming_back.pop(slot, None))
        await asyncio.shield(task)

    async def _reload(self, slot: Slot, directory: Path) -> None:
        card = await self.load(directory, slot.name)
        if card.revision != slot.revision:
            self._forget(card)
            raise ApiError(
                "model_not_found",
                f"adapter {slot.id} was put out of memory, and its directory holds revision "
                f"{card.revision} now; load it again",
                errors=({"pointer": "#/model", "code": "revision_changed"},),
            )
        slot.came_back(card)
        if slot.retired and not slot.leases:  # it was unloaded meanwhile, and nobody waited
            self.unload(slot)
        else:
            self.make_room(slot)

    def make_room(self, keep: Slot, leaving: frozenset[Slot] = frozenset()) -> None:
        """Put adapters out of memory until the budget holds, the one unused for longest first.

        Args:
            keep: The one that room is made for; it need not be in the registry yet.
            leaving: Those that leave as soon as it is there.

        Raises:
            ApiError: 409 when too much is pinned or in use; ``keep`` is then out of memory, and
                nothing else.
        """
        budget = self.budget_bytes
        if budget is None:
            return
        staying = {slot for slot in self._registry.slots if slot.resident} - leaving | {keep}
        idle = {slot for slot in staying if _may_go(slot)} - {keep}
        if (least := _bytes_of(staying - idle)) > budget:
            self.unload(keep)
            raise ApiError(
                "no_room",
                f"with adapter {keep.id} ({keep.card.memory_bytes} bytes) the adapters would take "
                f"{least} bytes; the limit adapter_memory_mb is {budget} bytes, and every other "
                "adapter in memory then is pinned or in use",
                errors=({"limit": budget, "actual": least},),
            )
        for oldest in sorted(idle, key=lambda slot: slot.used_s):
            if _bytes_of(staying) <= budget:
                break
            self.unload(oldest)
            staying.remove(oldest)
            self._telemetry.adapter_evicted()
            logger.info("adapter put out of memory", extra={"adapter": oldest.id})

    def unload(self, slot: Slot) -> None:
        """Put an adapter out of memory."""
        if slot.resident:
            slot.resident = False
            self._forget(slot.card)

    def _forget(self, card: AdapterCard) -> None:
        same = [slot for slot in self._registry.slots if slot.resident and _is_same(slot, card)]
        if not same:  # else the series belong to a newer load of the same tensors
            self._telemetry.adapters_unloaded((card,))
        engine, threads = self._engine, self._threads
        if engine is not None and threads is not None:
            # the engine may be in a forward pass that it must not be disturbed in
            loop = asyncio.get_running_loop()
            done = loop.run_in_executor(threads, engine.unload_adapter, card.key)
            self._background.add(done)
            done.add_done_callback(self._background.discard)

    async def _in_thread(self, work: Callable[[], AdapterCard]) -> AdapterCard:
        assert self._threads is not None  # noqa: S101 - attach made it together with the engine
        under_way = self._threads.submit(work)
        self._under_way.add(under_way)
        under_way.add_done_callback(self._under_way.discard)
        loading = self._loading = asyncio.wrap_future(under_way)
        await asyncio.wait({loading})
        if loading.cancelled():  # by detach
            raise _lost_meanwhile()
        return loading.result()


def _lost_meanwhile() -> ApiError:
    return ApiError(
        "engine_unavailable",
        "the engine was restarted while the adapter was loaded; load it again",
        headers={"Retry-After": str(RETRY_S)},
    )


def _bytes_of(slots: set[Slot]) -> int:
    return sum(slot.card.memory_bytes for slot in slots)


def _may_go(slot: Slot) -> bool:
    return not slot.pinned and not slot.leases


def _is_same(slot: Slot, card: AdapterCard) -> bool:
    """Whether another load of the same adapter is in this slot."""
    return (slot.name, slot.revision) == (card.name, card.revision) and slot.card is not card
