"""A manager of adapters on a fake engine, over a root of four directories."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from server.adapters import AdapterManager, SavedState
from server.ports import AdapterCard
from server.settings import Settings
from server.telemetry import Telemetry
from tests.support.api import until
from tests.support.fake_engine import TOPICS, FakeEngine

__all__ = ["MIB", "OTHER", "V1", "V2", "V3", "Bench"]

MIB = 2**20
V1 = replace(TOPICS, memory_bytes=MIB)
V2 = replace(V1, revision="bbbb00112233")
V3 = replace(V1, revision="cccc00112233")
OTHER = replace(V1, name="other", revision="dddd00112233", labels=("yes", "no"))


class Bench:
    """A manager over a root of four directories, on an engine without an adapter of its own."""

    def __init__(
        self, tmp_path: Path, fixed: Sequence[AdapterCard] = (), **settings: object
    ) -> None:
        self.root = tmp_path / "root"
        self.library = {"v1": V1, "v2": V2, "v3": V3, "other": OTHER}
        for name in self.library:
            (self.root / name).mkdir(parents=True, exist_ok=True)
        self.settings = Settings.model_validate(
            {"adapter_root": self.root, "state_dir": tmp_path / "state", **settings}
        )
        self.fixed = tuple(fixed)
        self.telemetry = Telemetry()
        self.manager = AdapterManager(self.settings, self.telemetry)
        self.engine = self.new_engine()

    def new_engine(self) -> FakeEngine:
        engine = FakeEngine()
        engine.cards = {card.key: card for card in self.fixed}
        engine.library = dict(self.library)
        return engine

    def start(self, state: SavedState | None = None) -> "Bench":
        (state or SavedState()).write(self.settings.state_dir / "adapters.json")  # type: ignore[operator]
        self.manager.attach(self.engine, self.fixed)
        return self

    async def load(self, source: str, name: str | None = None, **how: bool) -> str:
        flags = {"pin": False, "activate": True, **how}
        slot = await self.manager.load(
            source, name=name, pin=flags["pin"], activate=flags["activate"]
        )
        return slot.id

    @property
    def ids(self) -> list[str]:
        return [slot.id for slot in self.manager.registry.slots]

    @property
    def in_memory(self) -> set[str]:
        return {f"{card.name}:{card.revision}" for card in self.engine.cards.values()}

    async def settled(self) -> None:
        """Wait until the engine holds what the registry says is in memory, and no more."""
        await until(lambda: set(self.engine.cards) == {card.key for card in self.manager.resident})

    def metric(self, name: str, **labels: str) -> float | None:
        return self.telemetry.registry.get_sample_value(f"dalorra_{name}", labels)
