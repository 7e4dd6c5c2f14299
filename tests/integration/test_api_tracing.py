"""Traces and log lines of the whole app: one exchange, one trace id, everywhere; never a text."""

import json
import logging
import re
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from server.cli import app
from server.logs import JsonFormatter
from tests.support.api import async_test, running
from tests.support.otlp import collecting

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
TRACEPARENT = f"00-{TRACE}-{PARENT}-01"
SECRET = "my account number is 4711"


class _Lines(logging.Handler):
    """Keeps what the server would write."""

    def __init__(self) -> None:
        super().__init__()
        self.setFormatter(JsonFormatter())
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(self.format(record))

    def of(self, event: str) -> list[dict[str, Any]]:
        return [line for line in map(json.loads, self.texts) if line["event"] == event]


@pytest.fixture
def lines() -> Iterator[_Lines]:
    root, handler = logging.getLogger(), _Lines()
    level = root.level
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    try:
        yield handler
    finally:
        root.removeHandler(handler)
        root.setLevel(level)


@async_test
async def test_an_exchange_is_in_the_collector_under_its_callers_trace(lines: _Lines) -> None:
    with collecting() as collector:
        async with running(otel_endpoint=collector.url) as api:
            answer = await api.classify({"input": [SECRET, "b"]}, traceparent=TRACEPARENT)
            assert answer.status_code == 200
            assert (await api.client.get("/health/ready")).status_code == 200
            bad = await api.classify({"input": SECRET, "wrong": 1}, traceparent="nonsense")
            assert bad.status_code == 422
    spans = [span for span in collector.spans if span.trace_id.hex() == TRACE]
    assert sorted(span.name for span in spans) == [
        *("POST /v1/classify", "forward", "queue", "tokenize", "uq")
    ]
    (server,) = [span for span in spans if span.name == "POST /v1/classify"]
    said = {a.key: a.value.string_value or a.value.int_value for a in server.attributes}
    assert said["dalorra.adapter"] == "topics"
    assert (said["dalorra.rows"], said["http.response.status_code"]) == (2, 200)
    (other,) = [span for span in collector.spans if span.trace_id.hex() != TRACE]
    assert not other.parent_span_id
    first, second = lines.of("request")
    assert (first["trace_id"], first["model"], first["rows"]) == (TRACE, "topics", 2)
    assert first["request_id"] == answer.headers["x-request-id"]
    assert {"queue_ms", "tokenize_ms", "forward_ms", "uq_ms"} <= first.keys()
    assert (second["trace_id"], second["status"]) == (other.trace_id.hex(), 422)
    assert "4711" not in "".join(lines.texts) + str(collector.spans)


@async_test
async def test_without_a_collector_the_callers_trace_id_is_on_its_lines(lines: _Lines) -> None:
    async with running() as api:
        await api.classify({"input": "a"}, traceparent=TRACEPARENT)
        await api.classify({"input": "a"}, traceparent=TRACEPARENT.upper())
    first, second = lines.of("request")
    assert first["trace_id"] == TRACE
    assert "trace_id" not in second


@async_test
async def test_open_metrics_leads_from_a_slow_bucket_to_its_trace() -> None:
    async with running() as api:
        await api.classify({"input": "a"}, traceparent=TRACEPARENT)
        await api.classify({"input": "b"})
        accept = {"accept": "application/openmetrics-text; version=1.0.0"}
        text = (await api.client.get("/metrics", headers=accept)).text
        plain = (await api.client.get("/metrics")).text
    (shown,) = re.findall(r"^dalorra_http_request_duration_seconds_bucket.* # {(.*)} ", text, re.M)
    assert shown == f'trace_id="{TRACE}"'
    assert TRACE not in plain


@async_test
async def test_a_dead_collector_changes_no_answer() -> None:
    with socket.socket() as taken:  # bound and not listening
        taken.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{taken.getsockname()[1]}"
        async with running(otel_endpoint=endpoint) as api:
            for _ in range(20):
                assert (await api.classify({"input": "a"})).status_code == 200
            await api.check_healthy()


def test_a_wrong_endpoint_ends_the_start_with_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").touch()
    result = CliRunner().invoke(
        app, ["serve", str(tmp_path)], env={"DALORRA_OTEL_ENDPOINT": "localhost:4318"}
    )
    assert result.exit_code == 1
    assert "dalorra serve: otel_endpoint must be a URL" in result.output
