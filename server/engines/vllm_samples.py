"""The samples of one export on a vLLM server: are they there, are they right, what do they say."""

import asyncio
from collections.abc import Coroutine, Sequence
from typing import Any, TypeVar

import torch

from dalorra_core.data.collate import collate
from dalorra_core.data.encode import EncodedExample
from dalorra_core.objectives.elbo import label_log_probs
from dalorra_core.predictive.encoder import RowEncoder
from dalorra_core.predictive.parity import PARITY_LIMIT
from dalorra_core.predictive.scoring import Prediction
from dalorra_core.predictive.tempering import pooled
from server.engines.cards import public_name
from server.engines.vllm_client import VllmAnswerError, VllmClient, VllmMissingError
from server.engines.vllm_export import VllmExport
from server.engines.vllm_mass import LABEL_BIAS, label_mass
from server.ports import AdapterSelfTestError, SelfTest

__all__ = ["VllmSamples"]

T = TypeVar("T")
_WARM_UP_TOKENS = 8


class VllmSamples:
    """Asks every sample on the server; its coroutines run on the client's event loop.

    Attributes:
        export: Which samples.
    """

    def __init__(
        self, client: VllmClient, export: VllmExport, encoder: RowEncoder, dtype: str
    ) -> None:
        """Say who is asked what.

        Args:
            client: The server.
            export: What it is to hold.
            encoder: Of the adapter's questions.
            dtype: Precision of the base model there.
        """
        self.export = export
        self._client, self._dtype = client, dtype
        self._token_ids = export.record.labels.token_ids
        self._max_tokens = export.record.prompt.max_tokens
        golden = export.record.golden
        self._golden_dtype = "float32" if golden is None else golden.dtype
        self._probes = () if golden is None else golden.probes
        self._golden_rows = [encoder.probe(probe) for probe in self._probes]

    async def register(self) -> bool:
        """See that the server holds every sample; return whether some had to be loaded.

        Raises:
            EngineUnavailableError: It does not answer, or lacks samples and loads none.
            VllmRefusedError: It cannot load one.
            VllmAnswerError: It is none that could serve these.
        """
        models = await self._client.models()
        lengths = [model.max_model_len for model in models.values() if model.parent is None]
        longest = max((length for length in lengths if length is not None), default=None)
        if longest is not None and longest <= self._max_tokens:
            raise VllmAnswerError(
                f"vLLM takes {longest} tokens with the answer, and the adapter's prompts have up "
                f"to {self._max_tokens}: start vLLM with --max-model-len of at least "
                f"{self._max_tokens + 1}"
            )
        missing = [sample for sample in self.export.samples if sample.name not in models]
        try:
            for sample in missing:
                await self._client.register(sample.name, sample.path)
        except VllmMissingError as error:
            names = ", ".join(sample.name for sample in missing)
            raise VllmMissingError(
                f"{error}, and {len(missing)} of {len(self.export.samples)} samples are not there: "
                f"{names}. {self.export.how_to_start}"
            ) from None
        return bool(missing)

    async def predict(self, rows: Sequence[EncodedExample]) -> Prediction:
        """Return the label log-probabilities of every sample for every row, before a temperature.

        With the label mass where decisions depend on it.

        Args:
            rows: At least one.

        Raises:
            EngineUnavailableError: The server does not answer.
            VllmRefusedError: It would not answer this.
            VllmAnswerError: Its answer lacks what was asked for.
        """
        prompts = [row.token_ids for row in rows]
        asked = [self._ask(sample.name, prompts) for sample in self.export.samples]
        answers = await _together(asked)
        logits = torch.tensor([own for own, _ in answers], dtype=torch.float64)  # (M, B, C)
        biased = [shown for _, shown in answers if shown is not None]
        mass = label_mass(logits.log_softmax(-1), biased) if biased else None
        allowed = collate(rows, num_labels=len(self._token_ids)).allowed
        prediction = Prediction(label_log_probs(logits, allowed).float(), mass)
        return pooled(prediction) if self.export.record.average == "logits" else prediction

    async def self_test(self) -> SelfTest:
        """Compare with the probabilities that the export holds; without any, ask one row.

        Raises:
            Exception: See ``predict``.
        """
        if not self._probes:
            await self.predict([_warm_up(self._max_tokens)])
            return SelfTest(0.0, self._limit)
        found = (await self.predict(self._golden_rows)).log_probs.double().exp().mean(0)  # (n, C)
        stored = torch.tensor([probe.probs for probe in self._probes], dtype=torch.float64)
        if stored.shape != found.shape:
            raise AdapterSelfTestError(
                f"vllm_export holds golden probes with {stored.shape[-1]} probabilities, and there "
                f"are {found.shape[-1]} labels"
            )
        return SelfTest(float((found - stored).abs().max()), self._limit)

    async def verify(self) -> SelfTest:
        """Return the result of a self-test that was passed.

        Raises:
            AdapterSelfTestError: It was not.
            Exception: See ``predict``.
        """
        found = await self.self_test()
        if not found.passed:
            raise AdapterSelfTestError(
                f"vLLM's answers differ from the export's golden probes by "
                f"{found.max_abs_error:.3g}; the limit in {self._dtype} is {found.limit:g}. vLLM "
                f"must serve {public_name(self.export.record.base.id)} with --dtype {self._dtype}"
            )
        return found

    async def _ask(
        self, name: str, prompts: Sequence[Sequence[int]]
    ) -> tuple[list[list[float]], list[list[float | None]] | None]:
        """Return what one sample says, and with a bias on its labels where that is needed."""
        logits = await self._client.label_logits(name, prompts, self._token_ids)
        if not self.export.label_mass:
            return logits, None
        # asked afterwards, when vLLM has the prompts in its prefix cache
        biased = await self._client.biased_logits(name, prompts, self._token_ids, LABEL_BIAS)
        return logits, biased

    @property
    def _limit(self) -> float:
        exact = self._dtype == self._golden_dtype == "float32"
        return PARITY_LIMIT[torch.float32 if exact else torch.bfloat16]


def _warm_up(max_tokens: int) -> EncodedExample:
    tokens = (1,) * min(_WARM_UP_TOKENS, max_tokens)
    return EncodedExample("warm-up", tokens, -1, None, truncated=False)


async def _together(work: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """Return what all of them give; when one fails or this is cancelled, the rest is cancelled."""
    tasks = [asyncio.ensure_future(one) for one in work]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
