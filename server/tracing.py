"""Traces: who asked for this exchange (W3C ``traceparent``), and OpenTelemetry spans as an extra.

A span says which adapter answered how many rows and where the time went, never what was asked. The
collector can be away or hang: spans wait in a bounded queue of another thread, and are dropped.
"""

import contextlib
import re
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol
from urllib.parse import urlsplit

from starlette.types import Scope

from server import __version__
from server.logs import note_exchange
from server.settings import Settings

__all__ = [
    "TraceContext",
    "Tracing",
    "TracingSetupError",
    "incoming_context",
    "make_tracing",
    "parse_traceparent",
    "record_stages",
]

_TRACEPARENT = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")
_SAMPLED = 0x01
# In the order in which they follow each other; record_stages lays them end to end.
_STAGES = ("tokenize", "queue", "forward", "uq")
_FACTS = {"model": "dalorra.adapter", "revision": "dalorra.revision"}
_COUNTS = {"rows": "dalorra.rows", "tokens": "dalorra.tokens"}
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
_SPAN = "dalorra.span"

_QUEUE_SPANS = 2048
_BATCH_SPANS = 256
_DELAY_MS = 1000
_EXPORT_TIMEOUT_S = 3.0
_CLOSE_S = 3.0
_SERVER_ERROR = 500


class TracingSetupError(Exception):
    """Traces were asked for and cannot be sent like this; the server must not start."""


@dataclass(frozen=True, slots=True)
class TraceContext:
    """Where an exchange belongs, as its caller says.

    Attributes:
        trace_id: 32 hex digits, not all zero.
        parent_id: Span of the caller: 16 hex digits, not all zero.
        sampled: Whether the caller records this trace.
    """

    trace_id: str
    parent_id: str
    sampled: bool


def parse_traceparent(value: str) -> TraceContext | None:
    """Return what a ``traceparent`` header says; None when it is not valid.

    Source:
        W3C Trace Context, level 2, section 3.2. A higher version than 00 may have more parts.
    """
    match = _TRACEPARENT.fullmatch(value)
    if match is None:
        return None
    version, trace_id, parent_id, flags, rest = match.groups()
    if version == "ff" or (version == "00" and rest is not None):
        return None
    if trace_id.strip("0") == "" or parent_id.strip("0") == "":
        return None
    return TraceContext(trace_id, parent_id, bool(int(flags, 16) & _SAMPLED))


def incoming_context(scope: Scope) -> TraceContext | None:
    """Return the context that an exchange came with; None without one, or with several."""
    values = [value for name, value in scope["headers"] if name == b"traceparent"]
    return parse_traceparent(values[0].decode("latin-1").strip(" \t")) if len(values) == 1 else None


class Tracing(Protocol):
    """What the server does with traces."""

    def exchange(self, scope: Scope) -> contextlib.AbstractContextManager[None]:
        """Trace one HTTP exchange.

        Puts its trace id on the log lines and into ``scope["dalorra.trace_id"]``, where there is
        one, and into ``scope["dalorra.exemplar"]`` if the trace is kept. At the end the span takes
        ``dalorra.status``, ``dalorra.route`` and ``dalorra.log`` from the scope. Probes and
        ``/metrics`` are not traced.
        """
        ...

    def close(self) -> None:
        """Send what waits, for three seconds at most; blocks."""
        ...


class _Untraced:
    """No spans: the caller's trace id is on the log lines, and that is all."""

    @contextlib.contextmanager
    def exchange(self, scope: Scope) -> Iterator[None]:
        """See ``Tracing``."""
        context = incoming_context(scope)
        if context is not None:
            _note(scope, context.trace_id, sampled=context.sampled)
        yield

    def close(self) -> None:
        """See ``Tracing``."""


@dataclass(slots=True)
class _Open:
    """The span of an exchange, and what makes its children."""

    tracer: Any
    span: Any
    context: Any


class _OpenTelemetry:
    """Spans to a collector, in batches, from a thread of the SDK's."""

    def __init__(self, provider: Any) -> None:
        self._provider = provider
        self._tracer = provider.get_tracer("dalorra", __version__)

    @contextlib.contextmanager
    def exchange(self, scope: Scope) -> Iterator[None]:
        """See ``Tracing``."""
        if _is_probe(scope["path"]):
            yield
            return
        from opentelemetry.trace import SpanKind, set_span_in_context  # noqa: PLC0415

        span = self._tracer.start_span(
            _method(scope), _parent(incoming_context(scope)), kind=SpanKind.SERVER
        )
        own = span.get_span_context()
        _note(scope, f"{own.trace_id:032x}", sampled=own.trace_flags.sampled)
        scope[_SPAN] = _Open(self._tracer, span, set_span_in_context(span))
        try:
            yield
        finally:
            _finish(span, scope)

    def close(self) -> None:
        """See ``Tracing``."""
        # The SDK may wait for half a minute, a hanging collector makes it: so do not wait for it.
        closing = threading.Thread(target=self._provider.shutdown, daemon=True, name="otel-close")
        closing.start()
        closing.join(_CLOSE_S)


