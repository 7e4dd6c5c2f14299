"""One base model and one artifact, ready to answer questions."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Literal, Self

import torch
from torch import Tensor

from dalorra_core.adapters.pack import SamplePack
from dalorra_core.adapters.state import AdapterState
from dalorra_core.artifact.calibration_record import CombinedScore
from dalorra_core.artifact.store import Artifact, load_artifact
from dalorra_core.config import Design, Estimator
from dalorra_core.data.encode import EncodedExample, Truncation
from dalorra_core.data.examples import Example
from dalorra_core.errors import ArtifactCorruptError, ConfigError, GoldenProbeError
from dalorra_core.methods import METHODS
from dalorra_core.methods.dalorra import PHI
from dalorra_core.methods.method import Draw
from dalorra_core.predictive.encoder import RowEncoder
from dalorra_core.predictive.forward import LabelModel
from dalorra_core.predictive.gates import gate_entropy, gate_probs
from dalorra_core.predictive.gaussian import score_gaussian
from dalorra_core.predictive.linearised import gate_covariance, gates_to_linearise
from dalorra_core.predictive.matching import check_base, state_of
from dalorra_core.predictive.plan import (
    BYTES_KEPT,
    LINEARISED_DRAWS,
    MOST_PACK_BYTES,
    SAMPLES_KEPT,
    KeptPacks,
    SamplingPlan,
    plan_of,
    sampled_plan_of,
)
from dalorra_core.predictive.scoring import Prediction, joined, score_rows
from dalorra_core.predictive.shared_base import SharedBase, identify
from dalorra_core.predictive.stem import kept_stem_states
from dalorra_core.predictive.tempering import pooled, tempered
from dalorra_core.predictive.unpadded import any_length

__all__ = ["GOLDEN_TOLERANCE", "Predictor", "SamplingPlan"]

GOLDEN_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1}
"""Largest accepted difference of a golden probe's probabilities, by dtype.

