"""One loaded adapter as the engine keeps it, and the stages of its loading."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import torch

from dalorra_core.artifact.signing import TrustedKeys, verify_signature
from dalorra_core.artifact.store import Artifact, load_artifact
from dalorra_core.data.encode import EncodedExample
from dalorra_core.errors import ConfigError
from dalorra_core.metrics.uncertainty import summarise
from dalorra_core.predictive.plan import SamplingPlan
from dalorra_core.predictive.predictor import Predictor
from dalorra_core.predictive.shared_base import SharedBase
from dalorra_core.sampling.designs import DESIGNS
from server.engines.answers import Calibrated
from server.engines.cards import adapter_card, answering_of
from server.engines.certify_rows import CertifyRows, required_rows
from server.ports import AdapterCard, Sampling

__all__ = ["Loaded", "Row", "calibrated_of", "plan_of", "verified_artifact"]


@dataclass(frozen=True, eq=False)
class Loaded:
    """An adapter that answers.

    Attributes:
        card: What the server may know of it.
        base: The base model that it stands on.
        predictor: Its functions.
        calibrated: What calibration adds to its answers.
        certify_rows: Its calibration rows; None when it stores none.
    """

    card: AdapterCard
    base: SharedBase
    predictor: Predictor
    calibrated: Calibrated
    certify_rows: CertifyRows | None

    @classmethod
    def on(
        cls,
        base: SharedBase,
        artifact: Artifact,
        *,
        deterministic: bool,
        named: Callable[[AdapterCard], AdapterCard],
    ) -> Self:
        """Put an adapter on a base model, test it and warm it.

        Args:
            base: The base model, which may be answering for others.
            artifact: The adapter, verified.
            deterministic: Answer each row alone.
            named: Gives a card the name and the id of this load.

        Raises:
            DalorraError: It cannot be served; the text says why.
        """
        predictor = Predictor.on(base, artifact, deterministic=deterministic, verify_golden=False)
        card = adapter_card(artifact, answering_of(predictor), predictor.check_golden())
        predictor.warm_up()
        summarise(torch.zeros(2, 1, 2).log_softmax(-1))  # its first call is slow
        rows = CertifyRows.of(artifact)
        memory = card.memory_bytes + (0 if rows is None else rows.num_bytes)
        card = named(replace(card, memory_bytes=memory))
        return cls(card, base, predictor, calibrated_of(artifact, card), rows)

    @property
    def rows(self) -> CertifyRows:
        """Its calibration rows.

        Raises:
            NotCalibratedError: It stores none.
        """
        return required_rows(self.certify_rows, self.card.name)

    def is_single(self, sampling: Sampling) -> bool:
        """Return whether there is one function only, hence no epistemic part."""
        return self.predictor.point_method or sampling.estimator == "mean_mask"


@dataclass(frozen=True, slots=True)
class Row:
    """What this engine keeps of an encoded question.

    It holds on to its adapter, so that a question in the queue is answered even when the adapter
    is unloaded meanwhile.

    Attributes:
        example: Its tokens.
        labels: Its labels, in the order of the answer.
        columns: Their places in the adapter's label set.
        adapter: Who answers it.
    """

    example: EncodedExample
    labels: tuple[str, ...]
    columns: tuple[int, ...]
    adapter: Loaded


def verified_artifact(directory: Path, trusted_keys: Path | None) -> tuple[Artifact, str | None]:
    """Return an artifact whose every byte is checked, and the id of the key that signed it.

    Args:
        directory: An artifact.
        trusted_keys: Keys of which one must have signed it; None asks for no signature.

    Raises:
        DalorraError: It cannot be trusted or read; the text says why.
    """
    artifact = load_artifact(directory)
    if trusted_keys is None:
        return artifact, None
    trusted = TrustedKeys.read(trusted_keys)
    return artifact, verify_signature(directory, artifact.manifest_sha256, trusted)


def plan_of(sampling: Sampling) -> SamplingPlan:
    """Return the core's name for a sampling.

    Raises:
        ConfigError: The design is unknown, as that of a foreign prediction id may be.
    """
    if sampling.design not in DESIGNS:
        raise ConfigError(f"design must be {' or '.join(DESIGNS)}, got {sampling.design}")
    return SamplingPlan(sampling.num_samples, sampling.seed, sampling.estimator, sampling.design)


def calibrated_of(artifact: Artifact, card: AdapterCard) -> Calibrated:
    """Return what calibration adds to answers; a coverage that is void here is not shown."""
    stored = artifact.manifest.calibration
    if stored is None or card.calibration is None:
        return Calibrated()
    holds = card.calibration.void is None and bool(stored.prediction_sets)
    return Calibrated(stored.combined, stored.prediction_sets[0] if holds else None)
