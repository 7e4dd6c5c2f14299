"""Drive the app in process through ASGI: no sockets, no sleeps, every wait bounded."""

import asyncio
import contextlib
import functools
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, ParamSpec

import httpx
from fastapi import FastAPI

from server.app import create_app
from server.service import Service
from server.settings import Settings
from tests.support.fake_engine import FakeEngine

__all__ = ["Api", "async_test", "running", "same_answer", "until"]

P = ParamSpec("P")
TIMEOUT_S = 60.0  # of a test that hangs; a busy machine may take its time


def async_test(test: Callable[P, Awaitable[None]]) -> Callable[P, None]:
    """Run an async test to its end, or fail it after ``TIMEOUT_S``."""

    @functools.wraps(test)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        async def bounded() -> None:
            await asyncio.wait_for(test(*args, **kwargs), TIMEOUT_S)

        asyncio.run(bounded())

    return run


async def until(condition: Callable[[], bool]) -> None:
    """Return as soon as a condition holds; fail after twenty seconds."""
    end_s = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end_s, "the condition never came true"
        await asyncio.sleep(0.001)


def same_answer(response: httpx.Response) -> list[dict[str, Any]]:
    """Return the answered rows without their ids, which are new for every answer."""
    return [
        {k: v for k, v in row.items() if k != "prediction_id"} for row in response.json()["data"]
    ]


class Api:
    """A running app, its engine, and a client."""

    def __init__(self, app: FastAPI, engine: FakeEngine, client: httpx.AsyncClient) -> None:
        self.app = app
        self.engine = engine
        self.client = client

    @property
    def service(self) -> Service:
        service = self.app.state.service
        assert isinstance(service, Service)
        return service

    async def classify(self, body: Any, **headers: str) -> httpx.Response:
        """Post a JSON body; ``headers`` have underscores for dashes."""
        sent = {name.replace("_", "-"): value for name, value in headers.items()}
        return await self.client.post("/v1/classify", json=body, headers=sent)

    async def metric(self, name: str, **labels: str) -> float:
        """Return one sample; 0 when it does not exist."""
        return self.service.telemetry.registry.get_sample_value(f"dalorra_{name}", labels) or 0.0

    async def check_healthy(self) -> None:
        """The next request succeeds and nothing is left inside."""
        self.engine.gate.set()
        answer = await self.classify({"input": "a sure thing"})
        assert answer.status_code == 200, answer.text
        self.check_idle()

    def check_idle(self) -> None:
        """Nothing is admitted, queued or counted as in progress."""
        admission = self.service.admission
        assert (admission.num_requests, admission.num_rows, admission.num_tokens) == (0, 0, 0)
        for family in self.service.telemetry.registry.collect():
            if family.name in ("dalorra_http_requests_in_progress", "dalorra_queue_depth"):
                assert all(sample.value == 0 for sample in family.samples), family.samples


@contextlib.asynccontextmanager
async def running(
    engine: FakeEngine | None = None,
    *spares: FakeEngine,
    wait: bool = True,
    **settings: Any,
) -> AsyncIterator[Api]:
    """Start an app on a fake engine, wait until it is loaded, and stop it at the end.

    A lost engine is replaced by the next of the spares, and the last one by itself.
    Feedback is off unless the settings say where it shall go.
    """
    engine = engine or FakeEngine()
    if not settings.keys() & {"state_dir", "feedback_url"}:
        settings["feedback_url"] = "off"
    engines = deque([engine, *spares])
    made = tuple(engines)

    def factory() -> FakeEngine:
        return engines.popleft() if len(engines) > 1 else engines[0]

    app = create_app(factory, Settings(**{"batch_wait_ms": 0, **settings}))
    transport = httpx.ASGITransport(app)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url="http://localhost") as client,
    ):
        api = Api(app, engine, client)
        if wait:
            await api.service.lifecycle.loaded()
        try:
            yield api
        finally:
            for one in made:
                for gate in (one.gate, one.load_gate, one.encode_gate):
                    gate.set()  # a failed test must not hang the next one
