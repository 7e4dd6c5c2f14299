"""From start to stop: load in the background, serve, replace a lost engine, drain, finish.

The server listens before the model is loaded, so that probes get a truthful answer all the time.
One task supervises the engine. It looks at it twice a second and never touches the model.
"""

import asyncio
import logging
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from typing import Literal

from server.batching import Admission, Batcher
from server.engine_run import AdapterHost, EngineRun, in_thread
from server.errors import ApiError, ProblemCode
from server.health import RestartBudget
from server.ports import Engine
from server.settings import Settings
from server.telemetry import Loss, Telemetry

__all__ = ["AdapterHost", "EngineFactory", "Lifecycle", "Phase"]

logger = logging.getLogger(__name__)

EngineFactory = Callable[[], Engine]
Phase = Literal["loading", "serving", "restarting", "dead", "failed", "stopped"]
RETRY_S = 5  # advice to a client that came too early or too late
MAX_PAUSE_S = 5.0
SLOW_LOAD = 10  # times the first load (or ``stall_s``): a restart that takes longer hangs


class Lifecycle:
    """Owns the engine and its thread, and knows whether requests can be answered.

    Attributes:
        phase: Where the process is in its life.
        draining: Whether it will stop soon; it still answers.
        failure: What the load raised, when ``phase`` is ``failed``.
        abandoned: Whether a thread was left behind that still loads or computes.
        loaded_at: When the first load ended, in seconds since 1970.
    """

    def __init__(
        self,
        factory: EngineFactory,
        settings: Settings,
        adapters: AdapterHost,
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
        self._adapters = adapters
        self._admission = admission
        self._telemetry = telemetry
        self._budget = RestartBudget(settings.max_engine_restarts)
        self._run: EngineRun | None = None
        self._left: list[EngineRun] = []
        self._loading: asyncio.Future[Engine] | None = None
        self._load_s = 0.0
        self._loaded = asyncio.Event()
        self._wake = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    # -- questions ----------------------------------------------------------------------------

    @property
    def engine(self) -> Engine:
        """The loaded engine.

        Raises:
            ApiError: 503 while there is none.
        """
        return self._serving_run().engine

    @property
    def batcher(self) -> Batcher:
        """The running batcher; it belongs to ``engine`` and ends with it.

        Raises:
            ApiError: 503 while there is none.
        """
        return self._serving_run().batcher

    def require_serving(self) -> None:
        """Return when requests can be answered (draining counts as such).

        Raises:
            ApiError: 503 otherwise, with the reason.
        """
        self._serving_run()

    def require_ready(self) -> None:
        """Return when new traffic is welcome.

        Raises:
            ApiError: 503 while loading, draining, dead or hung, after too many failed batches in a
                row, and when an adapter fails its self test or none was passed for too long.
        """
        run = self._serving_run()
        if self.draining:
            raise _unavailable("draining", "the server is draining and will stop soon")
        if run.problem is not None:
            raise _unavailable("engine_unavailable", run.problem)

    def require_alive(self) -> None:
        """Return unless nothing but a restart of the process helps.

        Raises:
            ApiError: 503 when the engine was lost too often.
        """
        if self.phase == "dead":
            raise _unavailable("engine_unavailable", _WHY_NOT[self.phase][1])

    def require_started(self) -> None:
        """Return when the first load has succeeded, whatever happened since.

        Raises:
            ApiError: 503 otherwise.
        """
        if not self.loaded_at:
            raise _unavailable(*_WHY_NOT[self.phase])

    # -- transitions --------------------------------------------------------------------------

    def start(self) -> None:
        """Begin to load, in a thread of its own; needs a running event loop."""
        self._task = asyncio.create_task(self._live())
        self._task.add_done_callback(self._on_end)

    async def loaded(self) -> None:
        """Wait until the first load has ended, well or badly."""
        await self._loaded.wait()

    def begin_drain(self) -> None:
        """Turn readiness off; safe to call from a signal handler."""
        self.draining = True

    async def stop(self) -> None:
        """Finish what is queued, within the longest deadline, and let go of the model."""
        self.begin_drain()
        phase, self.phase = self.phase, "stopped"
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait({self._task})
        run, self._run = self._run, None
        if run is not None and phase == "serving":
            if not await run.stop(self._settings.max_request_timeout_s):
                logger.error("the engine did not finish in time; its last batch is abandoned")
            self.abandoned = not await run.let_go()
        if self._loads or self._adapters.loading or any(one.busy for one in self._left):
            self.abandoned = True
        self._adapters.detach()

    # -- the supervisor -----------------------------------------------------------------------

    async def _live(self) -> None:
        run = await self._load_first()
        while run is not None:
            loss = await self._watch(run)
            run = await self._replace(run, loss)

    def _on_end(self, task: "asyncio.Task[None]") -> None:
        self._loaded.set()
        if not task.cancelled() and (error := task.exception()) is not None:
            self.phase = "dead"
            logger.critical("supervision died", exc_info=error)

    async def _load_first(self) -> EngineRun | None:
        began_s = time.monotonic()
        self._loading = in_thread(self._load_engine, "dalorra-load")
        await asyncio.wait({self._loading})
        self._load_s = time.monotonic() - began_s
        failure = self._loading.exception()
        if failure is not None:
            self.failure = failure
            self.phase = "failed"
            self._telemetry.load_failed()
            # no request has been read yet, so the text of this error is safe to log
            logger.critical("load failed", extra={"reason": str(failure)}, exc_info=failure)
            return None
        self._telemetry.adapters_loaded(self._adapters.resident, self._load_s)
        self.loaded_at = int(time.time())
        run = self._serve(self._loading.result())
        self._loaded.set()
        return run

    async def _watch(self, run: EngineRun) -> Loss:
        """Return as soon as the engine is lost."""
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(run.tick_s):
                    await self._wake.wait()
            self._wake.clear()
            loss = run.check()
            if loss is not None:
                return loss
            self._close_left()

    async def _replace(self, run: EngineRun, loss: Loss) -> EngineRun | None:
        """Return the next engine at work; None when there were too many restarts already."""
        self._run = None
        self.phase = "restarting"
        logger.error("engine lost", extra={"loss": loss})
        run.abandon(loss)
        self._adapters.detach()
        self._left.append(run)
        # what a dead engine holds must be free before the next loads; a hung one cannot be closed
        if loss == "dead" and await run.let_go():
            self._left.remove(run)
        while self._budget.take():
            self._telemetry.engine_restarted(loss)
            engine = await self._load_again()
            if engine is not None:
                return self._serve(engine)
            if self._loads:
                break
            await asyncio.sleep(min(self._settings.stall_s, MAX_PAUSE_S))
        self.phase = "dead"
        logger.critical("engine lost for good: it is not restarted any more")
        return None

    async def _load_again(self) -> Engine | None:
        began_s = time.monotonic()
        self._loading = in_thread(self._load_engine, "dalorra-load")
        limit_s = SLOW_LOAD * max(self._load_s, self._settings.stall_s)
        await asyncio.wait({self._loading}, timeout=limit_s)
        if self._loads:
            logger.critical("the restart of the engine hangs", extra={"limit_s": limit_s})
            return None
        failure = self._loading.exception()
        if failure is not None:
            self._telemetry.load_failed()
            # a load reads no request, so the text of this error is safe to log
            logger.error("restart failed", extra={"reason": str(failure)}, exc_info=failure)
            return None
        self._telemetry.adapters_back(self._adapters.resident, time.monotonic() - began_s)
        return self._loading.result()

    @property
    def _loads(self) -> bool:
        """Whether a thread is loading."""
        return self._loading is not None and not self._loading.done()

    def _close_left(self) -> None:
        """Close the engines that hung, as soon as their threads have come back."""
        for run in [one for one in self._left if not one.busy]:
            self._left.remove(run)
            run.close()

    def _load_engine(self) -> Engine:
        engine = self._factory()
        with ExitStack() as undo:
            undo.callback(engine.close)
            self._adapters.attach(engine, engine.load())
            undo.pop_all()
        return engine

    def _serve(self, engine: Engine) -> EngineRun:
        loop = asyncio.get_running_loop()

        def wake() -> None:
            with suppress(RuntimeError):  # the loop is closed: nobody is there to be woken
                loop.call_soon_threadsafe(self._wake.set)

        run = EngineRun(
            engine, self._settings, self._adapters, self._admission, self._telemetry, wake
        )
        run.batcher.start()
        self._run = run
        self.phase = "serving"
        cards = self._adapters.resident
        logger.info("ready", extra={"adapters": [f"{card.name}:{card.revision}" for card in cards]})
        return run

    def _serving_run(self) -> EngineRun:
        run = self._run
        if self.phase != "serving" or run is None:
            raise _unavailable(*_WHY_NOT[self.phase])
        if not run.batcher.alive:  # the supervisor will know in a moment
            raise _unavailable(*_WHY_NOT["restarting"])
        return run


_WHY_NOT: dict[Phase, tuple[ProblemCode, str]] = {
    "loading": ("not_ready", "the model is still loading"),
    "failed": ("not_ready", "the model could not be loaded; see the server's log"),
    "restarting": ("engine_unavailable", "the engine was lost and is being restarted"),
    "dead": ("engine_unavailable", "the engine was lost too often; restart the server"),
    "stopped": ("draining", "the server is stopping"),
}


def _unavailable(code: ProblemCode, detail: str) -> ApiError:
    return ApiError(code, detail, headers={"Retry-After": str(RETRY_S)})
