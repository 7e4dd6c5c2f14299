"""The engine in this process: one base model and any number of adapters, by ``dalorra_core``."""

import itertools
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

from transformers.utils import logging as transformers_logging

from dalorra_core.artifact.store import Artifact
from dalorra_core.base_models.loading import pick_device
from dalorra_core.predictive.matching import check_base
from dalorra_core.predictive.predictor import GOLDEN_TOLERANCE
from dalorra_core.predictive.scoring import padded_token_limit
from dalorra_core.predictive.shared_base import SharedBase, identify
from server.engines.batches import answer_batch
from server.engines.faults import LOAD_FAILURES, batch_fault, load_fault
from server.engines.loaded import Loaded, Row, plan_of, verified_artifact
from server.engines.questions import encode_question
from server.engines.stored import stored_adapter
from server.ports import (
    AdapterCard,
    AdapterLoadError,
    BatchKey,
    BatchRow,
    BatchScores,
    EncodedRow,
    EngineStoppedError,
    Policy,
    PolicyEvaluation,
    Question,
    RiskCoveragePoint,
    RowRejectedError,
    ScoreName,
    SelfTest,
    StoredAdapter,
    Truncate,
    Wanted,
)

__all__ = ["LocalEngine"]


class LocalEngine:
    """See ``server.ports.Engine``."""

    def __init__(  # noqa: PLR0913  each a setting of the server
        self,
        adapters: Sequence[Path],
        *,
        base: str | None = None,
        device: str = "auto",
        dtype: str = "auto",
        pass_memory_mb: int | None = None,
        pass_tokens: int | Literal["auto"] | None = None,
        deterministic: bool = False,
        trusted_keys: Path | None = None,
    ) -> None:
        """Say what ``load`` is to load; nothing is read yet.

        Args:
            adapters: Artifact directories.
            base: Base model directory, hub id or alias; None takes the first adapter's.
            device: auto, cpu, cuda or cuda:N.
            dtype: Of the base model: auto, float32 or bfloat16.
            pass_memory_mb: MiB that the activations of a forward pass may take; None leaves its
                size to the device.
            pass_tokens: Padded tokens (M * B * T) of one; auto tries several sizes on a CPU.
            deterministic: Answer each row alone, so equal questions give bitwise equal answers.
            trusted_keys: Serve only what one of these keys signed; None asks for no signature.
        """
        self._adapters = tuple(adapters)
        self._base_name = base
        self._device, self._dtype, self._pass_memory_mb = device, dtype, pass_memory_mb
        self._pass_tokens: int | Literal["auto"] | None = pass_tokens
        self._deterministic = deterministic
        self._trusted_keys = trusted_keys
        self._is_open = False
        self._base: SharedBase | None = None
        self._loaded: dict[str, Loaded] = {}  # changed by one item at a time, read by any thread
        self._loading = threading.Lock()  # one load at a time; never held by a forward
        self._publishing = threading.Lock()  # what is loaded, and whether the engine is open
        self._numbers = itertools.count(1)

    @property
    def preferred_batch_tokens(self) -> int:
        """What one fused forward takes at most; without a base, what is usual on the device."""
        base = self._base
        return padded_token_limit(pick_device(self._device)) if base is None else base.pass_tokens

    @property
    def worthwhile_padding(self) -> float:
        """What padding may cost on this device, for rows that need it.

        A CPU pays for every token, whatever the batch: 8 % more rows a second at 0.1 than at 0.5
        (docs/results.md). A GPU has room to spare in small batches.
        """
        return 0.1 if pick_device(self._device).type == "cpu" else 0.5

    @property
    def mixes_adapters(self) -> bool:
        """Rows share forward passes unless each is to be answered alone."""
        return not self._deterministic

    @property
    def problem(self) -> str | None:
        """None: it depends on nothing outside this process."""
        return None

    def load(self) -> tuple[AdapterCard, ...]:
        """Load the base model, if it is known by now, and the adapters this was made with.

        Raises:
            AdapterLoadError: One cannot be served, or the base model cannot be used.
        """
        transformers_logging.disable_progress_bar()  # this process logs JSON lines
        self._is_open = True
        if self._base_name is not None:
            self._load_base(self._base_name)
        return tuple(self.load_adapter(directory) for directory in self._adapters)

    def load_adapter(self, directory: Path, name: str | None = None) -> AdapterCard:
        """Verify, load, warm and self-test one more adapter; running answers take turns with it.

        Raises:
            AdapterLoadError: It cannot be served; its subclasses say why.
        """
        with self._loading:
            try:
                loaded = self._staged(directory, name)
            except LOAD_FAILURES as error:
                known = [] if self._base is None else [self._base.identity.directory]
                fault = load_fault(error, directory.name, directory, *known)
            else:
                self._publish(loaded)
                return loaded.card
        raise fault

    def unload_adapter(self, adapter: str) -> None:
        """Let go of an adapter; rows that are encoded already are still answered."""
        self._loaded.pop(adapter, None)

    def stored_adapter(self, directory: Path) -> StoredAdapter:
        """Return what lies in a directory, from its manifest alone."""
        return stored_adapter(directory)

    def self_test(self, adapter: str) -> SelfTest:
        """Recompute the stored probabilities; takes turns with other forwards, pass by pass.

        Raises:
            RowRejectedError: The adapter is not loaded.
        """
        predictor = self._of(adapter).predictor
        return SelfTest(predictor.self_test(), GOLDEN_TOLERANCE[predictor.dtype])

    def encode(self, adapter: str, question: Question, truncate: Truncate) -> EncodedRow:
        """Return a question as tokens.

        Raises:
            RowTooLongError: More tokens than the adapter takes, and nothing may be cut.
            RowRejectedError: A choice's label is unknown, or the form is unsound.
        """
        loaded = self._of(adapter)
        predictor = loaded.predictor
        asked = encode_question(question, truncate, predictor.encode, predictor.labels)
        row = Row(asked.example, asked.labels, asked.columns, loaded)
        return EncodedRow(len(row.example.token_ids), row.example.truncated, row)

    def run_batch(self, rows: Sequence[BatchRow], wanted: Wanted) -> BatchScores:
        """Run the fused forward and the uncertainty scores.

        Raises:
            EngineFatalError: The device is lost.
            EngineMemoryError: The batch did not fit; a smaller one may.
            FloatingPointError: A probability is not finite.
        """
        try:
            return answer_batch(rows, wanted, self._base)
        except (RuntimeError, MemoryError) as error:
            fault = batch_fault(error)
        raise fault

    def mask_set(self, key: BatchKey) -> str | None:
        """Return the id of the samples; None where nothing is sampled."""
        loaded = self._of(key.adapter)
        if loaded.is_single(key.sampling):
            return None
        return loaded.predictor.mask_set(plan_of(key.sampling))

    def risk_coverage(
        self, adapter: str, score: ScoreName, *, out_of_scope_share: float, delta: float
    ) -> tuple[RiskCoveragePoint, ...]:
        """Return the risk-coverage curve of a score on the certify rows.

        Raises:
            NotCalibratedError: There are no stored rows, or they do not have this score.
            ValueError: The share asks for out-of-scope rows and none are stored.
        """
        return self._of(adapter).rows.curve(score, out_of_scope_share, delta)

    def evaluate_policy(
        self, adapter: str, policy: Policy, *, out_of_scope_share: float, delta: float
    ) -> PolicyEvaluation:
        """Return what a policy would do on the certify rows.

        Raises:
            NotCalibratedError: There are no stored rows, or not a score that the policy limits.
            ValueError: The share asks for out-of-scope rows and none are stored.
        """
        return self._of(adapter).rows.evaluate(policy, out_of_scope_share, delta)

    def close(self) -> None:
        """Let go of the model and of every adapter."""
        with self._publishing:
            self._is_open = False
            self._loaded.clear()
            self._base = None

    def _of(self, adapter: str) -> Loaded:
        if not self._is_open:
            raise EngineStoppedError("the engine is used before load() or after close()")
        loaded = self._loaded.get(adapter)
        if loaded is None:
            raise RowRejectedError(f"adapter {adapter} is not loaded")
        return loaded

    def _load_base(self, name: str) -> None:
        with self._loading:
            try:
                self._base = self._base_named(name)
            except LOAD_FAILURES as error:
                fault = load_fault(error, "the base model")
            else:
                return
        raise fault

    def _staged(self, directory: Path, name: str | None) -> Loaded:
        """Return an adapter that is ready to answer; nothing of it stays when this fails.

        A base model that comes with the first adapter stays only when that adapter does.
        """
        artifact, signed_by = verified_artifact(directory, self._trusted_keys)
        name_of_base = self._base_name or artifact.manifest.base.id
        base = self._base or self._base_named(name_of_base, artifact)
        served = name or artifact.manifest.name
        load_id = f"{served}:{artifact.revision}#{next(self._numbers)}"

        def named(card: AdapterCard) -> AdapterCard:
            return replace(card, name=served, load_id=load_id, signed_by=signed_by)

        return Loaded.on(base, artifact, deterministic=self._deterministic, named=named)

    def _publish(self, loaded: Loaded) -> None:
        with self._publishing:
            if not self._is_open:  # closed while this was loading
                raise AdapterLoadError("the engine is closed")
            self._base = loaded.base
            self._loaded[loaded.card.key] = loaded

    def _base_named(self, name: str, artifact: Artifact | None = None) -> SharedBase:
        """Load a base model; an adapter of another one is refused before the slow part."""
        identity = identify(name)
        if artifact is not None:
            check_base(artifact, identity)
        return SharedBase.load(
            identity,
            device=self._device,
            dtype=self._dtype,
            pass_memory_mb=self._pass_memory_mb,
            pass_tokens=self._pass_tokens,
            packed=True,
        )