def make_tracing(settings: Settings) -> Tracing:
    """Return what the settings ask for; without ``otel_endpoint`` nothing is sent anywhere.

    Raises:
        TracingSetupError: The endpoint is no URL of HTTP, or the extra ``otel`` is missing.
    """
    if settings.otel_endpoint is None:
        return _Untraced()
    url = _traces_url(settings.otel_endpoint)
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import (  # noqa: PLC0415
            OTLPSpanExporter,
        )
        from opentelemetry.sdk.resources import Resource  # noqa: PLC0415
        from opentelemetry.sdk.trace import TracerProvider  # noqa: PLC0415
        from opentelemetry.sdk.trace.export import BatchSpanProcessor  # noqa: PLC0415
    except ImportError:
        raise TracingSetupError(
            "otel_endpoint needs the extra otel, which is not installed: "
            "pip install 'dalorra[otel]', or leave the setting out"
        ) from None
    provider = TracerProvider(
        resource=Resource.create({"service.name": "dalorra", "service.version": __version__}),
        shutdown_on_exit=False,
    )
    provider.add_span_processor(
        BatchSpanProcessor(
            OTLPSpanExporter(endpoint=url, timeout=_EXPORT_TIMEOUT_S),
            max_queue_size=_QUEUE_SPANS,
            max_export_batch_size=_BATCH_SPANS,
            schedule_delay_millis=_DELAY_MS,
        )
    )
    return _OpenTelemetry(provider)


def record_stages(scope: Scope, stages: Mapping[str, float]) -> None:
    """Add a child span for each stage of an exchange that was just answered.

    Only the durations are known; the stages follow each other and the last one ends now.

    Args:
        scope: Of the exchange; without effect when it is not traced.
        stages: ``tokenize``, ``queue``, ``forward``, ``uq`` -> seconds; others are left out.
    """
    traced = scope.get(_SPAN)
    if not isinstance(traced, _Open) or not traced.span.is_recording():
        return
    end_ns = time.time_ns()
    for name in reversed(_STAGES):
        if name in stages:
            start_ns = end_ns - max(0, round(stages[name] * 1e9))
            span = traced.tracer.start_span(name, traced.context, start_time=start_ns)
            span.end(end_ns)
            end_ns = start_ns


def _note(scope: Scope, trace_id: str, *, sampled: bool) -> None:
    scope["dalorra.trace_id"] = trace_id
    if sampled:  # else nobody keeps the trace that an exemplar would lead to
        scope["dalorra.exemplar"] = trace_id
    note_exchange("trace_id", trace_id)


def _method(scope: Scope) -> str:
    return scope["method"] if scope["method"] in _METHODS else "OTHER"


def _is_probe(path: str) -> bool:
    return path.startswith(("/health", "/v2/health")) or path in {"/livez", "/readyz", "/metrics"}


def _parent(context: TraceContext | None) -> Any:
    """Return a context whose current span is the caller's; an empty one without a caller."""
    from opentelemetry.context import Context  # noqa: PLC0415
    from opentelemetry.trace import (  # noqa: PLC0415
        NonRecordingSpan,
        SpanContext,
        TraceFlags,
        set_span_in_context,
    )

    if context is None:
        return Context()
    remote = SpanContext(
        int(context.trace_id, 16),
        int(context.parent_id, 16),
        is_remote=True,
        trace_flags=TraceFlags(TraceFlags.SAMPLED if context.sampled else TraceFlags.DEFAULT),
    )
    return set_span_in_context(NonRecordingSpan(remote), Context())


def _finish(span: Any, scope: Scope) -> None:
    """End the span of an exchange with what became known of it."""
    from opentelemetry.trace import Status, StatusCode  # noqa: PLC0415

    if span.is_recording():
        method, route = _method(scope), scope.get("dalorra.route")
        status, facts = scope.get("dalorra.status"), scope.get("dalorra.log", {})
        span.set_attribute("http.request.method", method)
        if route is not None:
            span.update_name(f"{method} {route}")
            span.set_attribute("http.route", route)
        if status is not None:
            span.set_attribute("http.response.status_code", status)
        if status is None or status >= _SERVER_ERROR:
            span.set_status(Status(StatusCode.ERROR))
        for names, kind in ((_FACTS, str), (_COUNTS, int)):
            for name, attribute in names.items():
                if isinstance(facts.get(name), kind):
                    span.set_attribute(attribute, facts[name])
    span.end()


def _traces_url(endpoint: str) -> str:
    """Return where traces go: the endpoint as it is when it names a path, else its /v1/traces."""
    try:
        parts = urlsplit(endpoint)
        sound = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        sound = False
    if not sound:
        raise TracingSetupError(
            "otel_endpoint must be a URL that begins with http:// or https://, such as "
            "http://localhost:4318"
        )
    return endpoint if urlsplit(endpoint).path.strip("/") else f"{endpoint.rstrip('/')}/v1/traces"
