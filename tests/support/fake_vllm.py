"""An OpenAI-compatible server that answers as vLLM 0.32 does, with PEFT instead of its kernels.

It computes: a tiny model, one PEFT adapter for each name, the whole vocabulary, log-probabilities
before or after ``allowed_token_ids`` as ``--logprobs-mode`` says, and the sampling defaults of a
``generation_config.json`` that a request has to set itself. It can be stopped, started again on the
same port, and told to fail.
"""

import asyncio
import contextlib
import json
import math
import threading
import time
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import uvicorn
from peft import PeftModel
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from torch import Tensor

from dalorra_core.base_models.loading import load_model, load_tokenizer

__all__ = ["FakeVllm", "VllmFlags", "fake_vllm"]

WAIT_S = 20.0
REPETITION_PENALTY = 1.7  # of the pretended generation_config.json
LEAST = -9999.0  # how -inf is written


@dataclass
class VllmFlags:
    """What a vLLM server is started with.

    Attributes:
        base: Directory of the base model.
        modules: ``--lora-modules``: names and paths.
        runtime: ``VLLM_ALLOW_RUNTIME_LORA_UPDATING``.
        max_logprobs: ``--max-logprobs``.
        logprobs_mode: ``--logprobs-mode``.
        max_model_len: ``--max-model-len``.
        api_key: ``--api-key``.
    """

    base: Path
    modules: Mapping[str, Path] = field(default_factory=dict)
    runtime: bool = True
    max_logprobs: int = 20
    logprobs_mode: Literal["raw_logprobs", "processed_logprobs"] = "processed_logprobs"
    max_model_len: int = 128
    api_key: str | None = None


