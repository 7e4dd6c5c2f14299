"""One base model and one artifact, ready to answer questions."""

import hashlib
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import torch

from dalorra_core.adapters.pack import SamplePack
from dalorra_core.artifact.calibration_record import CombinedScore
from dalorra_core.artifact.store import Artifact, load_artifact
from dalorra_core.base_models.loading import load_model, load_tokenizer, pick_device, pick_dtype
from dalorra_core.base_models.resolve import resolve_base_model
from dalorra_core.data.encode import EncodedExample, Truncation, encode
from dalorra_core.data.examples import Example
from dalorra_core.data.labels import LabelSet
from dalorra_core.data.prompts import PromptTemplate
from dalorra_core.data.rows import parse_row
from dalorra_core.errors import ConfigError, GoldenProbeError
from dalorra_core.methods import METHODS
from dalorra_core.methods.method import Draw
from dalorra_core.predictive.forward import LabelModel
from dalorra_core.predictive.matching import check_base, state_of
from dalorra_core.predictive.scoring import Prediction, joined, padded_token_limit, score_rows
from dalorra_core.predictive.tempering import tempered

__all__ = ["GOLDEN_TOLERANCE", "Predictor", "SamplingPlan"]

GOLDEN_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1}
"""Largest accepted difference of a golden probe's probabilities, by dtype.

float32 sums differ between processors and libraries in the last digits only; bfloat16 keeps 8 bits,
and thirty layers of it move a probability by a few hundredths (measured in docs/results.md).
"""


@dataclass(frozen=True)
class SamplingPlan:
    """Which predictive is asked for.

    Attributes:
        num_samples: M, at least 1; ignored by ``mean_mask`` and by point methods.
        seed: Picks the mask set.
        estimator: ``monte_carlo`` averages the probabilities of M samples; ``mean_mask`` is the one
            deterministic pass at the posterior mean, which has no epistemic part.
        design: How the samples are drawn together.
    """

    num_samples: int = 10
    seed: int = 0
    estimator: Literal["monte_carlo", "mean_mask"] = "monte_carlo"
    design: Literal["iid"] = "iid"

    def __post_init__(self) -> None:
        """Refuse an empty mixture."""
        if self.num_samples < 1:
            raise ConfigError(f"num_samples must be at least 1, got {self.num_samples}")