float32 sums differ between processors and libraries in the last digits only; bfloat16 keeps 8 bits,
and thirty layers of it move a probability by a few hundredths (measured in docs/results.md).
"""


class Predictor:
    """Answers encoded rows with the M posterior samples of one adapter.

    ``encode`` may be called from any thread. ``predict`` too: forwards on one base take turns.
    """

    def __init__(
        self,
        artifact: Artifact,
        base: SharedBase,
        *,
        deterministic: bool = False,
        max_padded_tokens: int | None = None,
    ) -> None:
        manifest = artifact.manifest
        self.artifact, self.manifest = artifact, manifest
        self.device, self.dtype, self.deterministic = base.device, base.dtype, deterministic
        self.method = METHODS[manifest.method.name]
        self.max_padded_tokens = max_padded_tokens or base.pass_tokens
        state = state_of(artifact)
        whole = self.method.logit_covariance is not None  # which asks for all of it every time
        self._state = _on_device(state, base.device, whole=whole)
        self._encoder = RowEncoder(manifest, base.tokenizer)
        self.model = LabelModel(base.trunk, self._state.specs, self._encoder.label_set)
        self._packs = KeptPacks(self._draw, self._own_bytes)

    @classmethod
    def on(
        cls,
        base: SharedBase,
        artifact: Artifact,
        *,
        deterministic: bool = False,
        verify_golden: bool = True,
    ) -> Self:
        """Put an adapter on a base model that is loaded; others may stand on it already.

        May run in one thread while adapters on the same base answer in another.

        Args:
            base: The base model.
            artifact: The adapter, from ``load_artifact``.
            deterministic: Answer each row alone, so equal questions give bitwise equal answers.
            verify_golden: Refuse an adapter that does not reproduce its stored probabilities.

        Raises:
            ArtifactError: See ``load_artifact``; BaseMismatchError names both fingerprints.
            BaseModelError: If the adapter's modules are not those of the base model.
            GoldenProbeError: If a stored answer is not reproduced.
        """
        check_base(artifact, base.identity)
        predictor = cls(artifact, base, deterministic=deterministic)
        if verify_golden:
            predictor.check_golden()
        return predictor

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
        """Load and check an adapter with a base model of its own.

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
        identity = identify(base if base is not None else artifact.manifest.base.id)
        check_base(artifact, identity)  # before the slow part
        shared = SharedBase.load(identity, device=device, dtype=dtype, packed=True)
        return cls.on(shared, artifact, deterministic=deterministic, verify_golden=verify_golden)

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
        """True when there is one answer only, hence no epistemic part."""
        return not self.method.stochastic or self._one_answer

    @property
    def fixed_functions(self) -> int | None:
        """How many functions there are where that is fixed, as for an ensemble; else None."""
        return self.method.num_functions(self.manifest.method)

    @property
    def designs(self) -> tuple[Design, ...]:
        """How its samples may be drawn together; ``iid`` alone where nothing is drawn."""
        return self.method.designs(self.manifest.method)

    @cached_property
    def estimators(self) -> tuple[Estimator, ...]:
        """What can answer here; which of them does by default is in ``default_plan``."""
        try:
            _ = self._linearised_gates
        except ConfigError:
            return ("monte_carlo", "mean_mask")
        return ("monte_carlo", "mean_mask", "linearised")

    @cached_property
    def _linearised_gates(self) -> dict[str, Tensor]:
        """Keep probabilities of the gates that a linearised answer is about.

        Raises:
            ConfigError: There is none of this adapter.
        """
        mean = self.method.mean_pack(self._state, self.manifest.method)
        return gates_to_linearise(self.manifest.method, mean, num_labels=len(self.labels))

    @property
    def shared_depth(self) -> float:
        """Share of the layers that the samples of the default plan have in common, in [0, 1)."""
        return self.model.shared_depth(self.pack(self.default_plan))

    @property
    def unpadded(self) -> bool:
        """Whether rows of unlike length can share a forward pass without padding."""
        return self.model.trunk.unpads and any_length([self.pack(self.default_plan)])

    def answers_alone(self, plan: SamplingPlan) -> bool:
        """Return whether rows cannot share a forward pass with those of other adapters."""
        gaussian = self.method.logit_covariance is not None or plan.estimator == "linearised"
        return self.deterministic or gaussian or self._one_answer

    @property
    def _one_answer(self) -> bool:
        return self.method.one_answer(self.manifest.method)

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
        return plan_of(self.manifest.predictive)

    @property
    def sampled_plan(self) -> SamplingPlan:
        """The stored predictive of who asks for samples; see ``sampled_plan_of``."""
        return sampled_plan_of(self.manifest.predictive)

    def encode(self, example: Example, truncate: Truncation = "none") -> EncodedExample:
        """Return one question as token ids; an unknown right label becomes -1.

        Raises:
            InputError: If it is empty or malformed; InputTooLongError when over ``max_tokens``.
        """
        return self._encoder(example, truncate)

    def mask_set(self, plan: SamplingPlan) -> str:
        """Return the id of the M functions that ``plan`` fixes, such as ``ms_3f9a...``."""
        effective = self._effective(plan)
        text = f"{self.artifact.sha256}|{effective.estimator}|{effective.design}"
        if effective.estimator != "mean_mask":
            text += f"|{effective.num_samples}|{effective.seed}"
        return f"ms_{hashlib.sha256(text.encode()).hexdigest()[:12]}"

    def num_functions(self, plan: SamplingPlan) -> int:
        """Return how many functions answer under ``plan``: M, or 1 for a deterministic pass."""
        effective = self._effective(plan)
        return effective.num_samples

    def passes(self, plan: SamplingPlan) -> int:
        """Return what a row costs under ``plan``, in passes; a backward one counts as much."""
        if plan.estimator == "linearised":
            return 1 + len(self.labels)
        return self.num_functions(plan)

    def _effective(self, plan: SamplingPlan) -> SamplingPlan:
        """Some methods have one function, or a certain number of them, whatever was asked for.

        Raises:
            ConfigError: The method's samples cannot be drawn by the plan's design, or the network
                cannot answer linearised.
        """
        if plan.estimator == "mean_mask":
            return SamplingPlan(1, 0, "mean_mask")
        if plan.estimator == "linearised":
            _ = self._linearised_gates  # says why there is none
            return SamplingPlan(LINEARISED_DRAWS, plan.seed, "linearised")
        self.method.check_design(self.manifest.method, plan.design)
        if self.point_method:
            return SamplingPlan(1, 0, "mean_mask")
        if self.fixed_functions is not None:
            return SamplingPlan(self.fixed_functions, 0, plan.estimator)
        return plan

    def pack(self, plan: SamplingPlan) -> SamplePack:
        """Return the sample pack of ``plan``, drawn once and kept (a few recent ones).

        Raises:
            ConfigError: It would take more than ``MOST_PACK_BYTES``, or the method cannot follow
                its design.
        """
        effective = self._effective(plan)
        if effective.estimator == "monte_carlo":
            self._check_size(effective.num_samples)
        return self._packs.of(effective)

    def _check_size(self, num_samples: int) -> None:
        most = self.max_num_samples
        if most is not None and num_samples > most:
            raise ConfigError(
                f"num_samples must be at most {most} for this adapter, got {num_samples}: a sample "
                f"takes {self._bytes_per_sample} bytes, and all of them may take {MOST_PACK_BYTES}"
            )

    @property
    def max_num_samples(self) -> int | None:
        """The largest M whose samples fit ``MOST_PACK_BYTES``; None where samples take nothing."""
        if self._bytes_per_sample == 0:
            return None
        return max(1, MOST_PACK_BYTES // self._bytes_per_sample)

    @cached_property
    def _bytes_per_sample(self) -> int:
        """What one more sample takes in memory; 0 where M is fixed or nothing is drawn."""
        if self.point_method or self.fixed_functions is not None:
            return 0
        one, two = (
            self._own_bytes(self._draw(replace(self.sampled_plan, num_samples=m))) for m in (1, 2)
        )
        return two - one

    def _draw(self, plan: SamplingPlan) -> SamplePack:
        config = self.manifest.method
        if plan.estimator != "monte_carlo":
            found = self.method.mean_pack(self._state, config)
        else:
            key = (self.artifact.sha256, plan.seed)
            draw = Draw(key, plan.num_samples, design=plan.design)
            found = self.method.predict_pack(self._state, config, draw).condensed()
        return found.to(self.device, torch.float32)

    @property
    def memory_bytes(self) -> int:
        """What this adapter keeps in memory, in bytes, without the base model.

        The tensors of its artifact (with their copies on the device, where that is another one),
        its rows of the output projection, and the most that kept sample packs may take: each
        sample's own tensors, such as gates, times ``SAMPLES_KEPT`` or the number there is, not
        above ``BYTES_KEPT``, and not below the default plan's, which is kept whatever its size.
        """
        head = self.model.head
        scores = self.artifact.calibration_scores or {}
        tensors = [*self._state.params.values(), *self.artifact.tensors.values(), *scores.values()]
        kept = {t.data_ptr(): t.nbytes for t in (*tensors, head.weight, head.token_ids)}
        pack = self.pack(self.default_plan)
        most = SAMPLES_KEPT if self.fixed_functions is None else self.fixed_functions
        own = self._own_bytes(pack)
        return sum(kept.values()) + max(own, min(own * most // pack.num_samples, BYTES_KEPT))

    def _own_bytes(self, pack: SamplePack) -> int:
        """Return the memory of a pack's tensors that are not the adapter's own, in bytes.

        With what transforms will draw for the longest prompt that the adapter takes.
        """
        shared = {t.untyped_storage().data_ptr() for t in self._state.params.values()}
        own = (t for t in pack.tensors() if t.untyped_storage().data_ptr() not in shared)
        return sum(t.nbytes for t in own) + pack.bytes_to_come(self.max_tokens)

    def predict(
        self,
        rows: Sequence[EncodedExample],
        plan: SamplingPlan | None = None,
        *,
        label_mass: bool = True,
        calibrated: bool = True,
        on_progress: Callable[[int], None] | None = None,
        wanted: Callable[[int], bool] | None = None,
    ) -> Prediction:
        """Return the label log-probabilities of every sample for every row.

        Args:
            rows: At least one encoded row.
            plan: Which predictive; None for the artifact's default.
            label_mass: Also compute the share of the label tokens in the full vocabulary.
            calibrated: Apply the temperature that the artifact stores.
            on_progress: Called with the number of rows finished since the last call.
            wanted: Asked before every forward pass whether somebody still waits for the row at
                this place; see ``score_together``.

        Raises:
            ConfigError: See ``pack``.
        """
        score = self._scorer(self._effective(plan if plan is not None else self.default_plan))
        stems = None if self.deterministic else kept_stem_states(self.model, rows)
        parts = [
            score(
                rows[start:stop],
                label_mass=label_mass,
                on_progress=on_progress,
                wanted=None if wanted is None else _from(start, wanted),
                stems=stems,
            )
            for start, stop in self._runs(len(rows))
        ]
        found = pooled(joined(parts)) if self._one_answer else joined(parts)
        return tempered(found, self.temperature if calibrated else 1.0)

    def gate_entropy(self, rows: Sequence[EncodedExample]) -> Tensor | None:
        """Return the mean entropy of the gates of each row, (n,) in nats; None without gates.

        Gates that do not look at the question have the same entropy in every row.

        Args:
            rows: At least one encoded row.
        """
        if PHI not in self._state.params:
            return None
        pack = self.pack(SamplingPlan(estimator="mean_mask"))
        limit = self.max_padded_tokens
        return gate_entropy(gate_probs(self.model, pack, rows, max_padded_tokens=limit))

    def _scorer(self, plan: SamplingPlan) -> Callable[..., Prediction]:
        """Return the function that answers rows under an effective plan."""
        if plan.estimator == "linearised":
            return self._linearised_scorer(plan)
        covariance = self.method.logit_covariance
        if covariance is None or (plan.estimator == "mean_mask" and not self._one_answer):
            return partial(
                score_rows,
                self.model,
                self.pack(plan),
                num_labels=len(self.labels),
                max_padded_tokens=self.max_padded_tokens,
            )
        return partial(
            score_gaussian,
            self.model,
            self.pack(replace(plan, estimator="mean_mask")),
            modules=self.method.gradient_modules(self._state.specs, self.manifest.method),
            covariance=partial(covariance, self._state, self.manifest.method),
            draw=None
            if self._one_answer
            else Draw((self.artifact.sha256, plan.seed), plan.num_samples),
            max_padded_tokens=self.max_padded_tokens,
        )

    def _linearised_scorer(self, plan: SamplingPlan) -> Callable[..., Prediction]:
        mean, keep = self.pack(plan), self._linearised_gates
        return partial(
            score_gaussian,
            self.model,
            mean,
            modules=tuple(keep),
            covariance=gate_covariance(mean, keep),
            draw=Draw((self.artifact.sha256, plan.seed, "linearised"), plan.num_samples),
            max_padded_tokens=self.max_padded_tokens,
        )

    def _runs(self, count: int) -> list[tuple[int, int]]:
        """Return the runs of rows that may share a forward pass: (start, stop)."""
        return [(b, b + 1) for b in range(count)] if self.deterministic else [(0, count)]

    def warm_up(self) -> None:
        """Answer one row as a request would be, so that the first real one is not slow.

        Raises:
            ArtifactCorruptError: The adapter gives probabilities that are not finite.
        """
        row = EncodedExample("warm-up", (1,) * min(8, self.max_tokens), -1, None, truncated=False)
        if not bool(self.predict([row]).log_probs.isfinite().all()):
            raise ArtifactCorruptError(
                f"{self.artifact.directory}: its tensors give probabilities that are not finite"
            )

    def golden_rows(self) -> list[EncodedExample]:
        """Return the questions of the golden probes, encoded as when they were stored."""
        return [self._encoder.probe(probe) for probe in self.manifest.golden]

    def self_test(self) -> float:
        """Return the largest difference to the stored probabilities; 0 when none are stored.

        NaN when an answer is not finite.

        Raises:
            GoldenProbeError: A probe stores another number of probabilities than there are labels.
        """
        plan = plan_of(self.manifest.golden_predictive or self.manifest.predictive)
        differences = [0.0]
        for probe, row in zip(self.manifest.golden, self.golden_rows(), strict=True):
            # Probes were stored before any temperature was known.
            answer = self.predict([row], plan, label_mass=False, calibrated=False)
            probs = answer.log_probs.double().exp().mean(0)[0]
            stored = torch.tensor(probe.probs, dtype=torch.float64)
            if probs.shape != stored.shape:
                raise GoldenProbeError(
                    f"{self.artifact.directory}: probe {probe.id} stores {len(stored)} "
                    f"probabilities, the adapter has {len(probs)} labels"
                )
            differences.append(float((probs - stored).abs().max()))
        return float(torch.tensor(differences, dtype=torch.float64).max())  # NaN wins here

    def check_golden(self) -> float:
        """Return what ``self_test`` finds.

        Raises:
            GoldenProbeError: The stored probabilities are not reproduced.
        """
        worst, limit = self.self_test(), GOLDEN_TOLERANCE[self.dtype]
        if not worst <= limit:
            raise GoldenProbeError(
                f"{self.artifact.directory}: stored probabilities are off by {worst:.3g}; the "
                f"limit in {str(self.dtype).removeprefix('torch.')} is {limit}. The base model, "
                "the tokenizer or a library computes something else than when it was made"
            )
        return worst


def _on_device(state: AdapterState, device: torch.device, *, whole: bool) -> AdapterState:
    """Return a state whose factors, or the whole of it, are on the device, once for all packs.

    The rest stays on the CPU: gates are drawn there, so that they are the same on every device.
    """
    moved = {
        name: value.to(device) if whole or name.endswith((".lora_A", ".lora_B")) else value
        for name, value in state.params.items()
    }
    return replace(state, params=moved)


def _from(start: int, wanted: Callable[[int], bool]) -> Callable[[int], bool]:
    """Return ``wanted`` for rows that are counted from ``start`` on."""
    return lambda place: wanted(start + place)
