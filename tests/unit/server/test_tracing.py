"""server.tracing: who called is read strictly, and a collector can do no harm."""

import builtins
import itertools
import socket
import threading
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.logs import request_id_scope
from server.settings import Settings
from server.tracing import (
    TraceContext,
    TracingSetupError,
    incoming_context,
    make_tracing,
    parse_traceparent,
    record_stages,
)
from tests.support.otlp import collecting

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
VALID = f"00-{TRACE}-{PARENT}-01"


def scope_of(path: str = "/v1/classify", *traceparents: str, **more: Any) -> dict[str, Any]:
    headers = [(b"traceparent", value.encode("latin-1")) for value in traceparents]
    return {"type": "http", "method": "POST", "path": path, "headers": headers, **more}


def test_a_traceparent_is_read() -> None:
    assert parse_traceparent(VALID) == TraceContext(TRACE, PARENT, sampled=True)
    for flags, sampled in (("00", False), ("02", False), ("03", True), ("ff", True)):
        found = parse_traceparent(f"00-{TRACE}-{PARENT}-{flags}")
        assert found is not None
        assert found.sampled is sampled


def test_a_later_version_may_have_more_parts() -> None:
    for value in (f"01-{TRACE}-{PARENT}-01", f"cc-{TRACE}-{PARENT}-01-what-ever"):
        assert parse_traceparent(value) == TraceContext(TRACE, PARENT, sampled=True)


@pytest.mark.parametrize(
    "value",
    [
        "",
        "00",
        VALID.upper(),
        f"ff-{TRACE}-{PARENT}-01",
        f"00-{'0' * 32}-{PARENT}-01",
        f"00-{TRACE}-{'0' * 16}-01",
        f"00-{TRACE}-{PARENT}-01-extra",
        f"00-{TRACE}-{PARENT}-01-",
        f"01-{TRACE}-{PARENT}-01extra",
        f"00-{TRACE}-{PARENT}-1",
        f"00-{TRACE}-{PARENT}",
        f"00-{TRACE[:-1]}-{PARENT}-01",
        f"00-{TRACE}0-{PARENT}-01",
        f"00_{TRACE}_{PARENT}_01",
        f"0x-{TRACE}-{PARENT}-01",
        f" {VALID}",
        f"{VALID}\n",
        VALID.replace("4bf", "\u0664bf"),
    ],
)
def test_an_invalid_traceparent_is_ignored(value: str) -> None:
    assert parse_traceparent(value) is None


@given(st.text() | st.from_regex(r"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}.?"))
def test_what_is_read_has_the_form_that_is_promised(value: str) -> None:
    context = parse_traceparent(value)
    if context is not None:
        assert int(context.trace_id, 16) > 0
        assert int(context.parent_id, 16) > 0
        assert (len(context.trace_id), len(context.parent_id)) == (32, 16)
        assert value[3:52] == f"{context.trace_id}-{context.parent_id}"


def test_several_traceparents_are_none() -> None:
    assert incoming_context(scope_of("/", VALID)) is not None
    assert incoming_context(scope_of("/", VALID, VALID)) is None
    assert incoming_context(scope_of("/")) is None
    assert incoming_context(scope_of("/", f" {VALID}\t")) is not None  # white space around a value


def test_without_a_collector_the_callers_trace_id_is_noted_and_nothing_else() -> None:
    tracing = make_tracing(Settings())
    with request_id_scope("abc"):
        scope = scope_of("/v1/classify", VALID)
        with tracing.exchange(scope):
            record_stages(scope, {"forward": 1.0})
        assert scope["dalorra.trace_id"] == scope["dalorra.exemplar"] == TRACE
        bare = scope_of("/v1/classify", "nonsense")
        with tracing.exchange(bare):
            record_stages(bare, {"forward": 1.0})
        assert "dalorra.trace_id" not in bare
        unsampled = scope_of("/v1/classify", f"00-{TRACE}-{PARENT}-00")
        with tracing.exchange(unsampled):
            pass
        assert unsampled["dalorra.trace_id"] == TRACE
        assert "dalorra.exemplar" not in unsampled
    tracing.close()


@pytest.mark.parametrize(
    "endpoint",
    ["localhost:4318", "grpc://localhost:4317", "http://", "", "http://[::1", "http://h:0"],
)
def test_an_endpoint_that_is_no_url_of_http_is_refused(endpoint: str) -> None:
    with pytest.raises(TracingSetupError, match="otel_endpoint must be a URL"):
        make_tracing(Settings(otel_endpoint=endpoint))