class FakeVllm:
    """See the module. ``start`` and ``stop`` may follow each other any number of times.

    Attributes:
        flags: What the next ``start`` uses.
        asked: Bodies of ``/v1/completions``, in order.
        fault: Answered instead by ``/v1/completions`` while it is set.
        delay_s: How long an answer of ``/v1/completions`` is held up.
        aborted: Requests whose client left meanwhile.
    """

    def __init__(self, flags: VllmFlags) -> None:
        self.flags = flags
        self.asked: list[dict[str, Any]] = []
        self.fault: Response | None = None
        self.delay_s = 0.0
        self.aborted = 0
        self.port = 0
        self._server: uvicorn.Server | None = None
        self._thread: threading.Thread | None = None
        self._turns = threading.Lock()
        self._plain: Any = None
        self._tokenizer: Any = None
        self._model: Any = None
        self._loras: dict[str, str] = {}

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def names(self) -> list[str]:
        """The adapters that are loaded."""
        return list(self._loras)

    def start(self) -> None:
        """Load the base model and the adapters given by flags, and listen; port 0 is made one."""
        self._plain = load_model(self.flags.base, torch.device("cpu"), torch.float32)
        self._tokenizer = load_tokenizer(self.flags.base)
        self._model, self._loras = None, {}
        for name, path in self.flags.modules.items():
            self._load(name, str(path))
        routes = [
            Route("/v1/models", self._models),
            Route("/v1/completions", self._completions, methods=["POST"]),
        ]
        if self.flags.runtime:
            routes.append(Route("/v1/load_lora_adapter", self._load_lora, methods=["POST"]))
        config = uvicorn.Config(
            Starlette(routes=routes),
            host="127.0.0.1",
            port=self.port,
            log_level="critical",
            lifespan="off",
            timeout_keep_alive=5,
            timeout_graceful_shutdown=1,
        )
        server = uvicorn.Server(config)
        self._server = server
        self._thread = threading.Thread(target=server.run, daemon=True)
        self._thread.start()
        end_s = time.monotonic() + WAIT_S
        while not server.started:
            assert time.monotonic() < end_s, "the fake vLLM never listened"
            assert self._thread.is_alive(), "the fake vLLM died"
            time.sleep(0.005)
        self.port = server.servers[0].sockets[0].getsockname()[1]

    def stop(self) -> None:
        """Close the port; connections that are open end, and adapters are forgotten."""
        server, thread = self._server, self._thread
        if server is None or thread is None:
            return
        server.should_exit = True
        thread.join(WAIT_S)
        assert not thread.is_alive()
        self._server = None

    def forget(self, name: str) -> None:
        """Unload an adapter, as another administrator may."""
        with self._turns:
            self._loras.pop(name)

    # -- routes -------------------------------------------------------------------------------

    async def _models(self, request: Request) -> Response:
        if (refused := self._refused(request)) is not None:
            return refused
        base = {
            "id": str(self.flags.base),
            "object": "model",
            "root": str(self.flags.base),
            "parent": None,
            "max_model_len": self.flags.max_model_len,
        }
        loras = [
            {"id": name, "object": "model", "root": path, "parent": base["id"]}
            for name, path in self._loras.items()
        ]
        return JSONResponse({"object": "list", "data": [base, *loras]})

    async def _load_lora(self, request: Request) -> Response:
        if (refused := self._refused(request)) is not None:
            return refused
        body = await request.json()
        name, path = body["lora_name"], body["lora_path"]
        if name in self._loras:
            return _error(400, f"The lora adapter '{name}' has already been loaded.")
        if not (Path(path) / "adapter_config.json").is_file():
            return _error(404, f"Loading lora {name} failed: No adapter found for {path}")
        await asyncio.to_thread(self._load, name, path)
        return Response(f"Success: LoRA adapter '{name}' added successfully.")

    async def _completions(self, request: Request) -> Response:
        if (refused := self._refused(request)) is not None:
            return refused
        body = await request.json()
        self.asked.append(body)
        end_s = time.monotonic() + self.delay_s
        while time.monotonic() < end_s:
            if await request.is_disconnected():
                self.aborted += 1
                return Response(status_code=499)
            await asyncio.sleep(0.01)
        refused = self.fault or self._not_to_be_answered(body)
        return refused or JSONResponse(await asyncio.to_thread(self._complete, body))

    def _not_to_be_answered(self, body: Mapping[str, Any]) -> Response | None:
        if body["model"] not in (str(self.flags.base), *self._loras):
            return _error(404, f"The model `{body['model']}` does not exist.")
        if body["logprobs"] > self.flags.max_logprobs:
            return _error(
                400,
                f"Requested sample logprobs of {body['logprobs']}, which is greater than max "
                f"allowed: {self.flags.max_logprobs}",
            )
        longest = max(len(prompt) for prompt in body["prompt"]) + body["max_tokens"]
        if longest > self.flags.max_model_len:
            return _error(400, f"This model's maximum context length is {longest}")
        return None

    def _refused(self, request: Request) -> Response | None:
        key = self.flags.api_key
        if key is None or request.headers.get("authorization") == f"Bearer {key}":
            return None
        return JSONResponse({"error": "Unauthorized"}, 401)

    # -- the model ----------------------------------------------------------------------------

    def _load(self, name: str, path: str) -> None:
        with self._turns, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT's own, about tied heads
            if self._model is None:
                self._model = PeftModel.from_pretrained(self._plain, path, adapter_name=name).eval()
            elif name not in self._model.peft_config:
                self._model.load_adapter(path, adapter_name=name)
            self._loras[name] = path

    @torch.inference_mode()
    def _complete(self, body: Mapping[str, Any]) -> dict[str, Any]:
        with self._turns:
            if body["model"] in self._loras:
                self._model.set_adapter(body["model"])
            choices = [
                self._choice(place, prompt, body) for place, prompt in enumerate(body["prompt"])
            ]
        return {"object": "text_completion", "model": body["model"], "choices": choices}

    def _choice(self, place: int, prompt: list[int], body: Mapping[str, Any]) -> dict[str, Any]:
        ids = torch.tensor([prompt])
        logits = self._model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, -1]
        penalty = body.get("repetition_penalty", REPETITION_PENALTY)
        seen = ids[0].unique()
        scaled = torch.where(logits[seen] > 0, logits[seen] / penalty, logits[seen] * penalty)
        processed = logits.clone()
        processed[seen] = scaled
        if "allowed_token_ids" in body:
            allowed = torch.full_like(logits, -math.inf)
            allowed[body["allowed_token_ids"]] = 0.0
            processed = processed + allowed
        for token, bias in body.get("logit_bias", {}).items():
            processed[int(token)] += bias
        shown = processed if self.flags.logprobs_mode == "processed_logprobs" else logits
        log_probs = shown.log_softmax(-1)
        sampled = int(processed.argmax())
        return {
            "index": place,
            "text": self._tokenizer.decode([sampled]),
            "finish_reason": "length",
            "logprobs": self._logprobs(log_probs, sampled, body),
        }

    def _logprobs(self, log_probs: Tensor, sampled: int, body: Mapping[str, Any]) -> dict[str, Any]:
        top = log_probs.topk(body["logprobs"]).indices.tolist()
        kept = list(dict.fromkeys([sampled, *top]))[: body["logprobs"] + 1]
        as_ids = body.get("return_tokens_as_token_ids")
        table = {
            f"token_id:{i}" if as_ids else self._tokenizer.decode([i]): max(
                float(log_probs[i]), LEAST
            )
            for i in kept
        }
        first = next(iter(table))
        return {
            "text_offset": [0],
            "tokens": [first],
            "token_logprobs": [table[first]],
            "top_logprobs": [table],
        }


def _error(status: int, message: str) -> Response:
    body = {"error": {"message": message, "type": "BadRequestError", "param": None, "code": status}}
    return Response(json.dumps(body), status, media_type="application/json")


@contextlib.contextmanager
def fake_vllm(base: Path, **flags: Any) -> Iterator[FakeVllm]:
    """Run a fake vLLM on a free port of this machine."""
    server = FakeVllm(VllmFlags(base, **flags))
    server.start()
    try:
        yield server
    finally:
        server.stop()
