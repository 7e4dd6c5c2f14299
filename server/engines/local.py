"""The engine in this process: one base model and one adapter through ``dalorra_core``."""

import time
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers.utils import logging as transformers_logging

from dalorra_core.data.examples import Choice, ChoiceExample, Example, TextExample
from dalorra_core.errors import DataError, InputError, InputTooLongError
from dalorra_core.metrics.uncertainty import summarise
from dalorra_core.predictive.predictor import Predictor, SamplingPlan
from dalorra_core.predictive.scoring import padded_token_limit
from server.engines.answers import Calibrated, Row, score_batch
from server.engines.cards import adapter_card
from server.engines.certify_rows import CertifyRows
from server.ports import (
    AdapterCard,
    BatchKey,
    BatchScores,
    ChoiceQuestion,
    EncodedRow,
    EngineFatalError,
    NotCalibratedError,
    Policy,
    PolicyEvaluation,
    Question,
    RiskCoveragePoint,
    RowRejectedError,
    RowTooLongError,
    Sampling,
    ScoreName,
    TextQuestion,
    Truncate,
)

__all__ = ["LocalEngine"]


class LocalEngine:
    """See ``server.ports.Engine``."""

    def __init__(
        self,
        adapter: Path,
        *,
        base: str | None = None,
        device: str = "auto",
        dtype: str = "auto",
        deterministic: bool = False,
    ) -> None:
        self._adapter = adapter
        self._base = base
        self._device = device
        self._dtype = dtype
        self._deterministic = deterministic
        self._loaded: Predictor | None = None
        self._certify_rows: CertifyRows | None = None
        self._calibrated = Calibrated()

    @property
    def _predictor(self) -> Predictor:
        if self._loaded is None:
            raise RuntimeError("the engine is used before load() or after close()")
        return self._loaded

    @property
    def preferred_batch_tokens(self) -> int:
        """What one fused forward takes at most on this device."""
        return padded_token_limit(self._predictor.device)

    def load(self) -> tuple[AdapterCard, ...]:
        """Load the adapter and its base; the golden probes check the numbers and warm the model.

        Raises:
            DalorraError: The adapter or the base cannot be used; the text says why.
        """
        transformers_logging.disable_progress_bar()  # this process logs JSON lines
        self._loaded = Predictor.load(
            self._adapter,
            base=self._base,
            device=self._device,
            dtype=self._dtype,
            deterministic=self._deterministic,
        )
        summarise(
            torch.zeros(2, 1, 2).log_softmax(-1)
        )  # its first call is slow; the probes skip it
        self._certify_rows = CertifyRows.of(self._loaded.artifact)
        card = adapter_card(self._loaded)
        self._calibrated = _calibrated(self._loaded, card)
        return (card,)

    def encode(self, adapter: str, question: Question, truncate: Truncate) -> EncodedRow:
        """Return a question as tokens.

        Raises:
            RowTooLongError: More tokens than the adapter takes, and nothing may be cut.
            RowRejectedError: A choice's label is unknown, or the form is unsound.
        """
        predictor = self._predictor_of(adapter)
        try:
            example = predictor.encode(_example(question), truncate=truncate)
        except InputTooLongError as error:
            raise RowTooLongError(error.num_tokens, error.max_tokens) from None
        except (InputError, DataError) as error:
            raise RowRejectedError(str(error)) from None
        names = predictor.labels
        labels = (
            tuple(choice.label for choice in question.choices)
            if isinstance(question, ChoiceQuestion)
            else names
        )
        row = Row(example, labels, tuple(names.index(label) for label in labels))
        return EncodedRow(len(example.token_ids), example.truncated, row)

    def run_batch(self, key: BatchKey, rows: Sequence[EncodedRow]) -> BatchScores:
        """Run the fused forward and the uncertainty scores.

        Raises:
            EngineFatalError: The device is lost.
            FloatingPointError: A probability is not finite.
        """
        predictor = self._predictor_of(key.adapter)
        payloads = [_payload(row) for row in rows]
        began_s = time.perf_counter()
        try:
            prediction = predictor.predict([p.example for p in payloads], _plan(key.sampling))
        except RuntimeError as error:
            if "CUDA error" in str(error):  # the context is gone; out of memory reads differently
                raise EngineFatalError(str(error).splitlines()[0]) from None
            raise
        forward_s = time.perf_counter() - began_s
        single = predictor.point_method or key.sampling.estimator == "mean_mask"
        scores = score_batch(prediction, payloads, self._calibrated, single=single)
        return BatchScores(scores, forward_s, time.perf_counter() - began_s - forward_s)

    def mask_set(self, key: BatchKey) -> str | None:
        """Return the id of the samples; None where nothing is sampled."""
        predictor = self._predictor_of(key.adapter)
        if predictor.point_method or key.sampling.estimator == "mean_mask":
            return None
        return predictor.mask_set(_plan(key.sampling))

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
        """Let go of the model."""
        self._loaded = None
        self._certify_rows = None

    def _rows_of(self, adapter: str) -> CertifyRows:
        self._predictor_of(adapter)
        if self._certify_rows is None:
            raise NotCalibratedError(
                f"adapter {adapter} stores no calibration rows; dalorra calibrate adds them"
            )
        return self._certify_rows

    def _predictor_of(self, adapter: str) -> Predictor:
        predictor = self._predictor
        if adapter != predictor.manifest.name:
            raise RowRejectedError(f"adapter {adapter} is not loaded")
        return predictor


_ROW_ID = "request"  # the core names rows in its errors; a client knows its own by their pointer


def _example(question: Question) -> Example:
    if isinstance(question, TextQuestion):
        return TextExample(_ROW_ID, question.text)
    choices = tuple(Choice(option.label, option.text) for option in question.choices)
    return ChoiceExample(_ROW_ID, question.question, question.context, choices)


def _payload(row: EncodedRow) -> Row:
    if not isinstance(row.payload, Row):
        raise TypeError("the row was encoded by another engine")
    return row.payload


def _plan(sampling: Sampling) -> SamplingPlan:
    if sampling.design != "iid":
        raise ValueError(f"design must be iid, got {sampling.design}")
    return SamplingPlan(sampling.num_samples, sampling.seed, sampling.estimator, "iid")


def _calibrated(predictor: Predictor, card: AdapterCard) -> Calibrated:
    """Return what calibration adds to answers; a coverage that is void here is not shown."""
    stored = predictor.manifest.calibration
    if stored is None or card.calibration is None:
        return Calibrated()
    holds = card.calibration.void is None and bool(stored.prediction_sets)
    return Calibrated(stored.combined, stored.prediction_sets[0] if holds else None)
