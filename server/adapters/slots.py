"""One adapter that this server knows: in memory, or put out of it until it is asked again."""

import time
from dataclasses import dataclass, field

from server.ports import AdapterCard

__all__ = ["Slot"]


@dataclass(eq=False, slots=True)
class Slot:
    """An adapter and what the server knows about its use; changed on the event loop only.

    Attributes:
        card: What the engine said when it was last loaded.
        source: Name of its directory under the adapter root; None for one given at start.
        pinned: Whether it stays in memory however long nobody asks.
        resident: Whether it is in memory.
        retired: Whether it has left the registry; it is unloaded when the last lease ends.
        leases: Requests that it is answering.
        loaded_at: When it was last loaded, in seconds since 1970.
        used_s: When it was last asked, in seconds on the monotonic clock.
    """

    card: AdapterCard
    source: str | None = None
    pinned: bool = False
    resident: bool = True
    retired: bool = False
    leases: int = 0
    loaded_at: int = field(default_factory=lambda: int(time.time()))
    used_s: float = field(default_factory=time.monotonic)

    @property
    def name(self) -> str:
        """Name by which requests address it."""
        return self.card.name

    @property
    def revision(self) -> str:
        """Revision of its tensors."""
        return self.card.revision

    @property
    def id(self) -> str:
        """``name:revision``."""
        return f"{self.card.name}:{self.card.revision}"

    def came_back(self, card: AdapterCard) -> None:
        """Take note that it was loaded again."""
        self.card = card
        self.resident = True
        self.loaded_at = int(time.time())
        self.used_s = time.monotonic()
