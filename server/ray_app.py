"""Dalorra as an application of Ray Serve: each replica is a whole server, without its socket.

Ray's proxy takes the requests and Ray decides where replicas run; batching by tokens, admission,
keys and metrics are those of `dalorra serve`. Ray itself is imported when ``app`` is called, by
whoever deploys. See docs/ray.md.
"""

import asyncio
import contextlib
import importlib
import logging
import math
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import uvicorn
from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict, Field, SecretStr
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.app import create_app
from server.auth import route_template
from server.cli import make_engine
from server.errors import ApiError
from server.lifecycle import EngineFactory, Lifecycle
from server.logs import configure_logging
from server.service import Service
from server.settings import Settings

__all__ = ["RayOptions", "Replica", "app"]

logger = logging.getLogger(__name__)

RETRY_S = 5  # advice to a client while no replica has room
STOP_S = 10  # beyond the longest deadline: Ray's own looks at what is inside, and our closing
MODEL_HEADER = "serve_multiplexed_model_id"
REQUEST_ID = b"x-request-id"
OFF = SecretStr("off")


class RayOptions(BaseModel):
    """The ``args`` of the application in a configuration of Ray Serve."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    settings: dict[str, Any] = Field(
        default_factory=dict,
        description="Settings of the server; the DALORRA_ variables of a replica's process hold "
        "where these are silent. Ray shows them to whoever sees its dashboard: no secrets.",
    )
    metrics_ports: tuple[int, ...] = Field(
        default=(),
        description="Ports for the metrics of a replica; each takes the first free one of its node "
        "and answers /metrics and the probes there. No such port if empty.",
    )
    metrics_host: str = Field(
        default="127.0.0.1", description="Address of a node that the metrics are on."
    )
    adapters_per_replica: int = Field(
        default=8,
        ge=1,
        description="Adapters that a replica is preferred for, by the header "
        "serve_multiplexed_model_id.",
    )

    def server_settings(self) -> Settings:
        """Return the settings of a replica.

        Raises:
            ValueError: They cannot be met behind Ray's proxy.
        """
        settings = Settings(**self.settings)
        if settings.adapter is None and settings.adapter_root is None:
            raise ValueError("give adapter or adapter_root")
        if settings.api_keys_file is None and not settings.allow_unauthenticated:
            raise ValueError(
                "Ray's proxy decides who can reach the server: give api_keys_file, or set "
                "allow_unauthenticated if nobody else can"
            )
        if settings.tls_cert is not None:
            raise ValueError("Ray's proxy speaks plain HTTP: end TLS in front of it, not here")
        if settings.feedback_url is None:
            return settings.model_copy(update={"feedback_url": OFF})
        if settings.feedback_url != OFF and settings.secret_file is None:
            raise ValueError("feedback_url needs secret_file: replicas must know each other's ids")
        return settings


class Replica:
    """One server, as Ray holds it: built, asked for its health, and let go, on one event loop.

    Args:
        options: The ``args`` of the application.
        factory: Makes the engine; the settings' own, if left out.
    """

    def __init__(self, options: RayOptions, factory: EngineFactory | None = None) -> None:
        settings = options.server_settings()
        configure_logging(settings.log_level)
        self._options = options
        self._app = create_app(
            factory or (lambda: make_engine(settings)), settings, administered=False
        )
        self._service: Service = self._app.state.service

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Return the app that Ray sends requests to; its start ends when the model is loaded."""
        app, start = self._app, self._app.router.lifespan_context

        @contextlib.asynccontextmanager
        async def lifespan(app: FastAPI) -> AsyncIterator[None]:
            async with start(app), _metrics_listener(app, self._options):
                await _loaded(self._service.lifecycle)
                yield

        app.router.lifespan_context = lifespan
        app.add_middleware(_BehindRay, service=self._service, remember=self.remember)
        return app

    async def check_health(self) -> None:
        """Return while the server is ready; Ray replaces a replica that is not, three times.

        Raises:
            RuntimeError: It is not, with the reason.
        """
        try:
            self._service.lifecycle.require_ready()
        except ApiError as error:
            raise RuntimeError(error.detail) from None

    async def remember(self, model: str) -> str:
        """Take note that this replica has answered for an adapter; ``app`` lets Ray know."""
        return model


