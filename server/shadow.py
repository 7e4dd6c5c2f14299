"""Shadows: adapters that answer beside the one that was asked, unseen, so they can be compared.

A shadow never delays, fails or refuses the request that it follows: it runs afterwards, with the
priority of a batch, and is left out when there is no room.
"""

import asyncio
import logging
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any

from server.batching import QueueFullError
from server.errors import ApiError
from server.ports import AdapterCard
from server.telemetry import Telemetry

__all__ = ["Compared", "Shadows"]

logger = logging.getLogger(__name__)

MAX_RUNNING = 16


@dataclass(frozen=True, slots=True)
class Compared:
    """What two adapters are compared by: label and decision of every row."""

    card: AdapterCard
    labels: tuple[str, ...]
    decisions: tuple[str, ...]


class Shadows:
    """Runs shadows in the background, a bounded number at a time."""

    def __init__(self, telemetry: Telemetry) -> None:
        self._telemetry = telemetry
        self._running: set[asyncio.Task[None]] = set()

    @property
    def num_running(self) -> int:
        """Shadows that have not answered yet."""
        return len(self._running)

    def start(self, answered: Compared, ask: Callable[[], Coroutine[Any, Any, Compared]]) -> None:
        """Let a shadow answer too; returns at once.

        Args:
            answered: What the client was told.
            ask: Asks the shadow the same.
        """
        if len(self._running) >= MAX_RUNNING:
            self._telemetry.shadow_dropped("busy")
            return
        task = asyncio.create_task(self._compare(answered, ask))
        self._running.add(task)
        task.add_done_callback(self._running.discard)

    async def close(self) -> None:
        """Drop those that run."""
        for task in self._running:
            task.cancel()
        await asyncio.gather(*self._running, return_exceptions=True)

    async def _compare(
        self, answered: Compared, ask: Callable[[], Coroutine[Any, Any, Compared]]
    ) -> None:
        try:
            other = await ask()
        except QueueFullError:
            self._telemetry.shadow_dropped("busy")
            return
        except (ApiError, TimeoutError) as error:
            self._telemetry.shadow_dropped("failed")
            code = error.code if isinstance(error, ApiError) else "deadline_exceeded"
            logger.warning("shadow did not answer", extra={"code": code})
            return
        rows = zip(answered.labels, other.labels, answered.decisions, other.decisions, strict=True)
        for label, other_label, decision, other_decision in rows:
            self._telemetry.shadow_compared(
                answered.card,
                other.card,
                same_label=label == other_label,
                same_decision=decision == other_decision,
            )
