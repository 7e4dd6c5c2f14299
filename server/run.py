"""Run an app under uvicorn with our own reading of signals.

uvicorn alone stops accepting at once on SIGTERM, while load balancers still send traffic. Here
SIGTERM turns readiness off, keeps serving for ``drain_seconds``, then stops accepting, finishes
what is inside and exits 0. SIGINT, or a second SIGTERM, skips the waiting.
"""

import asyncio
import logging
import math
import os
import resource
import signal
import socket
import sys
import time
from types import FrameType
from typing import Any, cast

import uvicorn
from fastapi import FastAPI
from uvicorn.config import STARTUP_FAILURE

from server.connections import ConnectionGate, ConnectionLimits, guarded_by, make_tls_context
from server.lifecycle import Lifecycle
from server.service import Service
from server.settings import Settings

__all__ = ["DrainingServer", "leave", "make_server", "run_server"]

logger = logging.getLogger(__name__)

KEEP_ALIVE_S = 75  # longer than the 60 s of common load balancers, so that they close first
_OWN_FILES = 256  # handles that are not connections: logs, database, model


class DrainingServer(uvicorn.Server):
    """A uvicorn server that drains; ``exit_code`` is for the process."""

    def __init__(
        self,
        config: uvicorn.Config,
        lifecycle: Lifecycle,
        drain_seconds: float,
        handshake_timeout_s: float = 10.0,
    ) -> None:
        super().__init__(config)
        self._handshake_timeout_s = handshake_timeout_s
        self._lifecycle = lifecycle
        self._drain_seconds = drain_seconds
        self._drain_until_s: float | None = None
        self._announced = False
        self.exit_code = 0

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Open the socket and log where it is.

        uvicorn's own does not bound the TLS handshake, in which a client could stay for a minute.
        """
        assert sockets is None  # noqa: S101 - run_server gives none
        await self.lifespan.startup()
        if self.lifespan.should_exit:
            sys.exit(STARTUP_FAILURE)
        try:
            server = await asyncio.get_running_loop().create_server(
                self._make_protocol,
                host=self.config.host,
                port=self.config.port,
                ssl=self.config.ssl,
                backlog=self.config.backlog,
                ssl_handshake_timeout=self._handshake_timeout_s if self.config.ssl else None,
            )
        except OSError as error:
            logger.error("cannot listen", extra={"reason": error.strerror})  # noqa: TRY400
            await self.lifespan.shutdown()
            sys.exit(STARTUP_FAILURE)
        self.servers = [server]
        self.started = True
        for listener in server.sockets:
            host, port = listener.getsockname()[:2]
            logger.info("listening", extra={"host": host, "port": port})

    def _make_protocol(self) -> asyncio.Protocol:
        make = cast(Any, self.config.http_protocol_class)
        return make(
            config=self.config, server_state=self.server_state, app_state=self.lifespan.state
        )

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:  # noqa: ARG002
        """Take note of a signal; everything slow happens in ``on_tick``."""
        first = not self._lifecycle.draining
        self._lifecycle.begin_drain()
        if sig == signal.SIGTERM and first:
            # nobody was sent here before it was loaded, so there is nobody to wait for
            started = self._lifecycle.phase not in ("loading", "failed")
            grace_s = self._drain_seconds if started else 0.0
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


def make_server(app: FastAPI, settings: Settings) -> DrainingServer:
    """Return the server of an app; nothing listens yet.

    Raises:
        TlsSetupError: The files of ``tls_cert``, ``tls_key`` or ``tls_client_ca`` cannot be used.
    """
    service: Service = app.state.service
    gate = ConnectionGate(ConnectionLimits.of(settings), service.telemetry, settings.error_base)
    tls = make_tls_context(settings)
    _allow_files(settings.max_connections + _OWN_FILES)
    config = uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        log_config=None,
        access_log=False,
        server_header=False,
        lifespan="on",
        http=cast(Any, guarded_by(gate)),
        ws="none",
        # nothing here trusts an address or a scheme, so nobody need be believed about them
        proxy_headers=False,
        ssl_context_factory=(lambda _config, _default: tls) if tls else None,
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=math.ceil(settings.max_request_timeout_s) + 1,
    )
    return DrainingServer(
        config, service.lifecycle, settings.drain_seconds, settings.header_timeout_s
    )


def run_server(app: FastAPI, settings: Settings) -> int:
    """Serve until a signal or a failed load; return the process's exit code.

    Raises:
        TlsSetupError: See ``make_server``.
    """
    server = make_server(app, settings)
    try:
        server.run()
    except SystemExit:  # uvicorn's way to say that the address is taken; it has logged it
        return 1
    return server.exit_code


def _allow_files(needed: int) -> None:
    """Raise the soft limit of open files, so that ``max_connections`` can be open at a time."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return
    allowed = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
    if allowed < needed:
        logger.warning(
            "the system allows fewer open files than max_connections may need",
            extra={"allowed": allowed, "needed": needed},
        )


def leave(exit_code: int) -> None:
    """End the process at once, even when a thread still loads a model or a batch hangs."""
    logging.shutdown()
    os._exit(exit_code)
