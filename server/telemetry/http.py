"""Metrics of HTTP exchanges."""

from server.telemetry.edges import SECONDS
from server.telemetry.families import Families

__all__ = ["REJECTIONS", "HttpMetrics"]

REJECTIONS = (
    "queue_full",
    "too_large",
    "deadline",
    "draining",
    "not_ready",
    "auth",
    "rate_limit",
    "slow_client",
    "connections",
)


class HttpMetrics:
    """Requests, their times, refusals and clients that left."""

    def __init__(self, families: Families) -> None:
        self._requests = families.counter(
            "http_requests", "Finished HTTP requests.", "method", "route", "status"
        )
        self._duration = families.histogram(
            "http_request_duration_seconds", "Time per HTTP request.", SECONDS, "method", "route"
        )
        self._in_progress = families.gauge(
            "http_requests_in_progress", "HTTP requests being answered.", "route"
        )
        self._rejections = families.counter(
            "rejections", "Requests refused for a reason of the server's.", "reason"
        )
        self._cancelled = families.counter(
            "cancelled", "Requests whose client left before the answer.", "phase"
        )
        self._keys_not_read = families.counter(
            "api_keys_reload_failures", "Times that the file of API keys could not be read again."
        )
        for status in ("200", "500", "503", "504"):  # from zero, so that the first failure counts
            self._requests.labels("POST", "/v1/classify", status)
        self._duration.labels("POST", "/v1/classify")
        self._in_progress.labels("/v1/classify")
        for reason in REJECTIONS:
            self._rejections.labels(reason)
        for phase in ("queued", "running"):
            self._cancelled.labels(phase)

    def began(self, route: str) -> None:
        """Count one more request being answered."""
        self._in_progress.labels(route).inc()

    def ended(
        self, method: str, route: str, status: int, duration_s: float, trace_id: str | None = None
    ) -> None:
        """Count a finished request and its time; OpenMetrics shows a trace id as an exemplar."""
        self._in_progress.labels(route).dec()
        self._requests.labels(method, route, str(status)).inc()
        exemplar = {"trace_id": trace_id} if trace_id else None
        self._duration.labels(method, route).observe(duration_s, exemplar)

    def rejected(self, reason: str) -> None:
        """Count a refusal; ``reason`` is one of ``REJECTIONS``."""
        self._rejections.labels(reason).inc()

    def keys_not_read(self) -> None:
        """Count a time that the file of API keys could not be read again."""
        self._keys_not_read.inc()

    def cancelled(self, *, running: bool) -> None:
        """Count a client that left."""
        self._cancelled.labels("running" if running else "queued").inc()
