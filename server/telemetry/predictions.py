"""Metrics of answers: decisions, and the scores that drift is seen in.

Every child is looked up once, when its adapter is loaded: a row costs a few dict accesses and
increments, and a row of an adapter that has gone meanwhile is not counted.
"""

import logging
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass

from prometheus_client import Counter, Histogram

from server.decision import DECISIONS, REASONS, Verdict
from server.ports import AdapterCard, EncodedRow, ReferenceProfile, RowScores
from server.telemetry.edges import DRIFT_EDGES, INPUT_TOKENS, SAMPLES
from server.telemetry.families import AdapterKey, Children, Families

__all__ = ["ALL_LABELS", "MAX_LABELS", "PredictionMetrics"]

logger = logging.getLogger(__name__)

MAX_LABELS = 2000
"""Labels of all loaded adapters together that get series of their own; each costs four."""

ALL_LABELS = "(all)"
"""What stands for every label of an adapter that no longer fits under ``MAX_LABELS``."""


@dataclass(frozen=True, slots=True)
class _Series:
    """Everything one adapter counts into; ``mutual_information`` is None for point methods."""

    children: Children
    num_labels: int
    predictions: Mapping[tuple[str, str], Counter]
    reasons: Mapping[str, Counter]
    samples: Histogram
    input_tokens: Histogram
    confidence: Histogram
    entropy: Histogram
    mutual_information: Histogram | None
    label_mass: Histogram
    bin_edges: tuple[float, ...]
    bins: tuple[Counter, ...]


class PredictionMetrics:
    """Decisions and scores per adapter and revision."""

    def __init__(self, families: Families) -> None:
        whose = ("adapter", "revision")
        self._predictions = families.counter(
            "predictions", "Answered rows.", *whose, "label", "decision"
        )
        self._reasons = families.counter(
            "decision_reasons", "Reasons against accepting an answer.", *whose, "reason"
        )
        self._samples = families.histogram(
            "posterior_samples", "Posterior samples per answered row.", SAMPLES, "adapter"
        )
        self._input_tokens = families.histogram(
            "input_tokens", "Tokens per answered row.", INPUT_TOKENS, "adapter"
        )
        self._bins = families.counter(
            "confidence_bin", "Confidence by reference bin; default sampling only.", *whose, "bin"
        )
        self._scores = {
            name: families.histogram(
                f"{metric}_ratio", f"{text}; default sampling only.", DRIFT_EDGES[name], *whose
            )
            for name, metric, text in (
                ("confidence", "confidence", "Confidence"),
                ("predictive_entropy", "entropy", "Predictive entropy / ln K"),
                ("mutual_information", "mutual_information", "Mutual information / ln K"),
                ("label_mass", "label_mass", "Label mass"),
            )
        }
        self._loaded: dict[AdapterKey, _Series] = {}
        self._by_name: dict[str, Children] = {}

    def load(self, card: AdapterCard) -> bool:
        """Create every series an adapter will ever have.

        Returns:
            Whether its labels have series of their own.
        """
        self.unload(card)
        used = sum(series.num_labels for series in self._loaded.values())
        fits = used + len(card.labels) <= MAX_LABELS
        if not fits:
            logger.warning(
                "too many labels for metrics",
                extra={"adapter": card.name, "labels": len(card.labels), "limit": MAX_LABELS},
            )
        self._loaded[card.name, card.revision] = self._series(card, own_labels=fits)
        return fits

    def unload(self, card: AdapterCard) -> None:
        """Remove the series of an adapter; those without a revision go with its last one."""
        series = self._loaded.pop((card.name, card.revision), None)
        if series is None:
            return
        series.children.remove()
        if all(name != card.name for name, _ in self._loaded):
            self._by_name.pop(card.name).remove()

    def answered(
        self, card: AdapterCard, row: EncodedRow, scores: RowScores, verdict: Verdict
    ) -> None:
        """Count one answered row with its decision."""
        series = self._loaded.get((card.name, card.revision))
        if series is None:
            return
        series.predictions[scores.label, verdict.decision].inc()
        for reason in verdict.reasons:
            series.reasons[reason].inc()
        series.samples.observe(len(scores.samples))
        series.input_tokens.observe(row.num_tokens)

    def drift(self, card: AdapterCard, scores: RowScores) -> None:
        """Note the scores of a row that was sampled as the adapter was calibrated."""
        series = self._loaded.get((card.name, card.revision))
        if series is None:
            return
        series.confidence.observe(scores.confidence)
        if series.bins:
            series.bins[bisect_right(series.bin_edges, scores.confidence)].inc()
        series.entropy.observe(scores.normalized_entropy)
        if series.mutual_information is not None and scores.mutual_information is not None:
            # H_norm / H is 1 / ln K, K being the row's own number of choices; H = 0 leaves MI 0
            entropy = scores.predictive_entropy
            per_nat = scores.normalized_entropy / entropy if entropy > 0 else 0.0
            series.mutual_information.observe(scores.mutual_information * per_nat)
        if scores.label_mass is not None:
            series.label_mass.observe(scores.label_mass)

    def _series(self, card: AdapterCard, *, own_labels: bool) -> _Series:
        children = Children()
        whose = (card.name, card.revision)
        shared = self._by_name.setdefault(card.name, Children())
        scores = {
            name: children.make(histogram, *whose)
            for name, histogram in self._scores.items()
            if name != "mutual_information" or not card.point_method
        }
        reference = card.calibration.reference if card.calibration else None
        return _Series(
            children=children,
            num_labels=len(card.labels) if own_labels else 0,
            predictions={
                (label, decision): children.make(
                    self._predictions, *whose, label if own_labels else ALL_LABELS, decision
                )
                for label in card.labels
                for decision in DECISIONS
            },
            reasons={r: children.make(self._reasons, *whose, r) for r in REASONS},
            samples=shared.make(self._samples, card.name),
            input_tokens=shared.make(self._input_tokens, card.name),
            confidence=scores["confidence"],
            entropy=scores["predictive_entropy"],
            mutual_information=scores.get("mutual_information"),
            label_mass=scores["label_mass"],
            bin_edges=reference.confidence_bin_edges if reference else (),
            bins=tuple(
                children.make(self._bins, *whose, str(number)) for number in _bins(reference)
            ),
        )


def _bins(reference: ReferenceProfile | None) -> range:
    return range(len(reference.confidence_bin_edges) + 1 if reference else 0)