def app(options: RayOptions) -> Any:
    """Return the application, a ``ray.serve.Application``: ``import_path: server.ray_app:app``.

    A configuration may set everything that it sets here under ``deployments``, by the name Dalorra.

    Raises:
        ValueError: The settings cannot be met behind Ray's proxy.
        ModuleNotFoundError: The extra ``ray`` is not installed.
    """
    serve: Any = importlib.import_module("ray.serve")
    config: Any = importlib.import_module("ray.serve.config")
    settings = options.server_settings()

    class Dalorra(Replica):
        @serve.multiplexed(max_num_models_per_replica=options.adapters_per_replica)
        async def remember(self, model: str) -> str:
            return model

    deployment = serve.deployment(
        serve.ingress()(Dalorra),
        name="Dalorra",
        # twice what the server admits, so that it refuses, and knows how long to stay away, before
        # Ray lets anybody wait
        max_ongoing_requests=2 * settings.max_requests,
        max_queued_requests=settings.max_requests,
        backpressure_config=config.BackpressureConfig(status_code=503, retry_after_s=RETRY_S),
        graceful_shutdown_timeout_s=math.ceil(settings.max_request_timeout_s) + STOP_S,
    )
    return deployment.bind(options)


async def _loaded(lifecycle: Lifecycle) -> None:
    await lifecycle.loaded()
    if lifecycle.failure is not None:
        raise RuntimeError(f"load failed: {lifecycle.failure}")


class _BehindRay:
    """ASGI middleware: what a request's header says it is for, Ray shall send here again.

    The request id is Ray's to send back: its proxy adds the header, and would make it twice.
    """

    def __init__(
        self, app: ASGIApp, *, service: Service, remember: Callable[[str], Awaitable[str]]
    ) -> None:
        self._app = app
        self._service = service
        self._remember = remember

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Note the adapter, if it is one, and go on: the body's ``model`` says who answers."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_without_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [one for one in message["headers"] if one[0] != REQUEST_ID]
            await send(message)

        if (model := _model_of(scope)) and self._knows(model):
            await self._remember(model)
        await self._app(scope, receive, send_without_id)

    def _knows(self, model: str) -> bool:
        try:
            self._service.adapters.registry.resolve(model, "-")
        except ApiError:
            return False
        return True


def _model_of(scope: Scope) -> str | None:
    for name, value in scope["headers"]:
        if name.decode("latin-1").replace("-", "_") == MODEL_HEADER:
            return str(value.decode("latin-1"))
    return None


@contextlib.asynccontextmanager
async def _metrics_listener(app: FastAPI, options: RayOptions) -> AsyncIterator[None]:
    """Answer /metrics and the probes on a port of this replica's own, where one is free."""
    listener = _first_free(options.metrics_host, options.metrics_ports)
    if listener is None:
        yield
        return

    async def only_health(scope: Scope, receive: Receive, send: Send) -> None:
        path = scope["path"]
        await app({**scope, "path": path if route_template(path) is None else "/"}, receive, send)

    server = uvicorn.Server(
        uvicorn.Config(
            only_health,
            log_config=None,
            access_log=False,
            server_header=False,
            lifespan="off",
            ws="none",
            proxy_headers=False,
        )
    )
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    try:
        yield
    finally:
        server.should_exit = True
        await serving


def _first_free(host: str, ports: tuple[int, ...]) -> socket.socket | None:
    for port in ports:
        with contextlib.suppress(OSError):
            listener = socket.create_server((host, port))
            logger.info("metrics", extra={"host": host, "port": listener.getsockname()[1]})
            return listener
    if ports:
        logger.error("no port is free for the metrics of this replica", extra={"ports": ports})
    return None
