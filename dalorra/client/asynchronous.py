"""The client for asyncio: a driver that carries out steps with ``httpx.AsyncClient``."""

import asyncio
import contextlib
import inspect
from types import TracebackType
from typing import Self, TypeVar, Unpack

import httpx

from dalorra.client import calls
from dalorra.client.answers import Answer, Feedback, Model
from dalorra.client.hooks import AsyncHook, Hooks
from dalorra.client.questions import Options, Rows
from dalorra.client.retries import Retries
from dalorra.client.steps import Ask, Lost, Received, Send, Sleep, Steps
from dalorra.client.transport import (
    FAILURES,
    MAX_ANSWER_BYTES,
    TIMED_OUT,
    TOO_LARGE,
    build,
    connection,
    lost,
    received,
)

__all__ = ["AsyncClient"]

T = TypeVar("T")


class AsyncClient:
    """Asks a Dalorra server without blocking; for one event loop. See ``Client`` for the calls."""

    def __init__(
        self,
        url: str = "http://127.0.0.1:8000",
        *,
        api_key: str | None = None,
        timeout_s: float = 30.0,
        retries: Retries | None = None,
        max_connections: int = 20,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        """Make a client; the arguments are those of ``Client``."""
        self._setup = calls.Setup(timeout_s, retries or Retries())
        self._http = httpx.AsyncClient(
            **connection(url, api_key, max_connections), transport=transport
        )

    async def classify(
        self,
        rows: Rows,
        *,
        on_review: AsyncHook | None = None,
        on_abstain: AsyncHook | None = None,
        **options: Unpack[Options],
    ) -> Answer:
        """See ``Client.classify``; hooks may be coroutine functions, called one after another."""
        steps = calls.classify(self._setup, rows, Hooks(on_review, on_abstain), options)
        return await self._run(steps)

    async def feedback(
        self, prediction_id: str, label: str | None, *, source: str | None = None
    ) -> Feedback:
        """See ``Client.feedback``."""
        return await self._run(calls.give_feedback(self._setup, prediction_id, label, source))

    async def models(self) -> tuple[Model, ...]:
        """See ``Client.models``."""
        return await self._run(calls.list_models(self._setup))

    async def ready(self) -> bool:
        """See ``Client.ready``."""
        return await self._run(calls.probe(self._setup))

    async def aclose(self) -> None:
        """Close all connections."""
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.aclose()

    async def _run(self, steps: Steps[T]) -> T:
        reply: object = None
        while True:
            try:
                step = steps.send(reply)
            except StopIteration as done:
                return done.value
            match step:
                case Send():
                    reply = await self._send(step)
                case Sleep(seconds):
                    reply = await asyncio.sleep(seconds)
                case Ask(function):
                    found = function()
                    reply = await found if inspect.isawaitable(found) else found

    async def _send(self, step: Send) -> Received | Lost:
        try:
            async with asyncio.timeout(step.timeout_s):
                return await self._received(step)
        except TimeoutError:
            return TIMED_OUT
        except FAILURES as error:
            return lost(error)

    async def _received(self, step: Send) -> Received | Lost:
        body = bytearray()
        response = await self._http.send(build(self._http, step), stream=True)
        async with contextlib.aclosing(response):
            async for chunk in response.aiter_bytes():
                body += chunk
                if len(body) > MAX_ANSWER_BYTES:
                    return TOO_LARGE
        return received(response, bytes(body))