def test_without_the_extra_the_server_does_not_start_and_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    importing = builtins.__import__

    def refuse(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("opentelemetry"):
            raise ImportError(name)
        return importing(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(TracingSetupError, match=r"extra otel.*pip install 'dalorra\[otel\]'"):
        make_tracing(Settings(otel_endpoint="http://localhost:4318"))
    with make_tracing(Settings()).exchange(scope_of("/", VALID)):
        pass  # and nothing else needs it


def attributes(span: Any) -> dict[str, Any]:
    return {a.key: a.value.string_value or a.value.int_value for a in span.attributes}


def test_an_exchange_is_a_span_of_the_caller_with_a_child_for_each_stage() -> None:
    with collecting() as collector:
        tracing = make_tracing(Settings(otel_endpoint=collector.url))
        scope = scope_of("/v1/classify", VALID)
        before_ns = time.time_ns()
        with tracing.exchange(scope):
            facts = {"model": "topics", "revision": "3f9a", "rows": 2, "tokens": 9, "text": "no"}
            scope |= {"dalorra.route": "/v1/classify", "dalorra.status": 200, "dalorra.log": facts}
            record_stages(scope, {"queue": 0.25, "tokenize": 0.5, "forward": 2.0, "uq": 0.125})
        after_ns = time.time_ns()
        tracing.close()
    assert collector.paths == ["/v1/traces"]
    assert collector.resources[0]["service.name"] == "dalorra"
    server = collector.named("POST /v1/classify")
    assert (server.trace_id.hex(), server.parent_span_id.hex()) == (TRACE, PARENT)
    assert server.kind == 2  # SERVER
    assert attributes(server) == {
        "http.request.method": "POST",
        "http.route": "/v1/classify",
        "http.response.status_code": 200,
        "dalorra.adapter": "topics",
        "dalorra.revision": "3f9a",
        "dalorra.rows": 2,
        "dalorra.tokens": 9,
    }
    assert before_ns <= server.start_time_unix_nano <= server.end_time_unix_nano <= after_ns
    stages = [collector.named(name) for name in ("tokenize", "queue", "forward", "uq")]
    seconds = [(s.end_time_unix_nano - s.start_time_unix_nano) / 1e9 for s in stages]
    assert seconds == [0.5, 0.25, 2.0, 0.125]
    for stage, following in itertools.pairwise(stages):
        assert stage.end_time_unix_nano == following.start_time_unix_nano
    assert before_ns <= stages[-1].end_time_unix_nano <= after_ns
    assert {stage.parent_span_id for stage in stages} == {server.span_id}


def test_an_exchange_without_a_caller_begins_a_trace_of_its_own() -> None:
    with collecting() as collector:
        tracing = make_tracing(Settings(otel_endpoint=f"{collector.url}/"))
        scope = scope_of("/v1/classify", "nonsense")
        with pytest.raises(RuntimeError, match="bug"), tracing.exchange(scope):
            raise RuntimeError("bug: secret 4711")
        tracing.close()
    (span,) = collector.spans
    assert span.trace_id.hex() == scope["dalorra.trace_id"]
    assert not span.parent_span_id
    assert span.status.code == 2  # ERROR: nothing was answered
    assert "4711" not in str(span)


def test_a_callers_wish_not_to_be_recorded_is_obeyed() -> None:
    with collecting() as collector:
        tracing = make_tracing(Settings(otel_endpoint=collector.url))
        scope = scope_of("/v1/classify", f"00-{TRACE}-{PARENT}-00")
        with tracing.exchange(scope):
            record_stages(scope, {"forward": 1.0})
        tracing.close()
    assert collector.spans == []
    assert scope["dalorra.trace_id"] == TRACE
    assert "dalorra.exemplar" not in scope


@pytest.mark.parametrize(
    "path", ["/metrics", "/livez", "/readyz", "/health", "/health/ready", "/v2/health/live"]
)
def test_probes_and_scrapes_are_not_traced(path: str) -> None:
    with collecting() as collector:
        tracing = make_tracing(Settings(otel_endpoint=collector.url))
        scope = scope_of(path, VALID)
        with tracing.exchange(scope):
            pass
        tracing.close()
    assert collector.spans == []
    assert "dalorra.trace_id" not in scope


def test_a_stage_without_a_time_has_no_span() -> None:
    with collecting() as collector:
        tracing = make_tracing(Settings(otel_endpoint=collector.url))
        scope = scope_of()
        with tracing.exchange(scope):
            record_stages(scope, {"forward": 1.0, "serialize": 1.0})
        tracing.close()
    assert sorted(span.name for span in collector.spans) == ["POST", "forward"]


def test_an_odd_method_is_not_sent_as_it_is() -> None:
    with collecting() as collector:
        tracing = make_tracing(Settings(otel_endpoint=f"{collector.url}/own/path"))
        with tracing.exchange(scope_of() | {"method": "SECRET4711"}):
            pass
        tracing.close()
    assert collector.paths == ["/own/path"]
    assert collector.named("OTHER")
    assert "4711" not in str(collector.spans)


def closed_within(tracing: Any, seconds: float) -> None:
    thread = threading.Thread(target=tracing.close, daemon=True)
    thread.start()
    thread.join(seconds)
    assert not thread.is_alive()


def test_a_dead_collector_costs_nothing_and_does_not_hold_up_the_end() -> None:
    with socket.socket() as taken:  # bound and not listening: every connection is refused
        taken.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{taken.getsockname()[1]}"
        tracing = make_tracing(Settings(otel_endpoint=endpoint))
        for _ in range(5000):  # more than the queue holds
            with tracing.exchange(scope_of()):
                pass
        closed_within(tracing, 30)


def test_a_hanging_collector_does_not_hold_up_exchanges_or_the_end() -> None:
    with collecting() as collector:
        collector.open.clear()
        tracing = make_tracing(Settings(otel_endpoint=collector.url))
        for _ in range(5000):
            with tracing.exchange(scope_of()):
                pass
        closed_within(tracing, 30)
        assert collector.spans == []
