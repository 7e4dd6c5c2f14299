"""The adapters of one server: who answers a request, and what administrators may change.

Everything an administrator does is staged: an adapter is verified, loaded, warmed and tested before
a request can reach it, and it leaves memory only after the last request that it answers.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

from server.adapters.aliases import Alias
from server.adapters.arrival import Arrival
from server.adapters.faults import not_back
from server.adapters.registry import AdapterRegistry
from server.adapters.residency import Residency
from server.adapters.saved import SavedState
from server.adapters.slots import Slot
from server.adapters.sources import AdapterRoot
from server.errors import ApiError
from server.ports import AdapterCard, Engine, StoredAdapter
from server.settings import Settings
from server.telemetry import Telemetry

__all__ = ["AdapterManager", "Lease", "StoredSource"]

logger = logging.getLogger(__name__)

STATE_FILE = "adapters.json"


@dataclass(frozen=True, slots=True)
class Lease:
    """An adapter that stays in memory while a request needs it.

    Attributes:
        card: Who answers.
        engine: What it is loaded in.
        shadow: ``name`` or ``name:revision`` of who answers besides; None for nobody.
    """

    card: AdapterCard
    engine: Engine
    shadow: str | None = None


@dataclass(frozen=True, slots=True)
class StoredSource:
    """A directory under the adapter root and what lies in it."""

    source: str
    stored: StoredAdapter


class AdapterManager:
    """See the module. ``attach`` runs in a loading thread, all else on the event loop.

    Attributes:
        registry: What is known by which name.
        root: Where adapters may be loaded from; None when the adapters are fixed.
    """

    def __init__(self, settings: Settings, telemetry: Telemetry) -> None:
        self.registry = AdapterRegistry()
        self.root = AdapterRoot(settings.adapter_root) if settings.adapter_root else None
        budget_mb = settings.adapter_memory_mb
        self.residency = Residency(
            self.registry,
            None if budget_mb is None else budget_mb * 2**20,
            settings.locked_policy,
            telemetry,
        )
        self._telemetry = telemetry
        self._saving = asyncio.Lock()  # so that what was saved last is what holds
        self._state_path = _state_path(settings) if self.root else None
        self._arrival = Arrival(
            self.registry, self.residency, self.root, self._state_path, settings.locked_policy
        )
        telemetry.watch_adapters(lambda: self.num_resident, lambda: self.num_evicted)

    # -- questions ----------------------------------------------------------------------------

    @property
    def resident(self) -> tuple[AdapterCard, ...]:
        """The adapters that can answer now."""
        return tuple(slot.card for slot in self.registry.slots if slot.resident)

    @property
    def num_resident(self) -> int:
        """How many adapters are in memory."""
        return len(self.resident)

    @property
    def num_evicted(self) -> int:
        """How many adapters are known and out of memory."""
        return len(self.registry.slots) - self.num_resident

    @property
    def loading(self) -> bool:
        """Whether a thread is still loading an adapter."""
        return self.residency.loading

    async def stored(self) -> list[StoredSource]:
        """Return every directory under the adapter root; none when there is no root to be read."""
        root = self.root
        if root is None:
            return []
        engine = self.residency.engine

        def read() -> list[StoredSource]:
            return [
                StoredSource(name, engine.stored_adapter(root.path(name))) for name in root.names()
            ]

        try:
            return await asyncio.to_thread(read)
        except OSError as error:
            logger.error(  # noqa: TRY400 - the reason says it all
                "adapter root cannot be read", extra={"reason": error.strerror}
            )
            return []

    @contextlib.asynccontextmanager
    async def lease(self, model: str | None, request_id: str) -> AsyncIterator[Lease]:
        """Keep the adapter that a request means in memory; load it again if it was put out.

        Raises:
            ApiError: 404 when there is no such adapter, 503 when it cannot be loaded again.
        """
        slot, shadow = self.registry.resolve(model, request_id)
        slot.leases += 1
        slot.used_s = time.monotonic()
        try:
            if not slot.resident:
                await self._bring_back(slot)
            yield Lease(slot.card, self.residency.engine, shadow)
        finally:
            slot.leases -= 1
            self._unload_if_retired(slot)

    # -- the engine comes and goes ------------------------------------------------------------

    def attach(self, engine: Engine, cards: tuple[AdapterCard, ...]) -> None:
        """Publish the engine's own adapters and load the others into it; slow, in any thread.

        Args:
            engine: It has loaded its own adapters.
            cards: Those.

        Raises:
            ValueError: An adapter given at start has policies and not the locked one.
            SavedStateError: What was saved cannot be read.
            AdapterLoadError: Nothing could be loaded from an adapter root that holds adapters.
        """
        self._arrival.fill(engine, cards)
        self.residency.attach(engine)

    def detach(self) -> None:
        """Take note that the engine is gone; what was in memory is loaded into the next one."""
        self.residency.detach()
        self._telemetry.engine_lost(self.resident)

    # -- what administrators may do -----------------------------------------------------------

    async def load(self, source: str, *, name: str | None, pin: bool, activate: bool) -> Slot:
        """Load an adapter and make it answerable; one of the same name makes way.

        The revision that the name meant before leaves, unless it is pinned or an alias names it.

        Raises:
            ApiError: 409 when the adapters are fixed or there is no room, else what is wrong.
        """
        if self.root is None:
            raise ApiError(
                "adapters_fixed", "the adapter of this server is fixed (adapter_root is not set)"
            )
        directory = await asyncio.to_thread(self.root.find, source)
        card = await self.residency.load(directory, name)
        slot = Slot(card, source=source, pinned=pin)
        leaving = self._makes_leave(slot, activate=activate)
        self.residency.make_room(slot, leaving)
        self.registry.publish(slot, activate=activate)
        for other in leaving:
            self._retire(other)
        return slot

    def unload(self, model: str) -> Slot:
        """Take an adapter out; requests that it is answering are finished first.

        Raises:
            ApiError: 404 when there is none, 409 when an alias names it or it was given at start.
        """
        slot = self.registry.find(model)
        if slot.source is None:
            raise _in_use(slot, "this server was started with it")
        if aliases := self.registry.aliases_of(slot):
            raise _in_use(slot, f"aliases name it: {', '.join(aliases)}")
        self._retire(slot)
        return slot

    def pin(self, model: str, *, pinned: bool) -> Slot:
        """Let an adapter stay in memory, or let it go when room is needed.

        Raises:
            ApiError: 404 when there is none, 409 for letting one go that was given at start.
        """
        slot = self.registry.find(model)
        if slot.source is None and not pinned:
            raise ApiError(
                "adapter_in_use",
                f"adapter {slot.id} stays pinned: this server was started with it",
            )
        slot.pinned = pinned
        return slot

    def set_alias(self, alias: Alias) -> bool:
        """Let a name stand for adapters; return whether it is a new one.

        Raises:
            ApiError: 404 for an unknown adapter, 422 when they do not answer the same questions.
        """
        slots = [self.registry.find(model) for model in alias.models]
        first = slots[0].card
        for slot in slots[1:]:
            if slot.card.kind != first.kind or set(slot.card.labels) != set(first.labels):
                raise ApiError(
                    "invalid_request",
                    f"adapters of one alias must have the same labels; {slots[0].id} and "
                    f"{slot.id} do not",
                    errors=({"pointer": "#/targets", "code": "labels_differ"},),
                )
        return self.registry.set_alias(alias)

    def remove_alias(self, name: str) -> None:
        """Remove an alias.

        Raises:
            ApiError: 404 when there is none.
        """
        self.registry.remove_alias(self.registry.alias(name).name)

    async def save(self) -> bool:
        """Keep what administrators did for the next start; return whether that worked."""
        path = self._state_path
        if path is None:
            return False
        try:
            async with self._saving:
                await asyncio.to_thread(SavedState.of(self.registry).write, path)
        except OSError as error:
            logger.error(  # noqa: TRY400 - the reason says it all
                "adapters not saved", extra={"reason": error.strerror}
            )
            return False
        return True

    # -- inside -------------------------------------------------------------------------------

    async def _bring_back(self, slot: Slot) -> None:
        assert self.root is not None  # noqa: S101 - only adapters under the root are put out
        assert slot.source is not None  # noqa: S101
        try:
            directory = await asyncio.to_thread(self.root.find, slot.source)
            await self.residency.bring_back(slot, directory)
        except ApiError as error:
            raise not_back(slot.id, error) from None

    def _makes_leave(self, new: Slot, *, activate: bool) -> frozenset[Slot]:
        """Return whom a new adapter replaces: an older load of it, and whom its name meant."""
        return frozenset(
            slot
            for slot in self.registry.slots
            if slot.id == new.id
            or (
                activate
                and slot.name == new.name
                and self.registry.is_current(slot)
                and not slot.pinned
                and not any(slot.id in alias.models for alias in self.registry.aliases)
            )
        )

    def _retire(self, slot: Slot) -> None:
        self.registry.retire(slot)
        self._unload_if_retired(slot)

    def _unload_if_retired(self, slot: Slot) -> None:
        if slot.retired and not slot.leases:
            self.residency.unload(slot)


def _in_use(slot: Slot, reason: str) -> ApiError:
    return ApiError("adapter_in_use", f"adapter {slot.id} cannot be unloaded: {reason}")


def _state_path(settings: Settings) -> Path:
    return (settings.state_dir or Settings.default_state_dir()) / STATE_FILE
