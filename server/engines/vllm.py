"""The engine that computes in a vLLM server: M exported samples there, everything else here.

Tokens, temperature, uncertainty, policies and self tests are the local engine's; only the label
log-probabilities of each sample come from elsewhere. docs/vllm.md says how to start both.
"""

import logging
import threading
import time
from collections.abc import Sequence
from concurrent import futures
from dataclasses import dataclass, field, replace
from pathlib import Path

from transformers.utils import logging as transformers_logging

from dalorra_core.base_models.loading import load_tokenizer
from dalorra_core.data.encode import EncodedExample
from dalorra_core.predictive.encoder import RowEncoder
from dalorra_core.predictive.matching import check_base
from dalorra_core.predictive.scoring import Prediction
from dalorra_core.predictive.shared_base import identify
from dalorra_core.predictive.tempering import tempered
from server.engines.answers import Calibrated, score_batch
from server.engines.cards import adapter_card
from server.engines.certify_rows import CertifyRows, required_rows
from server.engines.faults import LOAD_FAILURES, load_fault, without_paths
from server.engines.loaded import calibrated_of, verified_artifact
from server.engines.loop_thread import LoopThread, outcome
from server.engines.questions import encode_question
from server.engines.stored import stored_adapter
from server.engines.vllm_client import (
    VllmAnswerError,
    VllmBusyError,
    VllmClient,
    VllmKeyError,
    VllmMissingError,
    VllmRefusedError,
)
from server.engines.vllm_export import answering_of_export, read_vllm_export
from server.engines.vllm_samples import VllmSamples
from server.engines.vllm_watch import VllmWatch
from server.ports import (
    AdapterCard,
    AdapterLoadError,
    BatchKey,
    BatchRow,
    BatchScores,
    EncodedRow,
    EngineStoppedError,
    EngineUnavailableError,
    Policy,
    PolicyEvaluation,
    Question,
    RiskCoveragePoint,
    RowRejectedError,
    RowScores,
    ScoreName,
    SelfTest,
    StoredAdapter,
    Truncate,
    Wanted,
)

__all__ = ["VllmEngine", "VllmPlace"]

logger = logging.getLogger(__name__)

_POLL_S = 0.25  # between two looks at who still waits for a batch
_START_PAUSE_S = 2.0
_BATCH_TOKENS = 65_536


@dataclass(frozen=True, slots=True)
class VllmPlace:
    """Where the server is and what it holds.

    Attributes:
        url: Without ``/v1``.
        export: Directory of the export here.
        export_there: The same directory as vLLM sees it; None for the same path.
        api_key: vLLM's own; None for none.
        timeout_s: The longest wait for one answer.
        start_s: How long ``load`` waits for a server that does not answer yet.
        watch_s: Time between two looks at the server.
    """

    url: str
    export: Path
    export_there: str | None = None
    api_key: str | None = field(default=None, repr=False)
    timeout_s: float = 30.0
    start_s: float = 300.0
    watch_s: float = 2.0


@dataclass(frozen=True, eq=False)
class _Served:
    """The one adapter, and who computes it."""

    card: AdapterCard
    encoder: RowEncoder
    temperature: float
    calibrated: Calibrated
    rows: CertifyRows | None
    samples: VllmSamples
    watch: VllmWatch


@dataclass(frozen=True, slots=True)
class _Row:
    """What this engine keeps of an encoded question."""

    example: EncodedExample
    labels: tuple[str, ...]
    columns: tuple[int, ...]
    served: _Served


