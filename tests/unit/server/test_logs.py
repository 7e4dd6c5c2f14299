import asyncio
import contextvars
import gc
import json
import logging
from concurrent.futures import ThreadPoolExecutor
from enum import Enum
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from server.logs import (
    JsonFormatter,
    configure_logging,
    current_request_id,
    note_exchange,
    request_id_scope,
)
from server.ports import EngineFatalError


def line(message: str, **parts: Any) -> dict[str, Any]:
    record = logging.LogRecord("server.x", logging.INFO, "x.py", 1, message, None, None)
    for name, value in parts.items():
        setattr(record, name, value)
    entry: dict[str, Any] = json.loads(JsonFormatter().format(record))
    return entry


def failure(error: Exception) -> Any:
    with pytest.raises(type(error)) as caught:
        raise error
    return caught._excinfo


def test_a_line_has_time_level_logger_event_and_extras() -> None:
    entry = line("request", status=200)
    assert entry.pop("time").endswith("Z")
    assert entry == {"level": "info", "logger": "server.x", "event": "request", "status": 200}


def test_the_request_id_is_on_every_line_of_its_exchange() -> None:
    with request_id_scope("abc"):
        assert line("x")["request_id"] == "abc"
        assert current_request_id() == "abc"
    assert "request_id" not in line("x")
    assert current_request_id() == "-"


def test_an_error_is_logged_by_type_and_place_without_its_words() -> None:
    entry = line("failed", exc_info=failure(ValueError("secret 4711")))
    assert entry["error"] == "ValueError"
    assert entry["frames"][-1].startswith("test_logs.py:")
    assert "4711" not in json.dumps(entry)


def test_the_words_of_a_lost_device_are_logged() -> None:
    entry = line("failed", exc_info=failure(EngineFatalError("CUDA error: gone")))
    assert entry["reason"] == "CUDA error: gone"


def test_line_breaks_cannot_forge_a_line() -> None:
    record = logging.LogRecord("x", logging.INFO, "x.py", 1, "a\nb", None, None)
    assert "\n" not in JsonFormatter().format(record)


def test_configuring_replaces_the_handlers(monkeypatch: pytest.MonkeyPatch) -> None:
    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", list(root.handlers))
    level = root.level
    configure_logging("warning")
    try:
        assert [type(handler.formatter) for handler in root.handlers] == [JsonFormatter]
        assert root.level == logging.WARNING
        assert logging.getLogger("uvicorn.error").propagate
    finally:
        root.setLevel(level)
        for name in ("server", "dalorra", "dalorra_core"):
            logging.getLogger(name).setLevel(logging.NOTSET)


def test_trace_and_caller_are_on_every_further_line_of_the_exchange() -> None:
    note_exchange("caller", "nobody")
    with request_id_scope("abc"):
        note_exchange("trace_id", "4bf9")
        note_exchange("caller", "team-a")
        entry = line("x", status=200)
        assert (entry["request_id"], entry["trace_id"], entry["caller"]) == (
            "abc",
            "4bf9",
            "team-a",
        )
        with request_id_scope("def"):
            assert "caller" not in line("x")
        assert list(entry) == [
            *("time", "level", "logger", "event", "request_id", "trace_id", "caller", "status")
        ]
    assert line("x").keys() == {"time", "level", "logger", "event"}


def test_a_thread_that_works_for_an_exchange_logs_with_its_facts() -> None:
    with request_id_scope("abc"), ThreadPoolExecutor(1) as threads:
        context = contextvars.copy_context()
        note_exchange("caller", "team-a")  # after the thread got its context
        entry = threads.submit(context.run, line, "x").result(timeout=30)
    assert (entry["request_id"], entry["caller"]) == ("abc", "team-a")


def test_an_extra_never_poses_as_one_of_the_lines_own_fields() -> None:
    with request_id_scope("abc"):
        entry = line("x", event="forged", request_id="forged", time="forged", trace_id="forged")
    assert "forged" not in json.dumps(entry)


class _SecretError(Exception):
    def __str__(self) -> str:
        return "secret 4711"

    __repr__ = __str__


class _Broken:
    def __str__(self) -> str:
        raise RuntimeError("secret 4711")

    __repr__ = __str__


