"""The client for programs that wait: a driver that carries out steps with ``httpx.Client``."""

import contextlib
import time
from types import TracebackType
from typing import Self, TypeVar, Unpack

import httpx

from dalorra.client import calls
from dalorra.client.answers import Answer, Feedback, Model
from dalorra.client.hooks import Hook, Hooks
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

__all__ = ["Client"]

T = TypeVar("T")


class Client:
    """Asks a Dalorra server; may be shared by threads. Close it, or use it in a ``with`` block."""

    def __init__(
        self,
        url: str = "http://127.0.0.1:8000",
        *,
        api_key: str | None = None,
        timeout_s: float = 30.0,
        retries: Retries | None = None,
        max_connections: int = 20,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        """Make a client; nothing is sent yet.

        Args:
            url: Where the server listens.
            api_key: Your key; that of ``DALORRA_API_KEY`` if left out.
            timeout_s: Time for one call, all its attempts together, in seconds.
            retries: When to try again.
            max_connections: Connections at a time.
            transport: Of httpx, for tests and unusual networks.

        Raises:
            ValueError: An argument is outside its domain.
        """
        self._setup = calls.Setup(timeout_s, retries or Retries())
        self._http = httpx.Client(**connection(url, api_key, max_connections), transport=transport)

    def classify(
        self,
        rows: Rows,
        *,
        on_review: Hook | None = None,
        on_abstain: Hook | None = None,
        **options: Unpack[Options],
    ) -> Answer:
        """Ask for the label of one text, or the answer to one question, or of a list of them.

        Args:
            rows: What to classify: strings, ``Text`` or ``Question``; a list holds one kind.
            on_review: Called for each row that a person should look at. The label it returns
                becomes the row's ``final_label``; None leaves the row open. What it raises ends
                the call.
            on_abstain: The same for each row that the model does not answer.
            **options: See ``Options``.

        Raises:
            DalorraError: There is no answer; see ``dalorra.client.errors``.
            TypeError: A hook returned something else than a label or None, or there is no such
                option.
        """
        return self._run(calls.classify(self._setup, rows, Hooks(on_review, on_abstain), options))

    def feedback(
        self, prediction_id: str, label: str | None, *, source: str | None = None
    ) -> Feedback:
        """Say what the right label of an answer was; once this returns, it is stored.

        Args:
            prediction_id: Of the row.
            label: One of the adapter's labels; None when none of them is right.
            source: Who says so: 1 to 64 of ``A-Za-z0-9._-``.

        Raises:
            DalorraError: It was not stored, or nobody can tell; sending it again does no harm.
        """
        return self._run(calls.give_feedback(self._setup, prediction_id, label, source))

    def models(self) -> tuple[Model, ...]:
        """Return the adapters that can be asked.

        Raises:
            DalorraError: There is no answer.
        """
        return self._run(calls.list_models(self._setup))

    def ready(self) -> bool:
        """Return whether the server welcomes traffic now; false when nobody answers."""
        return self._run(calls.probe(self._setup))

    def close(self) -> None:
        """Close all connections."""
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _run(self, steps: Steps[T]) -> T:
        reply: object = None
        while True:
            try:
                step = steps.send(reply)
            except StopIteration as done:
                return done.value
            match step:
                case Send():
                    reply = self._send(step)
                case Sleep(seconds):
                    reply = time.sleep(seconds)
                case Ask(function):
                    reply = function()

    def _send(self, step: Send) -> Received | Lost:
        end_s = time.monotonic() + step.timeout_s
        body = bytearray()
        try:
            with contextlib.closing(
                self._http.send(build(self._http, step), stream=True)
            ) as response:
                for chunk in response.iter_bytes():
                    body += chunk
                    if len(body) > MAX_ANSWER_BYTES:
                        return TOO_LARGE
                    # httpx bounds each wait for bytes, not all of them together
                    if time.monotonic() > end_s:
                        return TIMED_OUT
        except FAILURES as error:
            return lost(error)
        return received(response, bytes(body))
