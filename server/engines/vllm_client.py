"""What an OpenAI-compatible vLLM server is asked, and what its failures mean.

Every wait is bounded by ``timeout_s``; nothing is asked twice but what a closed connection lost.
"""

import asyncio
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

import httpx

from server.ports import EngineUnavailableError

__all__ = [
    "ServedModel",
    "VllmAnswerError",
    "VllmBusyError",
    "VllmClient",
    "VllmKeyError",
    "VllmMissingError",
    "VllmRefusedError",
    "label_row",
    "shown_row",
    "top_tokens",
]

_CONNECT_S = 5.0
_KEEP_S = 4.0  # vLLM closes an idle connection after five seconds
_LABEL = "token_id:"
_LONGEST_TEXT = 300
_LOST = (httpx.ReadError, httpx.WriteError, httpx.RemoteProtocolError)


class VllmBusyError(EngineUnavailableError):
    """vLLM takes no more requests now; it is there."""


class VllmKeyError(EngineUnavailableError):
    """vLLM asks for another API key."""


class VllmMissingError(EngineUnavailableError):
    """vLLM does not know this adapter, perhaps not any more."""


class VllmRefusedError(Exception):
    """vLLM would not do what it was asked; the text is its own."""


class VllmAnswerError(Exception):
    """vLLM's answer is not what was asked for."""


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A model in vLLM's list.

    Attributes:
        parent: The base model of an adapter; None for a base model.
        max_model_len: Tokens of prompt and answer; None for an adapter.
    """

    parent: str | None
    max_model_len: int | None


class VllmClient:
    """One vLLM server; used on one event loop."""

    def __init__(self, url: str, *, api_key: str | None, timeout_s: float) -> None:
        """Say where the server is; nothing is asked yet.

        Args:
            url: Without ``/v1``.
            api_key: What vLLM was started with; None for none.
            timeout_s: The longest wait for one answer, in seconds.
        """
        self._url, self._timeout_s = url.rstrip("/"), timeout_s
        self._http = httpx.AsyncClient(
            headers={"Authorization": f"Bearer {api_key}"} if api_key is not None else {},
            timeout=httpx.Timeout(timeout_s, connect=min(_CONNECT_S, timeout_s)),
            limits=httpx.Limits(max_connections=None, keepalive_expiry=_KEEP_S),
            trust_env=False,  # proxies of the environment are for other servers
        )

    async def aclose(self) -> None:
        """Close every connection."""
        await self._http.aclose()

    async def models(self) -> dict[str, ServedModel]:
        """Return what the server serves, by name.

        Raises:
            EngineUnavailableError: It does not answer.
            VllmRefusedError: It has no such list.
            VllmAnswerError: The list is none.
        """
        response = await self._exchange("GET", "/v1/models")
        if response.is_error:
            raise self._refused(response)
        found = _json(response)
        try:
            return {str(card["id"]): _served(card) for card in found["data"]}
        except (AttributeError, KeyError, TypeError):
            raise VllmAnswerError(f"the list of models of {self._url} is none") from None

    async def register(self, name: str, path: str) -> None:
        """Let the server load an adapter from its own disk; one of this name is kept.

        Raises:
            EngineUnavailableError: It does not answer.
            VllmMissingError: It takes no adapters at run time.
            VllmRefusedError: It cannot load this one.
        """
        body = {"lora_name": name, "lora_path": path}
        response = await self._exchange("POST", "/v1/load_lora_adapter", body)
        if response.is_success:
            return
        text = _text_of(response)
        if response.status_code == HTTPStatus.BAD_REQUEST and "already" in text:
            return  # another server that shares this vLLM was faster
        if response.status_code in (HTTPStatus.NOT_FOUND, HTTPStatus.METHOD_NOT_ALLOWED) and (
            "adapter" not in text.lower()
        ):
            raise VllmMissingError(f"vLLM at {self._url} loads no adapters at run time")
        raise self._refused(response)

    async def label_logits(
        self, model: str, prompts: Sequence[Sequence[int]], token_ids: Sequence[int]
    ) -> list[list[float]]:
        """Return (B, C) logits of the label tokens after each prompt, up to a constant of each row.

        Args:
            model: Name of an adapter there.
            prompts: B prompts, as token ids.
            token_ids: Of the C labels.

        Raises:
            EngineUnavailableError: It does not answer; its subclasses say more.
            VllmRefusedError: It would not answer this.
            VllmAnswerError: The answer lacks what was asked for.
        """
        extra = {"allowed_token_ids": list(token_ids)}
        tables = await self._tables(model, prompts, len(token_ids), extra)
        return [label_row(table, token_ids) for table in tables]

    async def biased_logits(
        self, model: str, prompts: Sequence[Sequence[int]], token_ids: Sequence[int], bias: float
    ) -> list[list[float | None]]:
        """Return (B, C) log-probabilities of the labels among all tokens, their logits biased.

        None stands for a label that is not among the C most probable tokens.

        Args:
            model: Name of an adapter there.
            prompts: B prompts, as token ids.
            token_ids: Of the C labels.
            bias: Added to the logit of each.

        Raises:
            Exception: See ``label_logits``.
        """
        extra = {"logit_bias": {str(token_id): bias for token_id in token_ids}}
        tables = await self._tables(model, prompts, len(token_ids), extra)
        return [shown_row(table, token_ids) for table in tables]

    async def _tables(
        self,
        model: str,
        prompts: Sequence[Sequence[int]],
        count: int,
        extra: Mapping[str, object],
    ) -> list[Mapping[str, object]]:
        """Return the ``count`` most probable tokens after each prompt, by ``token_id:N``."""
        body = {
            "model": model,
            "prompt": [list(prompt) for prompt in prompts],
            "max_tokens": 1,
            "logprobs": count,
            "return_tokens_as_token_ids": True,
            # the base model's generation_config.json would set these where nothing is said
            "temperature": 0.0,
            "top_p": 1.0,
            "top_k": -1,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            **extra,
        }
        response = await self._exchange("POST", "/v1/completions", body)
        if response.status_code == HTTPStatus.NOT_FOUND:
            raise VllmMissingError(
                f"vLLM at {self._url} does not know {model}: {_text_of(response)}"
            )
        if response.is_error:
            raise self._refused(response)
        return top_tokens(_json(response), len(prompts))

    async def _exchange(
        self, method: str, path: str, body: Mapping[str, object] | None = None
    ) -> httpx.Response:
        """Return an answer that is about the request: not of a server that is away or busy."""
        try:
            async with asyncio.timeout(self._timeout_s):
                response = await self._sent(method, path, body)
        except (TimeoutError, httpx.ReadTimeout):
            raise EngineUnavailableError(
                f"vLLM at {self._url} gave no answer within vllm_timeout_s ({self._timeout_s:g} s)"
            ) from None
        except httpx.HTTPError as error:
            raise EngineUnavailableError(
                f"vLLM at {self._url} cannot be reached ({type(error).__name__})"
            ) from None
        status = response.status_code
        if status in (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN):
            raise VllmKeyError(
                f"vLLM at {self._url} answers {status}: vllm_api_key must be the --api-key that it "
                "was started with"
            )
        if status == HTTPStatus.TOO_MANY_REQUESTS or (
            status == HTTPStatus.SERVICE_UNAVAILABLE and _own_text(response) is not None
        ):  # a full queue is a 503 of vLLM's own; one of a proxy says that nobody is behind it
            raise VllmBusyError(f"vLLM at {self._url} takes no more requests now ({status})")
        if status >= HTTPStatus.INTERNAL_SERVER_ERROR or status == HTTPStatus.REQUEST_TIMEOUT:
            raise EngineUnavailableError(f"vLLM at {self._url} answers {status}")
        return response

    async def _sent(
        self, method: str, path: str, body: Mapping[str, object] | None
    ) -> httpx.Response:
        """Ask; once more when a connection that was kept turns out to be closed."""
        try:
            return await self._http.request(method, self._url + path, json=body)
        except _LOST:
            return await self._http.request(method, self._url + path, json=body)

    def _refused(self, response: httpx.Response) -> VllmRefusedError:
        return VllmRefusedError(
            f"vLLM at {self._url} answers {response.status_code}: {_text_of(response)}"
        )


def _served(card: Any) -> ServedModel:
    length = card.get("max_model_len")
    return ServedModel(card.get("parent"), length if isinstance(length, int) else None)


def top_tokens(answer: Any, num_prompts: int) -> list[Mapping[str, object]]:
    """Return the tables of an answer of ``/v1/completions``, one for each prompt, in their order.

    Raises:
        VllmAnswerError: A prompt is missing, or there is one too many.
    """
    try:
        choices = {choice["index"]: choice["logprobs"] for choice in answer["choices"]}
        tables = [choices.pop(place)["top_logprobs"][0] for place in range(num_prompts)]
    except (AttributeError, IndexError, KeyError, TypeError):
        tables, choices = [], {}
    if choices or not tables or not all(isinstance(table, dict) for table in tables):
        raise VllmAnswerError(
            f"vLLM's answer to {num_prompts} prompts must have log-probabilities for each of them, "
            "and for no others"
        )
    return tables


def label_row(table: Mapping[str, object], token_ids: Sequence[int]) -> list[float]:
    """Return the log-probability of every label.

    Whatever they are normalised over, they are logits up to a constant.

    Raises:
        VllmAnswerError: A label is missing, or a value is no finite number.
    """
    row = shown_row(table, token_ids)
    missing = [token_id for token_id, value in zip(token_ids, row, strict=True) if value is None]
    if missing:
        raise VllmAnswerError(
            f"vLLM's answer lacks the log-probabilities of {len(missing)} of {len(token_ids)} "
            f"label tokens (the first is {missing[0]}): start vLLM with --logprobs-mode "
            f"processed_logprobs and --max-logprobs of at least {len(token_ids)}"
        )
    return [value for value in row if value is not None]


def shown_row(table: Mapping[str, object], token_ids: Sequence[int]) -> list[float | None]:
    """Return the log-probabilities of the labels, None for those that are not in the table.

    Raises:
        VllmAnswerError: A value is no finite number.
    """
    return [_number(table.get(f"{_LABEL}{token_id}")) for token_id in token_ids]


def _number(value: object) -> float | None:
    if value is None:
        return None
    if isinstance(value, int | float) and math.isfinite(value):
        return float(value)
    raise VllmAnswerError("vLLM's answer has log-probabilities that are no finite numbers")


def _json(response: httpx.Response) -> Any:
    try:
        return json.loads(response.content)
    except (ValueError, RecursionError):
        raise VllmAnswerError(
            f"the answer to {response.request.url.path} is no JSON ({len(response.content)} bytes)"
        ) from None


def _text_of(response: httpx.Response) -> str:
    """Return what an error says, in vLLM's forms or in that of whatever answered instead."""
    return _own_text(response) or response.reason_phrase


def _own_text(response: httpx.Response) -> str | None:
    """Return what an error in one of vLLM's forms says; None when it has none of them."""
    try:
        body = json.loads(response.content)
    except (ValueError, RecursionError):
        return None
    parts = [body, body.get("error")] if isinstance(body, dict) else []
    for part in parts:
        for name in ("message", "detail"):
            if isinstance(part, dict) and isinstance(part.get(name), str):
                return str(part[name])[:_LONGEST_TEXT]
    return None
