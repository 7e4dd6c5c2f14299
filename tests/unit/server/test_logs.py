import json
import logging
from typing import Any

import pytest

from server.logs import JsonFormatter, configure_logging, current_request_id, request_id_scope
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