class Predictor:
    """Answers encoded rows with the M posterior samples of one adapter.

    ``encode`` may be called from any thread; ``predict`` runs one forward at a time.
    """

    def __init__(
        self,
        artifact: Artifact,
        model: Any,
        tokenizer: Any,
        *,
        device: torch.device,
        deterministic: bool = False,
        max_padded_tokens: int | None = None,
    ) -> None:
        manifest = artifact.manifest
        self.artifact, self.manifest = artifact, manifest
        self.device, self.deterministic = device, deterministic
        self.method = METHODS[manifest.method.name]
        self._state = state_of(artifact)
        self._label_set = LabelSet(manifest.labels.labels, manifest.labels.token_ids)
        self._template = PromptTemplate(
            manifest.prompt.kind, manifest.prompt.name, manifest.prompt.template
        )
        self._tokenizer = tokenizer
        self._limit = max_padded_tokens or padded_token_limit(device)
        self.dtype: torch.dtype = next(model.parameters()).dtype
        self.model = LabelModel(model, self._state.specs, self._label_set)
        self._packs: dict[SamplingPlan, SamplePack] = {}
        self._lock = threading.Lock()

    @classmethod
    def load(
        cls,
        adapter_dir: str | Path,
        *,
        base: str | None = None,
        device: str = "auto",
        dtype: str = "auto",
        deterministic: bool = False,
        verify_golden: bool = True,
    ) -> Self:
        """Load and check an adapter with its base model.

        Args:
            adapter_dir: Artifact directory.
            base: Base model directory, hub id or alias; None takes the one named in the manifest.
            device: auto, cpu, cuda or cuda:N.
            dtype: Of the base model: auto, float32 or bfloat16.
            deterministic: Answer each row alone, so equal questions give bitwise equal answers.
            verify_golden: Refuse an adapter that does not reproduce its stored probabilities.

        Raises:
            ArtifactError: See ``load_artifact``; BaseMismatchError names both fingerprints.
            BaseModelError: If the base model cannot be found or read.
            GoldenProbeError: If a stored answer is not reproduced.
        """
        artifact = load_artifact(Path(adapter_dir))
        directory = resolve_base_model(base if base is not None else artifact.manifest.base.id)
        check_base(artifact, directory)
        where = pick_device(device)
        model = load_model(directory, where, pick_dtype(dtype, where))
        predictor = cls(
            artifact, model, load_tokenizer(directory), device=where, deterministic=deterministic
        )
        if verify_golden:
            predictor.check_golden()
        return predictor

    @property
    def labels(self) -> tuple[str, ...]:
        """Label names in the order of every probability vector."""
        return self.manifest.labels.labels

    @property
    def kind(self) -> Literal["text", "choice"]:
        """Whether questions are texts or have choices of their own."""
        return self.manifest.prompt.kind

    @property
    def revision(self) -> str:
        """First 12 hex digits of the adapter's sha256."""
        return self.artifact.revision

    @property
    def max_tokens(self) -> int:
        """Longest prompt in tokens."""
        return self.manifest.prompt.max_tokens

    @property
    def point_method(self) -> bool:
        """True when there is one function only, hence no epistemic part."""
        return not self.method.stochastic

    @property
    def temperature(self) -> float:
        """Softmax temperature of the artifact's calibration; 1 before it."""
        found = self.manifest.calibration
        return 1.0 if found is None else found.temperature.value

    @property
    def combined(self) -> CombinedScore | None:
        """The fitted score of the artifact's calibration, where there is one."""
        found = self.manifest.calibration
        return None if found is None else found.combined

    @property
    def default_plan(self) -> SamplingPlan:
        """The predictive stored in the artifact."""
        p = self.manifest.predictive
        return SamplingPlan(p.num_samples, p.seed, "monte_carlo", p.design)

    def encode(self, example: Example, truncate: Truncation = "none") -> EncodedExample:
        """Return one question as token ids; an unknown right label becomes -1.

        Raises:
            InputError: If it is empty or malformed; InputTooLongError when over ``max_tokens``.
        """
        return encode(
            example,
            tokenizer=self._tokenizer,
            template=self._template,
            label_set=self._label_set,
            max_tokens=self.max_tokens,
            truncate=truncate,
            unknown_label="ignore",
        )

    def mask_set(self, plan: SamplingPlan) -> str:
        """Return the id of the M functions that ``plan`` fixes, such as ``ms_3f9a...``."""
        effective = self._effective(plan)
        text = f"{self.artifact.sha256}|{effective.estimator}|{effective.design}"
        if effective.estimator == "monte_carlo":
            text += f"|{effective.num_samples}|{effective.seed}"
        return f"ms_{hashlib.sha256(text.encode()).hexdigest()[:12]}"

    def num_functions(self, plan: SamplingPlan) -> int:
        """Return how many samples ``plan`` really runs: M, or 1 for a deterministic pass."""
        effective = self._effective(plan)
        return effective.num_samples if effective.estimator == "monte_carlo" else 1

    def _effective(self, plan: SamplingPlan) -> SamplingPlan:
        """A point method has one function, whatever was asked for."""
        deterministic = plan.estimator == "mean_mask" or self.point_method
        return SamplingPlan(1, 0, "mean_mask", plan.design) if deterministic else plan

    def pack(self, plan: SamplingPlan) -> SamplePack:
        """Return the sample pack of ``plan``, drawn once and kept (a few recent ones)."""
        effective = self._effective(plan)
        with self._lock:
            if effective not in self._packs:
                if len(self._packs) >= _PACKS_KEPT:
                    self._packs.pop(next(iter(self._packs)))
                self._packs[effective] = self._draw(effective).to(self.device, torch.float32)
            return self._packs[effective]

    def _draw(self, plan: SamplingPlan) -> SamplePack:
        config = self.manifest.method
        if plan.estimator == "mean_mask":
            return self.method.mean_pack(self._state, config)
        draw = Draw((self.artifact.sha256, plan.seed), plan.num_samples)
        return self.method.predict_pack(self._state, config, draw)

    def predict(
        self,
        rows: Sequence[EncodedExample],
        plan: SamplingPlan | None = None,
        *,
        label_mass: bool = True,
        calibrated: bool = True,
        on_progress: Callable[[int], None] | None = None,
    ) -> Prediction:
        """Return the label log-probabilities of every sample for every row.

        Args:
            rows: At least one encoded row.
            plan: Which predictive; None for the artifact's default.
            label_mass: Also compute the share of the label tokens in the full vocabulary.
            calibrated: Apply the temperature that the artifact stores.
            on_progress: Called with the number of rows finished since the last call.
        """
        pack = self.pack(plan if plan is not None else self.default_plan)
        parts = [
            score_rows(
                self.model,
                pack,
                part,
                num_labels=len(self.labels),
                max_padded_tokens=self._limit,
                label_mass=label_mass,
                on_progress=on_progress,
            )
            for part in ([[row] for row in rows] if self.deterministic else [rows])
        ]
        return tempered(joined(parts), self.temperature if calibrated else 1.0)

    def self_test(self) -> float:
        """Return the largest difference to the stored probabilities; 0 when none are stored."""
        worst = 0.0
        for probe in self.manifest.golden:
            example = parse_row({"id": probe.id, **probe.row}, require_labels=False)
            row = self.encode(example, truncate="end")  # as when the probe was stored
            # Probes were stored before any temperature was known.
            answer = self.predict([row], label_mass=False, calibrated=False)
            probs = answer.log_probs.double().exp().mean(0)[0]
            stored = torch.tensor(probe.probs, dtype=torch.float64)
            worst = max(worst, float((probs - stored).abs().max()))
        return worst

    def check_golden(self) -> None:
        """Raise GoldenProbeError when the stored probabilities are not reproduced."""
        worst, limit = self.self_test(), GOLDEN_TOLERANCE[self.dtype]
        if not worst <= limit:
            raise GoldenProbeError(
                f"{self.artifact.directory}: stored probabilities are off by {worst:.3g}; the "
                f"limit in {str(self.dtype).removeprefix('torch.')} is {limit}. The base model, "
                "the tokenizer or a library computes something else than when it was made"
            )


_PACKS_KEPT = 8
