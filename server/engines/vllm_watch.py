"""Looks after a vLLM server: notices that it is gone, and when it is back, with what it must hold.

While there is a problem nothing is asked of it but this: no request waits for a server that is
away, and none is answered by one that came back with another model.
"""

import asyncio
import logging
from contextlib import suppress

from server.engines.vllm_client import VllmAnswerError, VllmRefusedError
from server.engines.vllm_samples import VllmSamples
from server.ports import AdapterSelfTestError, EngineUnavailableError

__all__ = ["VllmWatch"]

logger = logging.getLogger(__name__)

_LEAST_PAUSE_S = 0.2
_FAILURES = (EngineUnavailableError, VllmRefusedError, VllmAnswerError, AdapterSelfTestError)


class VllmWatch:
    """One task on the client's event loop; ``problem`` may be read from any thread.

    Attributes:
        problem: Why the server cannot be asked now; None when it can.
    """

    def __init__(self, samples: VllmSamples, interval_s: float) -> None:
        """Say what is watched.

        Args:
            samples: What the server must hold; it has just been seen to.
            interval_s: Time between two looks, in seconds.
        """
        self.problem: str | None = None
        self._samples, self._interval_s = samples, interval_s
        self._soon = asyncio.Event()

    async def run(self) -> None:
        """Look for ever."""
        try:
            while True:
                await asyncio.sleep(min(_LEAST_PAUSE_S, self._interval_s))
                with suppress(TimeoutError):
                    async with asyncio.timeout(self._interval_s):
                        await self._soon.wait()
                self._soon.clear()
                await self._look()
        finally:
            self.problem = "nobody looks after vLLM any more"

    async def lost(self, reason: str) -> None:
        """Take note that a request found the server away, and look at once."""
        self._set(reason)
        self._soon.set()

    async def _look(self) -> None:
        try:
            if await self._samples.register() or self.problem is not None:
                await self._samples.verify()
        except _FAILURES as error:
            self._set(str(error))
        else:
            self._set(None)

    def _set(self, problem: str | None) -> None:
        before, self.problem = self.problem, problem
        if problem is not None and problem != before:
            logger.error("vllm cannot be asked", extra={"reason": problem})
        elif problem is None and before is not None:
            logger.info("vllm can be asked again")
