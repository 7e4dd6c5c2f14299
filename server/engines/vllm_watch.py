"""Looks after a vLLM server: notices that it is gone, and when it is back, with what it must hold.

While there is a problem nothing is asked of it but this: no request waits for a server that is
away, and none is answered by one that came back with another model.
"""

import asyncio
import logging
from contextlib import suppress

from server.engines.faults import without_paths
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
        problem: Why the server cannot be asked now; None when it can. Everybody may read it, so it
            names neither an address nor a path; the log does.
    """

    def __init__(self, samples: VllmSamples, url: str, interval_s: float) -> None:
        """Say what is watched.

        Args:
            samples: What the server must hold; it has just been seen to.
            url: Where it is, as errors name it.
            interval_s: Time between two looks, in seconds.
        """
        self.problem: str | None = None
        self._samples, self._interval_s = samples, interval_s
        self._at = f" at {url.rstrip('/')}"
        self._reason: str | None = None
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

    def _set(self, reason: str | None) -> None:
        before, self._reason = self._reason, reason
        self.problem = None if reason is None else without_paths(reason.replace(self._at, ""))
        if reason is not None and reason != before:
            logger.error("vllm cannot be asked", extra={"reason": reason})
        elif reason is None and before is not None:
            logger.info("vllm can be asked again")
