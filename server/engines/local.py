"""The engine in this process: one base model and one adapter through ``dalorra_core``."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath

import torch
from transformers.utils import logging as transformers_logging

from dalorra_core.artifact.manifest import Policy as StoredPolicy
from dalorra_core.data.encode import EncodedExample
from dalorra_core.data.examples import Choice, ChoiceExample, Example, TextExample
from dalorra_core.errors import DataError, InputError, InputTooLongError
from dalorra_core.metrics.uncertainty import summarise
from dalorra_core.predictive.predictor import Predictor, SamplingPlan
from dalorra_core.predictive.scoring import Prediction, padded_token_limit
from server.ports import (
    AdapterCard,
    BatchKey,
    BatchScores,
    ChoiceQuestion,
    EncodedRow,
    EngineFatalError,
    Policy,
    Question,
    RowRejectedError,
    RowScores,
    RowTooLongError,
    Sampling,
    TextQuestion,
    Truncate,
)

__all__ = ["LocalEngine"]


@dataclass(frozen=True, slots=True)
class _Row:
    """What this engine keeps of an encoded question.

    Attributes:
        example: Its tokens.
        labels: Its labels, in the order of the answer.
        columns: Their places in the adapter's label set.
    """

    example: EncodedExample
    labels: tuple[str, ...]
    columns: tuple[int, ...]


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
        return (self._card(self._loaded),)

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
        row = _Row(example, labels, tuple(names.index(label) for label in labels))
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
        scores = _score(prediction, payloads, single=single)
        return BatchScores(scores, forward_s, time.perf_counter() - began_s - forward_s)

    def mask_set(self, key: BatchKey) -> str | None:
        """Return the id of the samples; None where nothing is sampled."""
        predictor = self._predictor_of(key.adapter)
        if predictor.point_method or key.sampling.estimator == "mean_mask":
            return None
        return predictor.mask_set(_plan(key.sampling))

    def close(self) -> None:
        """Let go of the model."""
        self._loaded = None

    def _predictor_of(self, adapter: str) -> Predictor:
        predictor = self._predictor
        if adapter != predictor.manifest.name:
            raise RowRejectedError(f"adapter {adapter} is not loaded")
        return predictor

    def _card(self, predictor: Predictor) -> AdapterCard:
        manifest = predictor.manifest
        plan = predictor.default_plan
        defaults = Sampling(
            num_samples=1 if predictor.point_method else plan.num_samples,
            seed=plan.seed,
            estimator=plan.estimator,
            design=plan.design,
        )
        return AdapterCard(
            name=manifest.name,
            revision=predictor.revision,
            kind=predictor.kind,
            labels=predictor.labels,
            method=manifest.method.name,
            point_method=predictor.point_method,
            base=_public_name(manifest.base.id),
            base_fingerprint=manifest.base.fingerprint,
            max_tokens=predictor.max_tokens,
            defaults=defaults,
            policies=tuple(_policy(policy) for policy in manifest.policies),
            prompt=manifest.prompt.name,
            prompt_sha256=manifest.prompt.sha256,
            mask_set=self.mask_set(BatchKey(manifest.name, defaults)),
            selftest_max_abs_error=predictor.self_test() if manifest.golden else None,
        )


def _score(prediction: Prediction, payloads: list[_Row], *, single: bool) -> tuple[RowScores, ...]:
    """Return the scores of every row; ``single`` says that there is one function only."""
    log_probs = prediction.log_probs  # (M, B, C)
    allowed = torch.tensor([len(payload.columns) for payload in payloads])  # (B,)
    summary = summarise(log_probs, allowed)
    if not torch.isfinite(summary.predictive_entropy).all():
        raise FloatingPointError("the model gave probabilities that are not finite")
    probs = summary.mean_probs.tolist()  # (B, C)
    samples = log_probs.double().exp().tolist()  # (M, B, C)
    mass = prediction.label_mass.tolist() if prediction.label_mass is not None else None
    return tuple(
        RowScores(
            labels=payload.labels,
            probs=tuple(probs[b][column] for column in payload.columns),
            confidence=summary.confidence[b].item(),
            label_mass=None if mass is None else mass[b],
            predictive_entropy=summary.predictive_entropy[b].item(),
            normalized_entropy=summary.normalized_entropy[b].item(),
            variation_ratio=summary.variation_ratio[b].item(),
            expected_entropy=None if single else summary.expected_entropy[b].item(),
            mutual_information=None if single else summary.mutual_information[b].item(),
            confidence_std=None if single else summary.confidence_std[b].item(),
            samples=tuple(
                tuple(sample[b][column] for column in payload.columns) for sample in samples
            ),
        )
        for b, payload in enumerate(payloads)
    )


_ROW_ID = "request"  # the core names rows in its errors; a client knows its own by their pointer


def _example(question: Question) -> Example:
    if isinstance(question, TextQuestion):
        return TextExample(_ROW_ID, question.text)
    choices = tuple(Choice(option.label, option.text) for option in question.choices)
    return ChoiceExample(_ROW_ID, question.question, question.context, choices)


def _payload(row: EncodedRow) -> _Row:
    if not isinstance(row.payload, _Row):
        raise TypeError("the row was encoded by another engine")
    return row.payload


def _plan(sampling: Sampling) -> SamplingPlan:
    if sampling.design != "iid":
        raise ValueError(f"design must be iid, got {sampling.design}")
    return SamplingPlan(sampling.num_samples, sampling.seed, sampling.estimator, "iid")


def _policy(stored: StoredPolicy) -> Policy:
    return Policy(
        name=stored.name,
        min_confidence=stored.min_confidence,
        abstain_score=stored.abstain_score,
        abstain_threshold=stored.abstain_threshold,
        abstain_above=stored.abstain_above,
        target_selective_risk=stored.target_selective_risk,
        chosen_on=stored.chosen_on.model_dump(mode="json"),
    )


def _public_name(base: str) -> str:
    """Return a base model's name without the directories of the host it was trained on."""
    return PurePath(base).name if base.startswith(("/", "~", ".")) else base
