"""One engine at work: its batcher, its self tests, its watch; ended once and for all when lost."""

import asyncio
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol, TypeVar

from server.batching import Admission, Batcher, BatchLimits, BatchStats, FailureReason
from server.health import SelfTests, StallWatch
from server.ports import AdapterCard, Engine
from server.settings import Settings
from server.telemetry import Loss, Telemetry

__all__ = ["AdapterHost", "EngineRun", "batch_limits", "in_thread"]

logger = logging.getLogger(__name__)

T = TypeVar("T")
TICK_S = 0.5  # between looks at the engine
LET_GO_S = 5.0  # for what still runs in a lost engine, and for closing it


class AdapterHost(Protocol):
    """Who keeps the adapters of the engine: what the life of the process asks of it."""

    def attach(self, engine: Engine, cards: tuple[AdapterCard, ...]) -> None:
        """Publish the adapters an engine has loaded, and load what else must be there; slow.

        Called in the loading thread, right after ``engine.load``, at start and at every restart.
        Raises when an adapter that must be there cannot be served.
        """
        ...

    def detach(self) -> None:
        """Take note that there is no engine now; called on the event loop."""
        ...

    @property
    def resident(self) -> tuple[AdapterCard, ...]:
        """The adapters that can answer now; from any thread."""
        ...

    @property
    def loading(self) -> bool:
        """Whether a thread is still loading one, also into an engine that was lost."""
        ...


class EngineRun:
    """An engine with all that belongs to it and goes with it; nothing is shared with the next.

    Attributes:
        engine: The loaded engine.
        batcher: Its queue and its thread.
        tests: Its self tests.
    """

    def __init__(
        self,
        engine: Engine,
        settings: Settings,
        adapters: AdapterHost,
        admission: Admission,
        telemetry: Telemetry,
        wake: Callable[[], None],
    ) -> None:
        """Make what an engine needs to work; ``batcher.start`` sets it going.

        Args:
            engine: Loaded, with its adapters attached.
            settings: Limits and intervals.
            adapters: Tell which adapters are to be tested.
            admission: Told how fast the engine is.
            telemetry: Told about batches, tests and the queue.
            wake: Called from any thread when ``check`` should be called soon.
        """
        self.engine = engine
        self.tick_s = min(TICK_S, settings.stall_s / 2, settings.selftest_interval_s / 2)
        self._settings = settings
        self._admission = admission
        self._telemetry = telemetry
        self._watch = StallWatch(settings.stall_s, self.tick_s)
        self._closing: asyncio.Future[None] | None = None
        self.batcher = Batcher(
            engine.run_batch,
            batch_limits(engine, settings),
            self,
            wake,
            num_inside=lambda: admission.num_requests,
        )
        self.tests = SelfTests(
            engine, lambda: adapters.resident, settings.selftest_interval_s, telemetry, wake
        )
        telemetry.watch_queue(
            lambda priority: float(self.batcher.waiting_rows(priority)),
            lambda priority: float(self.batcher.waiting_tokens(priority)),
        )

    @property
    def problem(self) -> str | None:
        """Why new traffic should rather not come; None when all is well."""
        if (problem := self.engine.problem) is not None:
            return problem
        if self._failing:
            return f"the last {self.batcher.failed_in_row} batches failed"
        return self.tests.problem

    @property
    def busy(self) -> bool:
        """Whether a thread is still in the engine, so that it must not be closed."""
        return not self.batcher.finished or self.tests.running

    def check(self) -> Loss | None:
        """Look at the engine, and see to its self tests; to be called every ``tick_s``.

        Returns:
            How it was lost; None when it was not.
        """
        if not self.batcher.alive:
            return "dead"
        if self._watch.hung(self.batcher.pulse):
            return "hung"
        if self.tests.look(soon=self._failing):
            self.batcher.forgive()
        return None

    def abandon(self, loss: Loss) -> None:
        """Tell everyone who waits that this engine does not answer any more."""
        if loss == "hung":
            self._telemetry.batch_failed("hung")
        self.batcher.abandon()
        self.tests.end()

    async def stop(self, timeout_s: float) -> bool:
        """Finish the queue; return whether that was done in time. A hung engine is given up."""
        stopping = asyncio.ensure_future(asyncio.to_thread(self.batcher.stop, timeout_s))
        while not stopping.done():
            await asyncio.wait({stopping}, timeout=self.tick_s)
            if self._watch.hung(self.batcher.pulse):
                self.batcher.abandon()
        self.tests.end()
        return stopping.result()

    async def let_go(self) -> bool:
        """Close the engine as soon as nothing is in it; return whether that was soon enough."""
        await self.tests.wait(LET_GO_S)
        if self.busy:
            return False
        closing = self.close()
        await asyncio.wait({closing}, timeout=LET_GO_S)
        return closing.done()

    def close(self) -> "asyncio.Future[None]":
        """Close the engine, once, in a thread of its own: a lost device may hold it up."""
        if self._closing is None:
            self._closing = in_thread(self.engine.close, "dalorra-close")
            self._closing.add_done_callback(_log_failure)
        return self._closing

    def batch_finished(self, stats: BatchStats) -> None:
        """Take note of a finished batch; called from the engine thread."""
        self._telemetry.batch(stats)
        self._admission.observe_speed(stats.reserved_tokens, stats.duration_s)

    def batch_failed(self, reason: FailureReason) -> None:
        """Take note of a failed run of a batch; called from the engine thread."""
        self._telemetry.batch_failed(reason)

    @property
    def _failing(self) -> bool:
        return self.batcher.failed_in_row >= self._settings.max_failed_batches


def in_thread(work: Callable[[], T], name: str) -> "asyncio.Future[T]":
    """Run something slow in a thread of its own, which nobody else ever waits for."""
    threads = ThreadPoolExecutor(1, thread_name_prefix=name)
    future = asyncio.get_running_loop().run_in_executor(threads, work)
    threads.shutdown(wait=False)
    return future


def batch_limits(engine: Engine, settings: Settings) -> BatchLimits:
    """Return the bounds of a batch: the settings, and what the engine says of its hardware."""
    return BatchLimits(
        max_rows=1 if settings.deterministic else settings.max_batch_rows,
        max_tokens=settings.max_batch_tokens or engine.preferred_batch_tokens,
        max_padding=engine.worthwhile_padding,
        wait_s=settings.batch_wait_ms / 1000,
        mix_adapters=engine.mixes_adapters,
        priority_delay_s=settings.batch_priority_delay_ms / 1000,
    )


def _log_failure(closing: "asyncio.Future[None]") -> None:
    if not closing.cancelled() and (error := closing.exception()) is not None:
        logger.warning("the engine could not be closed", exc_info=error)
