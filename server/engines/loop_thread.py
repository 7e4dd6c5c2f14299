"""An event loop in a thread of its own, for engines that talk to other servers."""

import asyncio
import inspect
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import CancelledError, Future
from contextlib import suppress
from typing import Any, TypeVar

from server.ports import EngineStoppedError

__all__ = ["LoopThread", "outcome"]

T = TypeVar("T")
_CLOSE_S = 5.0
_CLOSED = "the engine is closed"


class LoopThread:
    """Runs coroutines for other threads; what is cancelled there is cancelled here."""

    def __init__(self, name: str, at_end: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Say what is to run.

        Args:
            name: Of the thread.
            at_end: Run on the loop as the last thing, when all else was cancelled.
        """
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._lock = threading.Lock()  # nothing is submitted to a loop that ends
        self._open = True
        self._at_end = at_end

    def start(self) -> None:
        """Start the thread; to be called once, before anything is submitted."""
        with self._lock:
            if self._open:
                self._thread.start()

    def submit(self, work: Coroutine[Any, Any, T]) -> "Future[T]":
        """Begin with a coroutine.

        Raises:
            EngineStoppedError: The loop is closed, or was never started.
        """
        with self._lock:
            if self._open and self._thread.is_alive():
                return asyncio.run_coroutine_threadsafe(work, self._loop)
        work.close()
        raise EngineStoppedError(_CLOSED)

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Return what a coroutine gives.

        Raises:
            EngineStoppedError: The loop is closed, was closed meanwhile, or was never started.
            Exception: Whatever it raises.
        """
        return outcome(self.submit(work))

    def close(self) -> None:
        """Cancel what runs and end the thread, in a few seconds at most."""
        with self._lock:
            was_open, self._open = self._open, False
        if not was_open:
            return
        if not self._thread.is_alive():
            self._loop.close()
            return
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(_CLOSE_S)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_forever()
        finally:
            with suppress(RuntimeError):
                self._loop.run_until_complete(self._cancelled())
                self._loop.run_until_complete(self._at_end())
            self._loop.close()

    async def _cancelled(self) -> None:
        """Cancel all other tasks and wait for their end.

        A task that has not begun may wrap a coroutine that only its group knows how to end, as
        anyio's do: it begins, and is cancelled then.
        """
        while tasks := asyncio.all_tasks() - {asyncio.current_task()}:
            begun = [task for task in tasks if _has_begun(task)]
            for task in begun:
                task.cancel()
            await asyncio.sleep(0)
            await asyncio.gather(*begun, return_exceptions=True)


def _has_begun(task: asyncio.Task[Any]) -> bool:
    coroutine = task.get_coro()
    return not inspect.iscoroutine(coroutine) or (
        inspect.getcoroutinestate(coroutine) != inspect.CORO_CREATED
    )


def outcome(future: "Future[T]") -> T:
    """Return what a coroutine of a loop gives; waits for it.

    Raises:
        EngineStoppedError: The loop was closed meanwhile.
        Exception: Whatever it raises.
    """
    try:
        return future.result()
    except CancelledError:
        raise EngineStoppedError(_CLOSED) from None
