"""Logs as JSON lines that say whose exchange they belong to; never a request's text.

An exception's message may quote what a client wrote, so only its type and its frames are written,
wherever it stands: as the exception of a line, as the message, as an argument or as an extra.
"""

import contextlib
import json
import logging
import math
import sys
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from datetime import UTC, datetime
from enum import Enum
from itertools import islice
from typing import Literal

from server.ports import EngineFatalError

__all__ = [
    "JsonFormatter",
    "configure_logging",
    "current_request_id",
    "describe_error",
    "note_exchange",
    "request_id_scope",
]

# One dict for each exchange, shared by every task and thread that works for it.
_exchange: ContextVar[dict[str, str] | None] = ContextVar("dalorra_exchange", default=None)
_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "color_message"}
_FIRST = ("time", "level", "logger", "event", "request_id", "trace_id", "caller")
_OWN = ("server", "dalorra", "dalorra_core")
_MAX_CHARS = 2000
_MAX_ITEMS = 64
_MAX_DEPTH = 4
_MAX_LINE = 65_536
_INT64 = 1 << 63


@contextlib.contextmanager
def request_id_scope(request_id: str) -> Iterator[None]:
    """Put this id on every line that is logged inside."""
    token = _exchange.set({"request_id": request_id})
    try:
        yield
    finally:
        _exchange.reset(token)


def note_exchange(fact: Literal["trace_id", "caller"], value: str) -> None:
    """Put one more fact on every further line of this exchange; without effect outside of one."""
    if (facts := _exchange.get()) is not None:
        facts[fact] = value


def current_request_id() -> str:
    """Return the id of the exchange this code runs for; ``-`` outside of one."""
    return (_exchange.get() or {}).get("request_id", "-")


class JsonFormatter(logging.Formatter):
    """One record as one line of strict JSON in ASCII, whatever the record holds.

    First time, level, logger and event; then request_id, trace_id and caller where there are such;
    then the record's extras. Long values are cut, and what JSON cannot hold is named by its type.
    """

    def format(self, record: logging.LogRecord) -> str:
        """Return the line, without a line end."""
        moment = datetime.fromtimestamp(record.created, UTC)
        line: dict[str, object] = {
            "time": moment.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "event": _event(record),
        }
        line |= _exchange.get() or {}
        for key, value in vars(record).items():
            if key not in _STANDARD and key not in _FIRST:  # an extra never poses as one of ours
                line[key] = value
        if record.exc_info and record.exc_info[1] is not None:
            line |= describe_error(record.exc_info[1])
        text = json.dumps(_plain(line), allow_nan=False)
        if len(text) > _MAX_LINE:
            own = {key: value for key, value in line.items() if key in _FIRST}
            text = json.dumps(_plain({**own, "cut": True}), allow_nan=False)
        return text


def _event(record: logging.LogRecord) -> str:
    """Return a record's message without the words of any exception."""
    if isinstance(record.msg, BaseException):
        return type(record.msg).__name__
    args = record.args
    if isinstance(args, Mapping):
        args = {name: _named(arg) for name, arg in args.items()}
    elif args:
        args = tuple(_named(arg) for arg in args)
    record = logging.makeLogRecord({"name": record.name, "msg": record.msg, "args": args})
    try:
        event = record.getMessage()
    except Exception:  # noqa: BLE001 - a line that is badly written is still a line
        return str(record.msg)
    # asyncio adds the representation of the task, and so of the exception that it ended with
    return event.partition("\n")[0] if record.name == "asyncio" else event


def _named(value: object) -> object:
    return type(value).__name__ if isinstance(value, BaseException) else value


def _plain(value: object, depth: int = 0) -> object:
    """Return a value as strict JSON can hold it, of bounded size."""
    if isinstance(value, Mapping | list | tuple | set | frozenset) and depth >= _MAX_DEPTH:
        return f"<{type(value).__name__}>"
    if isinstance(value, Mapping):
        items = islice(value.items(), _MAX_ITEMS)
        return {_text(str(_scalar(k))): _plain(v, depth + 1) for k, v in items}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(item, depth + 1) for item in islice(value, _MAX_ITEMS)]
    return _scalar(value)


def _scalar(value: object) -> str | int | float | None:
    """Return what is no container: itself where it is a value of JSON, else its type's name."""
    if isinstance(value, Enum):
        value = value.value
    if isinstance(value, str):
        return _text(value)
    if isinstance(value, int):  # a bool too
        return value if -_INT64 <= value < _INT64 else f"<int of {value.bit_length()} bits>"
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return None if value is None else f"<{type(value).__name__}>"


def _text(value: str) -> str:
    """Return a text that any reader of JSON takes: of bounded length, without half a character."""
    cut = str(value) if len(value) <= _MAX_CHARS else f"{value[:_MAX_CHARS]}..."
    return cut.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


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
    """Send all logs of this process to standard error as JSON lines.

    ``debug`` is about Dalorra's own code: what a library writes there may hold a request's text.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter())
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(max(logging.INFO, logging.getLevelNamesMapping()[level.upper()]))
    for name in _OWN:
        logging.getLogger(name).setLevel(level.upper())
    for name in ("uvicorn", "uvicorn.error", "uvicorn.access"):
        logging.getLogger(name).handlers = []
        logging.getLogger(name).propagate = True
    logging.getLogger("uvicorn.access").setLevel(logging.WARNING)  # the middleware's line is ours
    logging.getLogger("httpx").setLevel(logging.WARNING)  # a line for every question to vLLM
