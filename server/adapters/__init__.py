"""Adapters at run time: which are loaded, under which names, from where, and who may stay."""

from server.adapters.aliases import Alias, ShadowTarget, Target
from server.adapters.manager import AdapterManager, Lease
from server.adapters.registry import AdapterRegistry
from server.adapters.saved import SavedState, SavedStateError
from server.adapters.slots import Slot
from server.adapters.sources import NAME_PATTERN, AdapterRoot

__all__ = [
    "NAME_PATTERN",
    "AdapterManager",
    "AdapterRegistry",
    "AdapterRoot",
    "Alias",
    "Lease",
    "SavedState",
    "SavedStateError",
    "ShadowTarget",
    "Slot",
    "Target",
]
