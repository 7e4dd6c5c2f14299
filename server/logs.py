"""Logs as JSON lines with the request's id; never a request's text, never an exception's message.

An exception's message may quote what a client wrote, so only its type and its frames are written.
"""

import contextlib
import json
import logging
import sys
from collections.abc import Iterator
from contextvars import ContextVar
from datetime import UTC, datetime

from server.ports import EngineFatalError

__all__ = [
    "JsonFormatter",
    "configure_logging",
    "current_request_id",
    "describe_error",
    "request_id_scope",
]

_request_id: ContextVar[str | None] = ContextVar("dalorra_request_id", default=None)
_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "color_message"}


@contextlib.contextmanager
def request_id_scope(request_id: str) -> Iterator[None]:
    """Put this id on every line that is logged inside."""
    token = _request_id.set(request_id)
    try:
        yield
    finally:
        _request_id.reset(token)


def current_request_id() -> str:
    """Return the id of the exchange this code runs for; ``-`` outside of one."""
    return _request_id.get() or "-"


class JsonFormatter(logging.Formatter):
    """One record as one JSON object: time, level, logger, event, request id and its extras."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line, without a line end."""
        moment = datetime.fromtimestamp(record.created, UTC)
        line: dict[str, object] = {
            "time": moment.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "event": record.getMessage(),
        }
        if (request_id := _request_id.get()) is not None:
            line["request_id"] = request_id
        line |= {key: value for key, value in vars(record).items() if key not in _STANDARD}
        if record.exc_info and record.exc_info[1] is not None:
            line |= describe_error(record.exc_info[1])
        return json.dumps(line, default=str)


def describe_error(error: BaseException) -> dict[str, object]:
    """Return an exception's type and its innermost frames, without its message."""
    frames: list[str] = []
    trace = error.__traceback__
    while trace is not None:
        code = trace.tb_frame.f_code
        name = code.co_filename.rsplit("/", 1)[-1]
        frames.append(f"{name}:{trace.tb_lineno} {code.co_qualname}")
        trace = trace.tb_next
    described: dict[str, object] = {"error": type(error).__name__, "frames": frames[-8:]}
    if isinstance(error, EngineFatalError):  # its text comes from the device, not from a client
        described["reason"] = str(error)
    return described


def configure_logging(level: str) -> None:
    """Send all logs of this process to standard error as JSON lines."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter())
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(level.upper())
    for name in ("uvicorn", "uvicorn.error", "uvicorn.access"):
        logging.getLogger(name).handlers = []
        logging.getLogger(name).propagate = True
    logging.getLogger("uvicorn.access").setLevel(logging.WARNING)  # the middleware's line is ours
