"""Every Prometheus metric of the server, in one registry per app: nothing global.

Callers hand over plain values; only this file knows metric names. Label values are the adapter's
own names and the fixed sets below, never something a client wrote.
"""

from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Metric

from server import __version__
from server.batching import BatchStats
from server.decision import DECISIONS, REASONS, Verdict
from server.ports import AdapterCard, EncodedRow, RowScores

__all__ = ["Telemetry", "torch_version"]

REJECTIONS = ("queue_full", "too_large", "deadline", "draining", "not_ready")
STAGES = ("queue", "tokenize", "forward", "uq", "serialize")
RELEASES = ("full", "timeout", "drain", "deadline")
PRIORITY = "interactive"  # the only class so far

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
_STAGE_SECONDS = tuple(0.0005 * 2**power for power in range(15))  # 0.5 ms to 8.2 s
_ROWS = tuple(2**power for power in range(9))
_BATCH_TOKENS = tuple(2**power for power in range(6, 17))
_PADDING = (0, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75)
_SAMPLES = (1, 2, 4, 8, 16, 32, 64)
_CONFIDENCE = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 1)
_ENTROPY = (0.01, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1)
_MI = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1)
_MASS = (0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 0.999, 1)
_INPUT_TOKENS = tuple(2**power for power in range(3, 14))


