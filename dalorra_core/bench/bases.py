"""The base model of a worker's runs: loaded once, with the states that its rows always have."""

from pathlib import Path
from typing import Literal

from dalorra_core.predictive.shared_base import SharedBase, identify
from dalorra_core.predictive.stem_shelf import StemShelf
from dalorra_core.training.settings import TrainConfig

__all__ = ["STEMS", "Bases"]

STEMS = "stems"
"""Folder of a bench with rows' states below the first adapted layer; may be deleted."""


class Bases:
    """Keeps the base model that was used last.

    Args:
        out: Directory of the bench.
    """

    def __init__(self, out: Path) -> None:
        self._shelf = out / STEMS
        self._kept: dict[tuple[str, ...], SharedBase] = {}

    def to_train(self, config: TrainConfig) -> SharedBase:
        """Return the base model as a run trains on it."""
        return self._of(config, config.run.attention)

    def to_serve(self, config: TrainConfig) -> SharedBase:
        """Return the base model as a server would have it."""
        return self._of(config, "sdpa")

    def _of(self, config: TrainConfig, attention: Literal["sdpa", "eager"]) -> SharedBase:
        key = (config.base, config.run.device, config.run.precision, attention)
        if key not in self._kept:
            self._kept.clear()  # two would be too many for a device
            base = SharedBase.load(
                identify(config.base),
                device=config.run.device,
                dtype=config.run.precision,
                attention=attention,
            )
            base.trunk.shelf = StemShelf(self._shelf, base.identity.fingerprint)
            self._kept[key] = base
        return self._kept[key]
