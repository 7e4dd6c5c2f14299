"""What administrators did at run time, kept in the state directory so that a restart repeats it."""

import json
import os
from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from server.adapters.aliases import Alias, ShadowTarget, Target
from server.adapters.registry import AdapterRegistry

__all__ = ["SavedAdapter", "SavedAlias", "SavedState", "SavedStateError", "SavedTarget"]


class SavedStateError(Exception):
    """The file exists and cannot be used; the text says which file and why."""


class _Saved(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class SavedAdapter(_Saved):
    """An adapter that was loaded from the adapter root."""

    name: str
    source: str
    revision: str
    pinned: bool
    current: bool


class SavedTarget(_Saved):
    """A target of an alias, or its shadow with ``weight`` as the share."""

    model: str
    weight: float = Field(gt=0, allow_inf_nan=False)


class SavedAlias(_Saved):
    """An alias."""

    name: str
    targets: tuple[SavedTarget, ...] = Field(min_length=1)
    shadow: SavedTarget | None = None

    def alias(self) -> Alias:
        """Return it as the registry's value."""
        targets = tuple(Target(target.model, target.weight) for target in self.targets)
        shadow = ShadowTarget(self.shadow.model, self.shadow.weight) if self.shadow else None
        return Alias(self.name, targets, shadow)


class SavedState(_Saved):
    """Everything that must be as it was after a restart."""

    version: Literal[1] = 1
    adapters: tuple[SavedAdapter, ...] = ()
    aliases: tuple[SavedAlias, ...] = ()

    @classmethod
    def of(cls, registry: AdapterRegistry) -> Self:
        """Return the state of a registry; adapters given at start are no part of it."""
        adapters = tuple(
            SavedAdapter(
                name=slot.name,
                source=slot.source,
                revision=slot.revision,
                pinned=slot.pinned,
                current=registry.is_current(slot),
            )
            for slot in registry.slots
            if slot.source is not None
        )
        aliases = tuple(
            SavedAlias(
                name=alias.name,
                targets=tuple(SavedTarget(model=t.model, weight=t.weight) for t in alias.targets),
                shadow=SavedTarget(model=alias.shadow.model, weight=alias.shadow.share)
                if alias.shadow
                else None,
            )
            for alias in registry.aliases
        )
        return cls(adapters=adapters, aliases=aliases)

    @classmethod
    def read(cls, path: Path) -> Self | None:
        """Return what was saved; None when nothing was.

        Raises:
            SavedStateError: The file cannot be read or is not what this program writes.
        """
        try:
            return cls.model_validate_json(path.read_bytes())
        except FileNotFoundError:
            return None
        except OSError as error:
            raise SavedStateError(f"{path} cannot be read: {error.strerror}") from None
        except ValidationError as error:
            fault = error.errors(include_url=False, include_input=False)[0]
            where = "/".join(str(part) for part in fault["loc"])
            raise SavedStateError(
                f"{path} is not a list of adapters: {where or 'the file'}: {fault['msg']}; "
                "remove it to start without what was loaded at run time"
            ) from None

    def write(self, path: Path) -> None:
        """Put the file in place whole or not at all.

        Raises:
            OSError: It cannot be written; the old one stays.
        """
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        draft = path.with_name(f".{path.name}.{os.getpid()}")
        with draft.open("w", encoding="utf-8") as file:
            try:
                json.dump(self.model_dump(mode="json"), file, indent=1)
                file.flush()
                os.fsync(file.fileno())
                draft.replace(path)
            except OSError:
                draft.unlink(missing_ok=True)
                raise