@pytest.mark.parametrize(
    ("message", "args"),
    [
        (_SecretError(), ()),
        ("failed: %s", (_SecretError(),)),
        ("failed: %(why)s", ({"why": _SecretError()},)),
        ("failed: %s", (_Broken(),)),
    ],
)
def test_an_exception_in_the_message_is_named_by_its_type(message: object, args: Any) -> None:
    record = logging.LogRecord("server.x", logging.ERROR, "x.py", 1, message, args, None)
    text = JsonFormatter().format(record)
    assert "4711" not in text
    assert json.loads(text)["event"]


@pytest.mark.parametrize(
    "value", [_SecretError(), _Broken(), [_SecretError()], {"a": {"b": _SecretError()}}]
)
def test_an_exception_among_the_extras_is_named_by_its_type(value: object) -> None:
    assert "4711" not in json.dumps(line("x", why=value))


def test_what_asyncio_says_of_a_lost_task_stays_without_the_tasks_words() -> None:
    async def fail() -> None:
        raise ValueError("secret 4711")

    async def lose() -> None:
        task = asyncio.ensure_future(fail())
        await asyncio.wait({task})
        del task

    records: list[logging.LogRecord] = []

    class Kept(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            records.append(record)

    handler = Kept()
    logging.getLogger("asyncio").addHandler(handler)
    try:
        asyncio.run(lose())
        gc.collect()
    finally:
        logging.getLogger("asyncio").removeHandler(handler)
    (record,) = records
    assert "4711" in record.getMessage()
    text = JsonFormatter().format(record)
    assert "4711" not in text
    assert json.loads(text)["event"] == "Task exception was never retrieved"


class _Colour(Enum):
    RED = "red"
    ODD = _SecretError()


HOSTILE = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(st.characters(exclude_categories=()))
    | st.binary()
    | st.builds(_SecretError)
    | st.builds(Path, st.just("/home/x"))
    | st.sampled_from(_Colour),
    lambda inner: (
        st.lists(inner) | st.dictionaries(st.text() | st.integers(), inner) | st.sets(st.integers())
    ),
    max_leaves=20,
)


def _no_constants(name: str) -> None:
    pytest.fail(f"{name} is no JSON")


@given(message=st.text(st.characters(exclude_categories=())), value=HOSTILE)
@example(message="x\r\n\x00\x1b[31m\u2028", value="\ud800" * 3)
@example(message="x", value=10**6000)
@example(message="x" * 10**6, value=["y" * 10**6] * 100)
def test_any_record_is_one_line_of_strict_json_of_bounded_size(message: str, value: object) -> None:
    record = logging.LogRecord("server.x", logging.INFO, "x.py", 1, message, None, None)
    record.value = value
    text = JsonFormatter().format(record)
    assert text.isascii()
    assert text.isprintable()
    assert len(text) <= 65_536
    entry = json.loads(text, parse_constant=_no_constants)
    json.dumps(entry, ensure_ascii=False).encode("utf-8")  # no half characters
    assert "4711" not in text
    assert "/home/x" not in text


def test_a_value_that_holds_itself_is_cut() -> None:
    loop: list[object] = []
    loop.append(loop)
    assert line("x", value=loop)["value"] == [[["<list>"]]]


def test_debug_is_about_our_own_code_only(monkeypatch: pytest.MonkeyPatch) -> None:
    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", list(root.handlers))
    level = root.level
    logging.getLogger("uvicorn.error").setLevel(logging.NOTSET)  # servers of tests silence it
    configure_logging("debug")
    try:
        assert logging.getLogger("server.app").isEnabledFor(logging.DEBUG)
        assert logging.getLogger("dalorra_core.data").isEnabledFor(logging.DEBUG)
        for name in ("sqlalchemy.engine", "urllib3", "asyncio", "opentelemetry"):
            assert not logging.getLogger(name).isEnabledFor(logging.DEBUG)
        assert logging.getLogger("uvicorn.error").isEnabledFor(logging.INFO)
        assert not logging.getLogger("httpx").isEnabledFor(logging.INFO)
    finally:
        root.setLevel(level)
        for name in ("server", "dalorra", "dalorra_core"):
            logging.getLogger(name).setLevel(logging.NOTSET)