class VllmEngine:
    """See ``server.ports.Engine``."""

    def __init__(
        self,
        adapter: Path,
        place: VllmPlace,
        *,
        base: str | None = None,
        dtype: str = "auto",
        trusted_keys: Path | None = None,
    ) -> None:
        """Say what ``load`` is to load; nothing is read or asked yet.

        Args:
            adapter: Artifact directory: policies, calibration, prompt.
            place: The vLLM server, and the export of that artifact.
            base: Base model whose tokenizer is used; None takes the adapter's.
            dtype: Precision that vLLM was started with; auto is float32.
            trusted_keys: Serve only what one of these keys signed; None asks for no signature.
        """
        self._directory, self._place = adapter, place
        self._base_name = base
        self._dtype = "float32" if dtype == "auto" else dtype
        self._trusted_keys = trusted_keys
        self._closing = threading.Event()
        self._client = VllmClient(place.url, api_key=place.api_key, timeout_s=place.timeout_s)
        self._loop = LoopThread("dalorra-vllm", self._client.aclose)
        self._served: _Served | None = None

    @property
    def preferred_batch_tokens(self) -> int:
        """Room for vLLM to schedule in; its own limits decide what runs together."""
        return _BATCH_TOKENS

    @property
    def worthwhile_padding(self) -> float:
        """Any: vLLM pads nothing."""
        return 1.0

    @property
    def mixes_adapters(self) -> bool:
        """There is one adapter, with one sampling."""
        return False

    @property
    def problem(self) -> str | None:
        """Why the vLLM server cannot be asked now."""
        served = self._served
        return None if served is None else served.watch.problem

    def load(self) -> tuple[AdapterCard, ...]:
        """Check artifact, export and base model, wait for vLLM, and see that it answers as it must.

        Raises:
            AdapterLoadError: The adapter cannot be served; says what to do.
            EngineStoppedError: The engine was closed meanwhile.
        """
        transformers_logging.disable_progress_bar()  # this process logs JSON lines
        self._loop.start()
        try:
            served = self._staged()
        except LOAD_FAILURES as error:
            fault = load_fault(error, self._directory.name, self._directory, self._place.export)
        else:
            self._loop.submit(served.watch.run()).add_done_callback(_log_end)
            self._served = served
            return (served.card,)
        raise fault

    def load_adapter(self, directory: Path, name: str | None = None) -> AdapterCard:
        """Refuse: an adapter needs an export of its own, which is a setting.

        Raises:
            AdapterLoadError: Always.
        """
        raise AdapterLoadError(
            f"{name or directory.name} cannot be loaded: engine vllm serves the adapter that it "
            "was started with"
        )

    def unload_adapter(self, adapter: str) -> None:
        """Do nothing: the one adapter stays, as one given at start does everywhere."""

    def stored_adapter(self, directory: Path) -> StoredAdapter:
        """Return what lies in a directory, from its manifest alone."""
        return stored_adapter(directory)

    def self_test(self, adapter: str) -> SelfTest:
        """Let vLLM answer the golden probes; beside the batches that it answers.

        Raises:
            RowRejectedError: The adapter is not loaded.
            Exception: vLLM did not answer.
        """
        return self._loop.run(self._of(adapter).samples.self_test())

    def encode(self, adapter: str, question: Question, truncate: Truncate) -> EncodedRow:
        """Return a question as tokens.

        Raises:
            RowTooLongError: More tokens than the adapter takes, and nothing may be cut.
            RowRejectedError: A choice's label is unknown, or the form is unsound.
        """
        served = self._of(adapter)
        asked = encode_question(question, truncate, served.encoder, served.card.labels)
        row = _Row(asked.example, asked.labels, asked.columns, served)
        return EncodedRow(len(row.example.token_ids), row.example.truncated, row)

    def run_batch(self, rows: Sequence[BatchRow], wanted: Wanted) -> BatchScores:
        """Let vLLM answer every row with every sample, and score the answers here.

        Raises:
            EngineUnavailableError: vLLM does not answer.
            FloatingPointError: A probability is not finite.
            TypeError: A row was encoded by another engine, or asks for another sampling.
            Exception: vLLM refused this, or its answer lacks something.
        """
        began_s = time.perf_counter()
        served = self._of(rows[0].key.adapter)
        payloads = [_payload(row, served) for row in rows]
        kept = [place for place in range(len(rows)) if wanted(place)]
        prediction = self._prediction(served, payloads, kept, wanted) if kept else None
        forward_ended_s = time.perf_counter()
        scores: list[RowScores | None] = [None] * len(rows)
        if prediction is not None:
            found = score_batch(
                tempered(prediction, served.temperature),
                [payloads[place] for place in kept],
                served.calibrated,
                single=served.card.point_method,
            )
            for place, row_scores in zip(kept, found, strict=True):
                scores[place] = row_scores
        uq_s = time.perf_counter() - forward_ended_s
        return BatchScores(tuple(scores), forward_ended_s - began_s, uq_s)

    def mask_set(self, key: BatchKey) -> str | None:
        """Return the id of the exported samples; None for point methods."""
        return self._of(key.adapter).card.mask_set

    def risk_coverage(
        self, adapter: str, score: ScoreName, *, out_of_scope_share: float, delta: float
    ) -> tuple[RiskCoveragePoint, ...]:
        """Return the risk-coverage curve of a score on the certify rows.

        Raises:
            NotCalibratedError: There are no stored rows, or they do not have this score.
            ValueError: The share asks for out-of-scope rows and none are stored.
        """
        return self._rows_of(adapter).curve(score, out_of_scope_share, delta)

    def evaluate_policy(
        self, adapter: str, policy: Policy, *, out_of_scope_share: float, delta: float
    ) -> PolicyEvaluation:
        """Return what a policy would do on the certify rows.

        Raises:
            NotCalibratedError: There are no stored rows, or not a score that the policy limits.
            ValueError: The share asks for out-of-scope rows and none are stored.
        """
        return self._rows_of(adapter).evaluate(policy, out_of_scope_share, delta)

    def close(self) -> None:
        """Hang up; the samples stay in vLLM, where other servers may use them."""
        self._closing.set()
        self._served = None
        self._loop.close()

    def _of(self, adapter: str) -> _Served:
        served = self._served
        if served is None:
            raise EngineStoppedError("the engine is used before load() or after close()")
        if adapter != served.card.key:
            raise RowRejectedError(f"adapter {adapter} is not loaded")
        return served

    def _rows_of(self, adapter: str) -> CertifyRows:
        served = self._of(adapter)
        return required_rows(served.rows, served.card.name)

    def _staged(self) -> _Served:
        """Return the adapter, ready to answer."""
        place = self._place
        artifact, signed_by = verified_artifact(self._directory, self._trusted_keys)
        export = read_vllm_export(place.export, place.export_there, artifact)
        identity = identify(self._base_name or artifact.manifest.base.id)
        check_base(artifact, identity)
        encoder = RowEncoder(artifact.manifest, load_tokenizer(identity.directory))
        samples = VllmSamples(self._client, export, encoder, self._dtype)
        tested = self._reach(samples)
        rows = CertifyRows.of(artifact)
        kept_bytes = 0 if rows is None else rows.num_bytes
        how = answering_of_export(export, artifact, self._dtype, kept_bytes)
        card = adapter_card(artifact, how, tested.max_abs_error)
        card = replace(card, load_id=f"{card.name}:{card.revision}#1", signed_by=signed_by)
        return _Served(
            card=card,
            encoder=encoder,
            temperature=how.here.temperature,
            calibrated=calibrated_of(artifact, card),
            rows=rows,
            samples=samples,
            watch=VllmWatch(samples, place.url, place.watch_s),
        )

    def _reach(self, samples: VllmSamples) -> SelfTest:
        """Wait for vLLM for as long as is allowed, and return a self-test that was passed."""
        until_s = time.monotonic() + self._place.start_s
        while True:
            try:
                self._loop.run(samples.register())
                return self._loop.run(samples.verify())
            except _FOR_GOOD as error:
                raise AdapterLoadError(_with_advice(str(error), samples)) from None
            except EngineUnavailableError as error:
                left_s = until_s - time.monotonic()
                if left_s <= 0:
                    waited = f"{error}; vllm_start_s ({self._place.start_s:g} s) have passed"
                    raise AdapterLoadError(_with_advice(waited, samples)) from None
            if self._closing.wait(min(_START_PAUSE_S, left_s)):
                raise EngineStoppedError("the engine is closed")

    def _prediction(
        self, served: _Served, payloads: Sequence[_Row], kept: Sequence[int], wanted: Wanted
    ) -> Prediction | None:
        """Return what vLLM answers to the kept rows; None once nobody waits for any of them."""
        if served.watch.problem is not None:
            raise EngineUnavailableError(served.watch.problem)
        asked = self._loop.submit(served.samples.predict([payloads[n].example for n in kept]))
        while not futures.wait({asked}, _POLL_S).done:
            still = [place for place in kept if wanted(place)]  # who is late is told so by this
            if not still:
                asked.cancel()
                return None
        try:
            return outcome(asked)
        except VllmBusyError:
            raise
        except EngineUnavailableError as error:
            self._loop.run(served.watch.lost(str(error)))
            raise


_FOR_GOOD = (VllmKeyError, VllmMissingError, VllmRefusedError, VllmAnswerError)
"""What waiting does not mend."""


def _with_advice(text: str, samples: VllmSamples) -> str:
    advice = samples.export.how_to_start
    return without_paths(text if advice in text else f"{text}. {advice}")


def _log_end(watching: "futures.Future[None]") -> None:
    if not watching.cancelled() and (error := watching.exception()) is not None:
        logger.critical("the watch over vLLM died", exc_info=error)


def _payload(row: BatchRow, served: _Served) -> _Row:
    payload = row.row.payload
    if not isinstance(payload, _Row) or payload.served is not served:
        raise TypeError("the row was encoded by another engine")
    if row.key.adapter != served.card.key:
        raise TypeError("the row was encoded for another adapter than its key says")
    if not served.card.point_method and row.key.sampling != served.card.defaults:
        raise TypeError(f"sampling must be {served.card.defaults}, got {row.key.sampling}")
    return payload
