"""Names -> adapters: revisions, which of them a bare name means, and aliases.

A name that is not there is an error, never another adapter and never the bare base model.
"""

from collections.abc import Iterable

from server.adapters.aliases import Alias
from server.adapters.slots import Slot
from server.errors import ApiError
from server.lookup import close_names, quoted
from server.ports import AdapterCard

__all__ = ["AdapterRegistry"]


class AdapterRegistry:
    """Every adapter this server knows, in memory or not; changed on the event loop only."""

    def __init__(self) -> None:
        self._slots: dict[tuple[str, str], Slot] = {}
        self._current: dict[str, str] = {}
        self._aliases: dict[str, Alias] = {}

    # -- questions ----------------------------------------------------------------------------

    @property
    def slots(self) -> tuple[Slot, ...]:
        """Every adapter, by name, the one that the bare name means first."""
        order = sorted(
            self._slots.values(),
            key=lambda slot: (slot.name, not self.is_current(slot), slot.revision),
        )
        return tuple(order)

    @property
    def cards(self) -> tuple[AdapterCard, ...]:
        """The cards of all of them, in the same order."""
        return tuple(slot.card for slot in self.slots)

    @property
    def aliases(self) -> tuple[Alias, ...]:
        """Every alias, by name."""
        return tuple(self._aliases[name] for name in sorted(self._aliases))

    def is_current(self, slot: Slot) -> bool:
        """Whether the bare name means this revision."""
        return self._current.get(slot.name) == slot.revision

    def aliases_of(self, slot: Slot) -> list[str]:
        """Return the aliases that name an adapter, by its revision or by its bare name."""
        meant = {slot.id, *([slot.name] if self.is_current(slot) else [])}
        return [alias.name for alias in self.aliases if meant & set(alias.models)]

    def alias(self, name: str) -> Alias:
        """Return an alias.

        Raises:
            ApiError: 404 with close names.
        """
        if (found := self._aliases.get(name)) is not None:
            return found
        close = close_names(name, self._aliases)
        advice = f"; close names: {', '.join(close)}" if close else ""
        raise ApiError("alias_not_found", f"there is no alias {quoted(name)}{advice}")

    def find(self, model: str | None) -> Slot:
        """Return the adapter that ``name`` or ``name:revision`` means; aliases are not looked at.

        Args:
            model: None when there is only one name to mean.

        Raises:
            ApiError: 404 with close names; 422 when the name is left out and several are loaded.
        """
        if model is None:
            return self._only()
        name, colon, revision = model.partition(":")
        slot = self._slots.get((name, revision if colon else self._current.get(name, "")))
        if slot is not None:
            return slot
        known = [other.id for other in self.slots if other.name == name]
        raise _unknown(model, known or close_names(model, [*self._current, *self._aliases]))

    def resolve(self, model: str | None, request_id: str) -> tuple[Slot, str | None]:
        """Return who answers a request, and who shadows it (None: nobody).

        Args:
            model: ``name``, ``name:revision`` or ``name@alias``; None when there is one name.
            request_id: Decides between the targets of an alias.

        Raises:
            ApiError: See ``find``.
        """
        alias = self._aliases.get(model) if model is not None else None
        if alias is None:
            return self.find(model), None
        return self.find(alias.pick(request_id)), alias.shadowed_by(request_id)

    def _only(self) -> Slot:
        if len(self._current) == 1:
            (item,) = self._current.items()
            return self._slots[item]
        if not self._current:
            raise ApiError("model_not_found", "no adapter is loaded")
        raise ApiError(
            "invalid_request",
            "model is required, because several adapters are loaded: "
            + ", ".join(sorted(self._current)),
            errors=({"pointer": "#/model", "code": "missing_field"},),
        )

    # -- changes ------------------------------------------------------------------------------

    def publish(self, slot: Slot, *, activate: bool = True) -> Slot | None:
        """Make an adapter answerable; return the one of the same revision that it replaces.

        Args:
            slot: The adapter.
            activate: Let its bare name mean it from now on; the first of a name is active anyway.
        """
        key = slot.name, slot.revision
        replaced = self._slots.get(key)
        self._slots[key] = slot
        if activate or slot.name not in self._current:
            self._current[slot.name] = slot.revision
        return replaced

    def retire(self, slot: Slot) -> None:
        """Take an adapter out; its bare name then means nothing, if it meant this one."""
        slot.retired = True
        if self._slots.get((slot.name, slot.revision)) is slot:
            del self._slots[slot.name, slot.revision]
            self.deactivate(slot)

    def deactivate(self, slot: Slot) -> None:
        """Let a bare name mean nothing, if it meant this adapter."""
        if self.is_current(slot):
            del self._current[slot.name]

    def clear(self) -> None:
        """Forget every adapter; aliases stay."""
        self._slots.clear()
        self._current.clear()

    def set_alias(self, alias: Alias) -> bool:
        """Let an alias mean what it says; return whether it is a new one."""
        new = alias.name not in self._aliases
        self._aliases[alias.name] = alias
        return new

    def remove_alias(self, name: str) -> None:
        """Remove an alias; an unknown one changes nothing."""
        self._aliases.pop(name, None)

    def set_aliases(self, aliases: Iterable[Alias]) -> None:
        """Replace all aliases."""
        self._aliases = {alias.name: alias for alias in aliases}


def _unknown(model: str, known: list[str]) -> ApiError:
    advice = f"; close names: {', '.join(known)}" if known else ""
    return ApiError(
        "model_not_found",
        f"no adapter {quoted(model)} is loaded{advice}",
        errors=({"pointer": "#/model", "close_names": known},),
    )
