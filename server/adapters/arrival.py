"""What is loaded into a new engine: at start, and again after the engine was lost."""

import logging
from pathlib import Path

from server.adapters.registry import AdapterRegistry
from server.adapters.residency import Residency
from server.adapters.saved import SavedState
from server.adapters.slots import Slot
from server.adapters.sources import AdapterRoot
from server.errors import ApiError
from server.lookup import require_policy
from server.ports import AdapterCard, AdapterLoadError, Engine

__all__ = ["Arrival"]

logger = logging.getLogger(__name__)


class Arrival:
    """Fills engines; used in one loading thread at a time, while nothing is answered.

    The first engine gets the adapters of the last run, or all under the adapter root when nothing
    was saved and no adapter was given at start; a later one those that were in memory.
    """

    def __init__(
        self,
        registry: AdapterRegistry,
        residency: Residency,
        root: AdapterRoot | None,
        state_path: Path | None,
        locked_policy: str | None,
    ) -> None:
        self._registry = registry
        self._residency = residency
        self._root = root
        self._state_path = state_path
        self._locked_policy = locked_policy
        self._filled_before = False

    def fill(self, engine: Engine, cards: tuple[AdapterCard, ...]) -> None:
        """Publish the engine's own adapters and load the others into it.

        Raises:
            ValueError: An adapter given at start has policies and not the locked one.
            SavedStateError: What was saved cannot be read.
            AdapterLoadError: Nothing could be loaded from an adapter root that holds adapters.
        """
        require_policy(cards, self._locked_policy)
        if self._filled_before:
            self._fill_again(engine, cards)
            return
        self._registry.clear()  # what an attempt that failed has left
        for card in cards:
            self._registry.publish(Slot(card, pinned=True))
        state = None if self._state_path is None else SavedState.read(self._state_path)
        if state is not None:
            self._load_saved(engine, state)
        elif self._root is not None and not cards:
            self._load_all(engine, self._root)
        self._filled_before = True

    def _load_saved(self, engine: Engine, state: SavedState) -> None:
        self._registry.set_aliases(saved.alias() for saved in state.aliases)
        # pinned ones first, so that the memory budget does not keep them out
        order = sorted(state.adapters, key=lambda saved: (not saved.pinned, not saved.current))
        for saved in order:
            slot = self._try(engine, saved.source, saved.name)
            if slot is None:
                continue
            slot.pinned = saved.pinned
            if slot.revision != saved.revision:
                logger.warning(
                    "adapter changed while the server was down",
                    extra={"adapter": slot.id, "saved_revision": saved.revision},
                )
            self._publish(engine, slot, activate=saved.current)
            if not saved.current:
                self._registry.deactivate(slot)  # the first of a name is active by itself

    def _load_all(self, engine: Engine, root: AdapterRoot) -> None:
        names = root.names()
        for name in names:
            if (slot := self._try(engine, name, None)) is not None:
                self._publish(engine, slot, activate=False)
        if names and not self._registry.slots:
            raise AdapterLoadError(
                f"none of the {len(names)} directories under adapter_root could be loaded; the "
                "log says why"
            )

    def _publish(self, engine: Engine, slot: Slot, *, activate: bool) -> None:
        """Make an adapter known, and put it out of memory again when there is no room for it."""
        replaced = self._registry.publish(slot, activate=activate)
        if replaced is not None and replaced.resident:
            engine.unload_adapter(replaced.card.key)
        budget = self._residency.budget_bytes
        if budget is not None and self._residency.used_bytes > budget and not slot.pinned:
            engine.unload_adapter(slot.card.key)
            slot.resident = False

    def _fill_again(self, engine: Engine, cards: tuple[AdapterCard, ...]) -> None:
        given = {(card.name, card.revision): card for card in cards}
        for slot in self._registry.slots:
            if slot.source is None:
                card = given.pop((slot.name, slot.revision), None)
                if card is None:  # its directory holds another revision now
                    self._registry.retire(slot)
                else:
                    slot.came_back(card)
            elif slot.resident:
                self._load_again(engine, slot, slot.source)
        known = {slot.name for slot in self._registry.slots}
        for card in given.values():
            if card.name in known:  # it was replaced at run time
                engine.unload_adapter(card.key)
            else:
                self._registry.publish(Slot(card, pinned=True))

    def _load_again(self, engine: Engine, slot: Slot, source: str) -> None:
        """Load what was in memory; what fails stays known, and is tried again when it is asked."""
        again = self._try(engine, source, slot.name)
        if again is not None and again.revision == slot.revision:
            slot.came_back(again.card)
            return
        slot.resident = False
        if again is not None:  # its directory holds another revision now
            engine.unload_adapter(again.card.key)

    def _try(self, engine: Engine, source: str, name: str | None) -> Slot | None:
        """Load an adapter; None when that fails, which is logged and counted."""
        assert self._root is not None  # noqa: S101 - only adapters under the root have a source
        try:
            directory = self._root.find(source)
            return Slot(self._residency.load_now(engine, directory, name), source=source)
        except AdapterLoadError:
            return None  # logged and counted where it was raised
        except ApiError as error:
            self._residency.not_loaded(source, error.detail)
            return None
