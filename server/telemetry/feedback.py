"""Metrics of feedback: how often accepted answers were wrong, whether certificates still hold."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from prometheus_client import Counter
from prometheus_client.metrics_core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from server.decision import DECISIONS
from server.ports import AdapterCard, FeedbackRisk
from server.telemetry.families import AdapterKey, Children, Families

__all__ = ["FEEDBACK_REJECTIONS", "NUM_BINS", "FeedbackGauges", "FeedbackMetrics"]

FEEDBACK_REJECTIONS = (
    "bad_prediction_id",
    "unknown_adapter",
    "unknown_label",
    "conflict",
    "unavailable",
)
NUM_BINS = 15  # equal-width confidence bins of the calibration error
_OUTCOMES = {True: "correct", False: "wrong"}
_WHOSE = ("adapter", "revision")


@dataclass(frozen=True, slots=True)
class _Series:
    children: Children
    outcomes: dict[tuple[str, bool], Counter]
    rows: tuple[Counter, ...]
    correct: tuple[Counter, ...]
    confidence: tuple[Counter, ...]


class FeedbackMetrics:
    """Counts what clients reported; a label for an adapter that is not loaded is not counted."""

    def __init__(self, families: Families) -> None:
        self._outcomes = families.counter(
            "feedback", "Answers that got their true label.", *_WHOSE, "decision", "outcome"
        )
        self._rows = families.counter(
            "calibration_bin", "Labelled answers by confidence bin.", *_WHOSE, "bin"
        )
        self._correct = families.counter(
            "calibration_bin_correct", "Right ones among them.", *_WHOSE, "bin"
        )
        self._confidence = families.counter(
            "calibration_bin_confidence_sum", "Sum of their confidence.", *_WHOSE, "bin"
        )
        rejections = families.counter("feedback_rejections", "Refused feedback.", "reason")
        self._rejections = {reason: rejections.labels(reason) for reason in FEEDBACK_REJECTIONS}
        self._loaded: dict[AdapterKey, _Series] = {}

    def load(self, card: AdapterCard) -> None:
        """Create the series of an adapter."""
        self.unload(card)
        children = Children()
        key = (card.name, card.revision)

        def per_bin(counter: Counter) -> tuple[Counter, ...]:
            return tuple(children.make(counter, *key, str(bin_)) for bin_ in range(NUM_BINS))

        self._loaded[key] = _Series(
            children=children,
            outcomes={
                (decision, right): children.make(self._outcomes, *key, decision, outcome)
                for decision in DECISIONS
                for right, outcome in _OUTCOMES.items()
            },
            rows=per_bin(self._rows),
            correct=per_bin(self._correct),
            confidence=per_bin(self._confidence),
        )

    def unload(self, card: AdapterCard) -> None:
        """Remove them."""
        series = self._loaded.pop((card.name, card.revision), None)
        if series is not None:
            series.children.remove()

    def labelled(
        self, key: AdapterKey, decision: str | None, confidence: float, *, correct: bool
    ) -> None:
        """Count one answer whose true label is now known; by decision only where there is one."""
        series = self._loaded.get(key)
        if series is None:
            return
        bin_ = min(int(confidence * NUM_BINS), NUM_BINS - 1)
        if decision is not None:
            series.outcomes[decision, correct].inc()
        series.rows[bin_].inc()
        series.confidence[bin_].inc(confidence)
        if correct:
            series.correct[bin_].inc()

    def rejected(self, reason: str) -> None:
        """Count refused feedback; ``reason`` is one of ``FEEDBACK_REJECTIONS``."""
        self._rejections[reason].inc()


class FeedbackGauges(Collector):
    """Asks the feedback database at every scrape; shows loaded adapters and their policies only."""

    def __init__(self) -> None:
        self._read: Callable[[], Iterable[FeedbackRisk]] | None = None
        self._policies: dict[AdapterKey, dict[str, bool]] = {}

    def watch(self, read: Callable[[], Iterable[FeedbackRisk]]) -> None:
        """Read from this function from now on."""
        self._read = read

    def load(self, card: AdapterCard) -> None:
        """Show the policies of an adapter."""
        self._policies[card.name, card.revision] = {
            policy.name: policy.guarantee is not None and policy.void is None
            for policy in card.policies
        }

    def unload(self, card: AdapterCard) -> None:
        """Show them no longer."""
        self._policies.pop((card.name, card.revision), None)

    def describe(self) -> Iterator[Metric]:
        """Yield the families without samples."""
        return iter(_gauges())

    def collect(self) -> Iterator[Metric]:
        """Yield the four families; a risk exists only where something was labelled."""
        families = risk, bound, rows, violated = _gauges()
        found = (
            {}
            if self._read is None
            else {(item.adapter, item.revision, item.policy): item for item in self._read()}
        )
        for key, policies in self._policies.items() if self._read is not None else ():
            for policy, certified in policies.items():
                labels = (*key, policy)
                item = found.get(labels)
                rows.add_metric(labels, 0 if item is None else item.n)
                if certified:
                    violated.add_metric(labels, item is not None and item.violated)
                if item is not None and item.n > 0:
                    risk.add_metric(labels, item.wrong / item.n)
                    bound.add_metric(labels, item.risk_lower_bound)
        return iter(families)


def _gauges() -> tuple[GaugeMetricFamily, ...]:
    labels = (*_WHOSE, "policy")
    return tuple(
        GaugeMetricFamily(f"dalorra_{name}", text, labels=labels)
        for name, text in (
            ("feedback_selective_risk_ratio", "Wrong among accepted answers that got a label."),
            ("feedback_risk_lower_bound_ratio", "Lower confidence bound of that risk."),
            ("feedback_rows", "Accepted answers that got a label."),
            ("certificate_violated", "1 when that bound is above the certified target."),
        )
    )