class Telemetry:
    """The metrics of one app."""

    def __init__(self, *, git_sha: str = "unknown") -> None:
        self.registry = CollectorRegistry()
        self._make_http()
        self._make_work()
        self._make_predictions()
        self._make_adapters()
        info = self._gauge("build_info", "Versions; always 1.", "version", "torch", "git")
        info.labels(__version__, torch_version(), git_sha).set(1)

    def collect(self) -> Iterator[Metric]:
        """Yield every metric without the ``_created`` samples, which would double the series."""
        for family in self.registry.collect():
            family.samples = [s for s in family.samples if not s.name.endswith("_created")]
            yield family

    # -- construction -------------------------------------------------------------------------

    def _make_http(self) -> None:
        self._requests = self._counter(
            "http_requests", "Finished HTTP requests.", "method", "route", "status"
        )
        self._duration = self._histogram(
            "http_request_duration_seconds", "Time per HTTP request.", _SECONDS, "method", "route"
        )
        self._in_progress = self._gauge(
            "http_requests_in_progress", "HTTP requests being answered.", "route"
        )
        self._rejections = self._counter(
            "rejections", "Requests refused for a reason of the server's.", "reason"
        )
        self._cancelled = self._counter(
            "cancelled", "Requests whose client left before the answer.", "phase"
        )
        self._requests.labels("POST", "/v1/classify", "200")
        self._duration.labels("POST", "/v1/classify")
        self._in_progress.labels("/v1/classify")
        for reason in REJECTIONS:
            self._rejections.labels(reason)
        for phase in ("queued", "running"):
            self._cancelled.labels(phase)

    def _make_work(self) -> None:
        self._stage = self._histogram(
            "stage_duration_seconds",
            "Time per stage of a request or batch.",
            _STAGE_SECONDS,
            "stage",
        )
        self._depth = self._gauge("queue_depth", "Rows waiting for the engine.", "priority")
        self._tokens = self._gauge(
            "queue_tokens", "Tokens times samples waiting for the engine.", "priority"
        )
        self._batch_rows = self._histogram("batch_rows", "Rows per batch.", _ROWS)
        self._batch_tokens = self._histogram(
            "batch_tokens", "Padded tokens times samples per batch.", _BATCH_TOKENS
        )
        self._padding = self._histogram(
            "batch_padding_ratio", "Share of padding in a batch.", _PADDING
        )
        self._released = self._counter("batch_released", "Why batches were released.", "reason")
        for stage in STAGES:
            self._stage.labels(stage)
        for reason in RELEASES:
            self._released.labels(reason)

    def _make_predictions(self) -> None:
        self._samples = self._histogram(
            "posterior_samples", "Posterior samples per answered row.", _SAMPLES, "adapter"
        )
        self._predictions = self._counter(
            "predictions", "Answered rows.", "adapter", "label", "decision"
        )
        self._reasons = self._counter(
            "decision_reasons", "Reasons against accepting an answer.", "adapter", "reason"
        )
        self._confidence = self._histogram(
            "confidence_ratio", "Confidence; default sampling only.", _CONFIDENCE, "adapter"
        )
        self._entropy = self._histogram(
            "entropy_ratio",
            "Predictive entropy / ln K; default sampling only.",
            _ENTROPY,
            "adapter",
        )
        self._mi = self._histogram(
            "mutual_information_ratio",
            "Mutual information / ln K; default sampling only.",
            _MI,
            "adapter",
        )
        self._mass = self._histogram(
            "label_mass_ratio", "Label mass; default sampling only.", _MASS, "adapter"
        )
        self._input_tokens = self._histogram(
            "input_tokens", "Tokens per answered row.", _INPUT_TOKENS, "adapter"
        )

    def _make_adapters(self) -> None:
        self._info = self._gauge(
            "adapter_info", "Loaded adapters; always 1.", "adapter", "revision", "base", "mask_set"
        )
        self._loaded = self._gauge("adapter_loaded", "1 while it can answer.", "adapter")
        self._threshold = self._gauge(
            "policy_threshold", "Thresholds of a policy.", "adapter", "policy", "signal"
        )
        self._target = self._gauge(
            "policy_target_risk_ratio", "Selective risk a policy aims at.", "adapter", "policy"
        )
        self._selftest_ok = self._gauge("selftest_ok", "1 when golden probes match.", "adapter")
        self._selftest_error = self._gauge(
            "selftest_max_abs_error", "Largest golden probe difference.", "adapter"
        )
        self._load_seconds = Histogram(
            "dalorra_adapter_load_duration_seconds",
            "Time to load all adapters at start.",
            buckets=(1, 2.5, 5, 10, 30, 60, 120, 300),
            registry=self.registry,
        )
        self._load_failures = Counter(
            "dalorra_adapter_load_failures", "Failed loads.", registry=self.registry
        )

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"dalorra_{name}", text, labels, registry=self.registry)

    def _gauge(self, name: str, text: str, *labels: str) -> Gauge:
        return Gauge(f"dalorra_{name}", text, labels, registry=self.registry)

    def _histogram(
        self, name: str, text: str, buckets: tuple[float, ...], *labels: str
    ) -> Histogram:
        return Histogram(f"dalorra_{name}", text, labels, buckets=buckets, registry=self.registry)

    # -- HTTP ---------------------------------------------------------------------------------

    def request_began(self, route: str) -> None:
        """Count one more request being answered."""
        self._in_progress.labels(route).inc()

    def request_ended(self, method: str, route: str, status: int, duration_s: float) -> None:
        """Count a finished request and its time."""
        self._in_progress.labels(route).dec()
        self._requests.labels(method, route, str(status)).inc()
        self._duration.labels(method, route).observe(duration_s)

    def rejected(self, reason: str) -> None:
        """Count a refusal; ``reason`` is one of ``REJECTIONS``."""
        self._rejections.labels(reason).inc()

    def cancelled(self, *, running: bool) -> None:
        """Count a client that left."""
        self._cancelled.labels("running" if running else "queued").inc()

    # -- work ---------------------------------------------------------------------------------

    def watch_queue(self, depth: Callable[[], float], tokens: Callable[[], float]) -> None:
        """Read the queue's size at every scrape from these two functions."""
        self._depth.labels(PRIORITY).set_function(depth)
        self._tokens.labels(PRIORITY).set_function(tokens)

    def stage(self, name: str, duration_s: float) -> None:
        """Note the time of one stage; ``name`` is one of ``STAGES``."""
        self._stage.labels(name).observe(duration_s)

    def batch(self, stats: BatchStats) -> None:
        """Note one finished batch; called from the engine thread."""
        self._batch_rows.observe(stats.num_rows)
        self._batch_tokens.observe(stats.cost_tokens)
        self._padding.observe(1 - stats.num_tokens / stats.padded_tokens)
        self._released.labels(stats.reason).inc()
        for waited_s in stats.waited_s:
            self.stage("queue", waited_s)
        self.stage("forward", stats.forward_s)
        self.stage("uq", stats.uq_s)

    def prediction(
        self, card: AdapterCard, row: EncodedRow, scores: RowScores, verdict: Verdict
    ) -> None:
        """Count one answered row with its decision."""
        self._predictions.labels(card.name, scores.label, verdict.decision).inc()
        for reason in verdict.reasons:
            self._reasons.labels(card.name, reason).inc()
        self._samples.labels(card.name).observe(len(scores.samples))
        self._input_tokens.labels(card.name).observe(row.num_tokens)

    def drift(self, card: AdapterCard, scores: RowScores) -> None:
        """Note the scores of a row that was sampled as the adapter was calibrated."""
        self._confidence.labels(card.name).observe(scores.confidence)
        self._entropy.labels(card.name).observe(scores.normalized_entropy)
        if scores.mutual_information is not None and scores.predictive_entropy > 0:
            # H_norm / H is 1 / ln K, K being the row's own number of choices
            per_nat = scores.normalized_entropy / scores.predictive_entropy
            self._mi.labels(card.name).observe(scores.mutual_information * per_nat)
        elif scores.mutual_information is not None:
            self._mi.labels(card.name).observe(0.0)
        if scores.label_mass is not None:
            self._mass.labels(card.name).observe(scores.label_mass)

    # -- adapters -----------------------------------------------------------------------------

    def adapters_loaded(self, cards: tuple[AdapterCard, ...], duration_s: float) -> None:
        """Show new adapters, and create every series they will ever have."""
        self._load_seconds.observe(duration_s)
        for card in cards:
            self._show(card)
            for histogram in (self._samples, self._confidence, self._entropy):
                histogram.labels(card.name)
            for histogram in (self._mi, self._mass, self._input_tokens):
                histogram.labels(card.name)
            for decision in DECISIONS:
                for label in card.labels:
                    self._predictions.labels(card.name, label, decision)
            for reason in REASONS:
                self._reasons.labels(card.name, reason)

    def load_failed(self) -> None:
        """Count a load that failed."""
        self._load_failures.inc()

    def engine_lost(self, cards: tuple[AdapterCard, ...]) -> None:
        """Show that nothing can be answered any more."""
        for card in cards:
            self._loaded.labels(card.name).set(0)

    def _show(self, card: AdapterCard) -> None:
        mask_set = card.mask_set or "none"
        self._info.labels(card.name, card.revision, card.base, mask_set).set(1)
        self._loaded.labels(card.name).set(1)
        if card.selftest_max_abs_error is not None:
            self._selftest_ok.labels(card.name).set(1)
            self._selftest_error.labels(card.name).set(card.selftest_max_abs_error)
        for policy in card.policies:
            signals = {
                "confidence": policy.min_confidence,
                f"abstain_{policy.abstain_score}": policy.abstain_threshold,
            }
            for signal, value in signals.items():
                self._threshold.labels(card.name, policy.name, signal).set(value)
            if policy.target_selective_risk is not None:
                self._target.labels(card.name, policy.name).set(policy.target_selective_risk)


def torch_version() -> str:
    """Return the installed torch's version without importing it; ``none`` when there is none."""
    try:
        return version("torch")
    except PackageNotFoundError:
        return "none"
