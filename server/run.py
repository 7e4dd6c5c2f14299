"""Run an app under uvicorn with our own reading of signals.

uvicorn alone stops accepting at once on SIGTERM, while load balancers still send traffic. Here
SIGTERM turns readiness off, keeps serving for ``drain_seconds``, then stops accepting, finishes
what is inside and exits 0. SIGINT, or a second SIGTERM, skips the waiting.
"""

import logging
import math
import os
import signal
import socket
import time
from types import FrameType

import uvicorn
from fastapi import FastAPI

from server.lifecycle import Lifecycle
from server.service import Service
from server.settings import Settings

__all__ = ["DrainingServer", "leave", "run_server"]

logger = logging.getLogger(__name__)

KEEP_ALIVE_S = 75  # longer than the 60 s of common load balancers, so that they close first


class DrainingServer(uvicorn.Server):
    """A uvicorn server that drains; ``exit_code`` is for the process."""

    def __init__(self, config: uvicorn.Config, lifecycle: Lifecycle, drain_seconds: float) -> None:
        super().__init__(config)
        self._lifecycle = lifecycle
        self._drain_seconds = drain_seconds
        self._drain_until_s: float | None = None
        self._announced = False
        self.exit_code = 0

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Open the socket and log where it is."""
        await super().startup(sockets)
        for listener in (one for server in self.servers for one in server.sockets):
            host, port = listener.getsockname()[:2]
            logger.info("listening", extra={"host": host, "port": port})

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:  # noqa: ARG002
        """Take note of a signal; everything slow happens in ``on_tick``."""
        first = not self._lifecycle.draining
        self._lifecycle.begin_drain()
        if sig == signal.SIGTERM and first:
            # nobody was sent here before it was loaded, so there is nobody to wait for
            grace_s = self._drain_seconds if self._lifecycle.phase == "serving" else 0.0
            self._drain_until_s = time.monotonic() + grace_s
            return
        if sig == signal.SIGINT:
            self.exit_code = 128 + signal.SIGINT
            self.force_exit = self.should_exit
        self.should_exit = True

    async def on_tick(self, counter: int) -> bool:
        """Every 0.1 s: end the drain when its time is over, or the process when the load failed."""
        if self._lifecycle.draining and not self._announced:
            self._announced = True
            logger.info("draining", extra={"drain_seconds": self._drain_seconds})
        if self._drain_until_s is not None and time.monotonic() >= self._drain_until_s:
            self.should_exit = True
        if self._lifecycle.phase == "failed":
            self.exit_code = 1
            self.should_exit = True
        return await super().on_tick(counter)


def run_server(app: FastAPI, settings: Settings) -> int:
    """Serve until a signal or a failed load; return the process's exit code."""
    service: Service = app.state.service
    config = uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        log_config=None,
        access_log=False,
        server_header=False,
        lifespan="on",
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=math.ceil(settings.max_request_timeout_s) + 1,
    )
    server = DrainingServer(config, service.lifecycle, settings.drain_seconds)
    try:
        server.run()
    except SystemExit:  # uvicorn's way to say that the address is taken; it has logged it
        return 1
    return server.exit_code


def leave(exit_code: int) -> None:
    """End the process at once, even when a thread still loads a model or a batch hangs."""
    logging.shutdown()
    os._exit(exit_code)
