"""The metrics of one app, behind one object: callers hand over plain values."""

from collections.abc import Callable, Iterable, Iterator
from importlib.metadata import PackageNotFoundError, version

from prometheus_client import CollectorRegistry, Metric

from server import __version__
from server.batching import BatchStats, FailureReason
from server.decision import Verdict
from server.ports import (
    AdapterCard,
    EncodedRow,
    FeedbackRisk,
    Priority,
    RowScores,
    SelfTest,
)
from server.telemetry.adapters import AdapterMetrics
from server.telemetry.families import Families
from server.telemetry.feedback import FeedbackGauges, FeedbackMetrics
from server.telemetry.http import HttpMetrics
from server.telemetry.predictions import PredictionMetrics
from server.telemetry.reference import ReferenceCollector
from server.telemetry.shadow import ShadowMetrics
from server.telemetry.work import Loss, WorkMetrics

__all__ = ["Telemetry", "torch_version"]


class Telemetry:
    """The metrics of one app, in a registry of its own: nothing global.

    Attributes:
        registry: Holds every metric; ``collect`` is what is shown.
    """

    def __init__(self, *, git_sha: str = "unknown") -> None:
        self.registry = CollectorRegistry()
        families = Families(self.registry)
        self._http = HttpMetrics(families)
        self._work = WorkMetrics(families)
        self._predictions = PredictionMetrics(families)
        self._feedback = FeedbackMetrics(families)
        self._adapters = AdapterMetrics(families)
        self._shadow = ShadowMetrics(families)
        self._reference = ReferenceCollector()
        self._feedback_gauges = FeedbackGauges()
        families.register(self._reference)
        families.register(self._feedback_gauges)
        info = families.gauge("build_info", "Versions; always 1.", "version", "torch", "git")
        info.labels(__version__, torch_version(), git_sha).set(1)

    def collect(self) -> Iterator[Metric]:
        """Yield every metric without the ``_created`` samples, which would double the series."""
        for family in self.registry.collect():
            family.samples = [s for s in family.samples if not s.name.endswith("_created")]
            yield family

    # -- HTTP and work ------------------------------------------------------------------------

    def request_began(self, route: str) -> None:
        """Count one more request being answered."""
        self._http.began(route)

    def request_ended(
        self, method: str, route: str, status: int, duration_s: float, trace_id: str | None = None
    ) -> None:
        """Count a finished request and its time, and where its trace can be found."""
        self._http.ended(method, route, status, duration_s, trace_id)

    def rejected(self, reason: str) -> None:
        """Count a refusal; ``reason`` is one of ``http.REJECTIONS``."""
        self._http.rejected(reason)

    def keys_not_read(self) -> None:
        """Count a time that the file of API keys could not be read again."""
        self._http.keys_not_read()

    def cancelled(self, *, running: bool) -> None:
        """Count a client that left."""
        self._http.cancelled(running=running)

    def watch_queue(
        self, depth: Callable[[Priority], float], tokens: Callable[[Priority], float]
    ) -> None:
        """Read the queue's size at every scrape from these two functions of a priority."""
        self._work.watch_queue(depth, tokens)

    def stage(self, name: str, duration_s: float) -> None:
        """Note the time of one stage; ``name`` is one of ``work.STAGES``."""
        self._work.stage(name, duration_s)

    def batch(self, stats: BatchStats) -> None:
        """Note one finished batch; called from the engine thread."""
        self._work.batch(stats)

    def batch_failed(self, reason: FailureReason) -> None:
        """Count a run of a batch that gave no answers; called from the engine thread."""
        self._work.batch_failed(reason)

    def engine_restarted(self, loss: Loss) -> None:
        """Count an attempt to replace a lost engine."""
        self._work.engine_restarted(loss)

    # -- answers and feedback -----------------------------------------------------------------

    def prediction(
        self, card: AdapterCard, row: EncodedRow, scores: RowScores, verdict: Verdict
    ) -> None:
        """Count one answered row with its decision."""
        self._predictions.answered(card, row, scores, verdict)

    def drift(self, card: AdapterCard, scores: RowScores) -> None:
        """Note the scores of a row that was sampled as the adapter was calibrated."""
        self._predictions.drift(card, scores)

    def feedback(
        self, *, adapter: str, revision: str, decision: str | None, confidence: float, correct: bool
    ) -> None:
        """Count one answer whose true label is now known.

        Args:
            adapter: Adapter that answered.
            revision: Its revision then; not counted when that one is not loaded.
            decision: What a policy of the adapter decided on the answer; None when it was no such
                policy, and then only the calibration bins count it.
            confidence: Its confidence, in [0, 1].
            correct: Whether the answer was the true label.
        """
        self._feedback.labelled((adapter, revision), decision, confidence, correct=correct)

    def feedback_rejected(self, reason: str) -> None:
        """Count refused feedback; ``reason`` is one of ``FEEDBACK_REJECTIONS``."""
        self._feedback.rejected(reason)

    def watch_feedback(self, read: Callable[[], Iterable[FeedbackRisk]]) -> None:
        """Read the risk of every policy at every scrape from this function.

        Args:
            read: Runs on the event loop while ``/metrics`` is answered, so it must neither block
                nor raise: when the database is slow or away, it gives what it last knew.
        """
        self._feedback_gauges.watch(read)

    # -- adapters -----------------------------------------------------------------------------

    def adapters_loaded(self, cards: tuple[AdapterCard, ...], duration_s: float) -> None:
        """Show new adapters, and create every series they will ever have."""
        self._adapters.load_took(duration_s)
        for card in cards:
            own_labels = self._predictions.load(card)
            self._reference.load(card, own_labels=own_labels)
            for part in (self._adapters, self._feedback, self._feedback_gauges):
                part.load(card)

    def adapters_unloaded(self, cards: tuple[AdapterCard, ...]) -> None:
        """Remove every series of adapters that are no longer served."""
        for card in cards:
            for part in (
                self._predictions,
                self._reference,
                self._adapters,
                self._feedback,
                self._feedback_gauges,
                self._shadow,
            ):
                part.unload(card)

    def adapter_evicted(self) -> None:
        """Count an adapter that was put out of memory to make room."""
        self._adapters.evicted()

    def watch_adapters(self, resident: Callable[[], float], evicted: Callable[[], float]) -> None:
        """Read the numbers of adapters in and out of memory at every scrape."""
        self._adapters.watch(resident, evicted)

    def shadow_compared(
        self, card: AdapterCard, candidate: AdapterCard, *, same_label: bool, same_decision: bool
    ) -> None:
        """Count one row that a shadow answered too, unless one of them is unloaded by now."""
        if self._adapters.shows(card) and self._adapters.shows(candidate):
            self._shadow.compared(
                card, candidate, same_label=same_label, same_decision=same_decision
            )

    def shadow_dropped(self, reason: str) -> None:
        """Count a request that a shadow could not answer; one of ``SHADOW_DROPS``."""
        self._shadow.dropped(reason)

    def load_failed(self) -> None:
        """Count a load that failed."""
        self._adapters.load_failed()

    def adapters_back(self, cards: tuple[AdapterCard, ...], duration_s: float) -> None:
        """Show the adapters of a restarted engine; those that were shown keep their counts."""
        back = {(card.name, card.revision) for card in cards}
        self.adapters_unloaded(
            tuple(card for card in self._adapters.shown if (card.name, card.revision) not in back)
        )
        new = tuple(card for card in cards if not self._adapters.back(card))
        self.adapters_loaded(new, duration_s)

    def selftest(self, card: AdapterCard, result: SelfTest) -> None:
        """Show how far an adapter was from its golden probes just now."""
        self._adapters.selftest(card, result)

    def engine_lost(self, cards: tuple[AdapterCard, ...]) -> None:
        """Show that nothing can be answered any more."""
        for card in cards:
            self._adapters.lost(card)


def torch_version() -> str:
    """Return the installed torch's version without importing it; ``none`` when there is none."""
    try:
        return version("torch")
    except PackageNotFoundError:
        return "none"
