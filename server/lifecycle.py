"""From start to stop: load in the background, serve, drain, finish the queue.

The server listens before the model is loaded, so that probes get a truthful answer all the time.
"""

import asyncio
import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

from server.batching import Admission, Batcher, BatchLimits, BatchStats
from server.errors import ApiError, ProblemCode
from server.ports import AdapterCard, Engine
from server.registry import AdapterRegistry, require_policy
from server.settings import Settings
from server.telemetry import Telemetry

__all__ = ["EngineFactory", "Lifecycle", "Phase"]

logger = logging.getLogger(__name__)

EngineFactory = Callable[[], Engine]
Phase = Literal["loading", "serving", "failed", "stopped"]
RETRY_S = 5  # advice to a client that came too early or too late


class Lifecycle:
    """Owns the engine and its thread, and knows whether requests can be answered.

    Attributes:
        phase: Where the process is in its life.
        draining: Whether it will stop soon; it still answers.
        failure: What the load raised, when ``phase`` is ``failed``.
        abandoned: Whether a thread was left behind that still loads or computes.
        loaded_at: When the load ended, in seconds since 1970.
    """

    def __init__(
        self,
        factory: EngineFactory,
        settings: Settings,
        registry: AdapterRegistry,
        admission: Admission,
        telemetry: Telemetry,
    ) -> None:
        self.phase: Phase = "loading"
        self.draining = False
        self.failure: BaseException | None = None
        self.abandoned = False
        self.loaded_at = 0
        self._factory = factory
        self._settings = settings
        self._registry = registry
        self._admission = admission
        self._telemetry = telemetry
        self._engine: Engine | None = None
        self._batcher: Batcher | None = None
        self._loader = ThreadPoolExecutor(1, thread_name_prefix="dalorra-load")
        self._load_task: asyncio.Task[None] | None = None

    # -- questions ----------------------------------------------------------------------------

    @property
    def engine(self) -> Engine:
        """The loaded engine.

        Raises:
            ApiError: 503 while there is none.
        """
        self.require_serving()
        assert self._engine is not None  # noqa: S101 - require_serving has said so
        return self._engine

    @property
    def batcher(self) -> Batcher:
        """The running batcher.

        Raises:
            ApiError: 503 while there is none.
        """
        self.require_serving()
        assert self._batcher is not None  # noqa: S101 - require_serving has said so
        return self._batcher

    @property
    def engine_dead(self) -> bool:
        """Whether the engine thread has ended although nobody asked it to: only a restart helps."""
        batcher = self._batcher
        return self.phase == "serving" and batcher is not None and not batcher.alive

    def require_serving(self) -> None:
        """Return when requests can be answered (draining counts as such).

        Raises:
            ApiError: 503 otherwise, with the reason.
        """
        if self.phase == "loading":
            raise _unavailable("not_ready", "the model is still loading")
        if self.phase == "failed":
            raise _unavailable("not_ready", "the model could not be loaded; see the server's log")
        if self.phase == "stopped":
            raise _unavailable("draining", "the server is stopping")
        if self.engine_dead:
            raise _unavailable("engine_unavailable", "the engine has died; restart the server")

    def require_ready(self) -> None:
        """Return when new traffic is welcome.

        Raises:
            ApiError: 503 while loading, draining, dead or stuck.
        """
        self.require_serving()
        if self.draining:
            raise _unavailable("draining", "the server is draining and will stop soon")
        running_s = self.batcher.running_for_s
        if running_s > self._settings.stall_s:
            detail = f"the engine has been busy with one batch for {running_s:.0f} s"
            raise _unavailable("engine_unavailable", detail)

    # -- transitions --------------------------------------------------------------------------

    def start(self) -> None:
        """Begin to load, in a thread of its own; needs a running event loop."""
        self._load_task = asyncio.create_task(self._load())

    async def loaded(self) -> None:
        """Wait until the load has ended, well or badly."""
        if self._load_task is not None:
            await asyncio.wait({self._load_task})

    def begin_drain(self) -> None:
        """Turn readiness off; safe to call from a signal handler."""
        self.draining = True

    async def stop(self) -> None:
        """Finish what is queued, within the longest deadline, and let go of the model."""
        self.begin_drain()
        if self._load_task is not None and not self._load_task.done():
            self._load_task.cancel()
            self.abandoned = True
        phase, self.phase = self.phase, "stopped"
        self._loader.shutdown(wait=False, cancel_futures=True)
        batcher, engine = self._batcher, self._engine
        if phase != "serving" or batcher is None or engine is None:
            return
        finished = await asyncio.to_thread(batcher.stop, self._settings.max_request_timeout_s)
        if finished:
            engine.close()
        else:
            self.abandoned = True
            logger.error("the engine did not finish in time; its last batch is abandoned")

    async def _load(self) -> None:
        began_s = time.monotonic()
        loading = asyncio.get_running_loop().run_in_executor(self._loader, self._load_engine)
        await asyncio.wait({loading})
        failure = loading.exception()
        if failure is not None:
            self.failure = failure
            self.phase = "failed"
            self._telemetry.load_failed()
            # no request has been read yet, so the text of this error is safe to log
            logger.critical("load failed", extra={"reason": str(failure)}, exc_info=failure)
            return
        self._engine, cards = loading.result()
        self._batcher = self._make_batcher(self._engine)
        self._batcher.start()
        self._registry.publish(cards)
        self.loaded_at = int(time.time())
        self._telemetry.adapters_loaded(cards, time.monotonic() - began_s)
        self.phase = "serving"
        logger.info("ready", extra={"adapters": [f"{card.name}:{card.revision}" for card in cards]})

    def _load_engine(self) -> tuple[Engine, tuple[AdapterCard, ...]]:
        engine = self._factory()
        cards = engine.load()
        require_policy(cards, self._settings.locked_policy)
        return engine, cards

    def _make_batcher(self, engine: Engine) -> Batcher:
        settings = self._settings
        limits = BatchLimits(
            max_rows=1 if settings.deterministic else settings.max_batch_rows,
            max_tokens=settings.max_batch_tokens or engine.preferred_batch_tokens,
            wait_s=settings.batch_wait_ms / 1000,
        )
        batcher = Batcher(engine.run_batch, limits, self._observe, self._engine_lost)
        self._telemetry.watch_queue(
            lambda: float(batcher.num_waiting), lambda: float(batcher.waiting_tokens)
        )
        return batcher

    def _observe(self, stats: BatchStats) -> None:
        """Take note of a finished batch; called from the engine thread."""
        self._telemetry.batch(stats)
        self._admission.observe_speed(stats.cost_tokens, stats.duration_s)

    def _engine_lost(self) -> None:
        self._telemetry.engine_lost(self._registry.cards)


def _unavailable(code: ProblemCode, detail: str) -> ApiError:
    return ApiError(code, detail, headers={"Retry-After": str(RETRY_S)})
