"""From bytes to a checked request: size, JSON, schema, limits; each fault with its pointer."""

import difflib
import json
from collections.abc import Mapping
from typing import Any, NoReturn, TypeVar

from pydantic import BaseModel, ValidationError
from starlette.requests import Request

from server.errors import ApiError
from server.schemas.requests import (
    ClassifyRequest,
    QuestionItem,
    TextItem,
    field_names,
    is_union_tag,
)
from server.settings import Settings

__all__ = ["MAX_FAULTS", "check_body_headers", "parse_document", "parse_request", "read_body"]

M = TypeVar("M", bound=BaseModel)
MAX_FAULTS = 20
_FAULT_CODES = {"extra_forbidden": "unknown_field", "missing": "missing_field"}
_METADATA_DETAIL = (
    "must be a name of 1 to 64 characters with a string of at most 512, a finite number, "
    "true, false or null"
)


def check_body_headers(request: Request, max_body_bytes: int) -> None:
    """Refuse a body that its headers already condemn, before a byte of it is read.

    Raises:
        ApiError: 415 unless the content is JSON, 413 when its announced length is too much.
    """
    media_type, _, parameters = request.headers.get("content-type", "").partition(";")
    charset = parameters.strip().lower().removeprefix("charset=").strip('"')
    if media_type.strip().lower() != "application/json" or charset not in ("", "utf-8", "utf8"):
        raise ApiError(
            "unsupported_media_type",
            "Content-Type must be application/json in UTF-8",
            headers={"Accept": "application/json"},
        )
    announced = request.headers.get("content-length", "")
    if announced.isdecimal() and int(announced) > max_body_bytes:
        raise _too_large(max_body_bytes, int(announced))


async def read_body(request: Request, max_body_bytes: int) -> bytes:
    """Return the body, with or without an announced length.

    Raises:
        ApiError: 413 as soon as more bytes than the limit have come.
        ClientDisconnect: The client left before the body was complete.
    """
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > max_body_bytes:
            raise _too_large(max_body_bytes, None)
    return bytes(body)


def parse_request(body: bytes, settings: Settings) -> ClassifyRequest:
    """Return the request in a body.

    Raises:
        ApiError: 400 when it is not JSON, 422 when it does not keep to the schema or a limit, 413
            when it has too many rows.
    """
    document = _parse_json(body)
    rows = document.get("input") if isinstance(document, dict) else None
    if isinstance(rows, list) and len(rows) > settings.max_rows:
        raise ApiError(
            "too_many_rows",
            f"input has {len(rows)} rows; the limit max_rows is {settings.max_rows}",
            errors=({"pointer": "#/input", "limit": settings.max_rows, "actual": len(rows)},),
        )
    request = _validate(document, ClassifyRequest)
    _check_limits(request, settings)
    return request


def parse_document(body: bytes, schema: type[M]) -> M:
    """Return a body as the request that it must be.

    Raises:
        ApiError: 400 when it is not JSON, 422 when it does not keep to the schema.
    """
    return _validate(_parse_json(body), schema)


def _validate(document: Any, schema: type[M]) -> M:
    try:
        return schema.model_validate(document)
    except ValidationError as error:
        raise _schema_error(error, schema) from None  # the cause would carry the text


def _parse_json(body: bytes) -> Any:
    try:
        return json.loads(
            body.decode("utf-8"), parse_constant=_refuse_constant, object_pairs_hook=_unique_keys
        )
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise ApiError("malformed_json", f"the body is not JSON: {error.msg} at {where}") from None
    except UnicodeDecodeError as error:
        detail = f"the body is not UTF-8 (byte {error.start})"
        raise ApiError("malformed_json", detail) from None
    except RecursionError:
        raise ApiError("malformed_json", "the body is nested too deeply") from None
    except ValueError as error:  # from the two hooks, or an integer of thousands of digits
        raise ApiError("malformed_json", f"the body is not JSON: {error}") from None


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    document = dict(pairs)
    if len(document) != len(pairs):
        raise ValueError("an object has the same key twice")
    return document


def _schema_error(error: ValidationError, schema: type[BaseModel]) -> ApiError:
    faults: dict[str, Mapping[str, object]] = {}
    for fault in error.errors(include_url=False, include_input=False, include_context=False):
        described = _describe(fault["loc"], fault["type"], fault["msg"], schema)
        faults.setdefault(str(described["pointer"]), described)
    first = next(iter(faults.values()))
    more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
    detail = f"{first['pointer']}: {first['detail']}{more}"
    return ApiError("invalid_request", detail, errors=tuple(faults.values())[:MAX_FAULTS])


def _describe(
    location: tuple[int | str, ...], kind: str, message: str, schema: type[BaseModel]
) -> dict[str, object]:
    names = [str(part) for part in location if not is_union_tag(part)]
    if names[:1] == ["metadata"] and len(names) > 1:
        names, message, kind = names[:2], _METADATA_DETAIL, "metadata_value"
    if kind == "mixed_forms" and not names:
        names = ["input"]
    fault: dict[str, object] = {
        "pointer": "/".join(["#", *(_escape(name) for name in names)]),
        "code": _FAULT_CODES.get(kind, kind),
        "detail": message[:1].lower() + message[1:],
    }
    if kind == "extra_forbidden":
        known = field_names(location, schema)
        close = difflib.get_close_matches(names[-1], known, n=3)
        advice = f"did you mean {close[0]}?" if close else f"allowed: {', '.join(known)}"
        fault |= {"detail": f"unknown field; {advice}", "close_names": close}
    return fault


def _escape(name: str) -> str:
    shown = name if len(name) <= 64 else name[:61] + "..."  # noqa: PLR2004 - one line of text
    return shown.replace("~", "~0").replace("/", "~1")


def _check_limits(request: ClassifyRequest, settings: Settings) -> None:
    limit = settings.max_text_chars
    for index, item in enumerate(request.items):
        actual = _num_chars(item)
        if actual > limit:
            raise ApiError(
                "input_too_long",
                f"row {index} has {actual} characters; the limit max_text_chars is {limit}",
                errors=(
                    {
                        "pointer": request.pointer(index),
                        "limit": limit,
                        "actual": actual,
                        "unit": "characters",
                    },
                ),
            )
    samples = request.num_samples
    if samples is not None and samples > settings.max_num_samples:
        limit = settings.max_num_samples
        raise ApiError(
            "invalid_request",
            f"num_samples must be between 1 and {limit}, got {samples}",
            errors=({"pointer": "#/num_samples", "limit": limit, "actual": samples},),
        )


def _num_chars(item: str | TextItem | QuestionItem) -> int:
    """Return the characters of a row: of its text, or of question, context and choices together."""
    if isinstance(item, QuestionItem):
        choices = sum(len(option.text) + len(option.label) for option in item.options())
        return len(item.question) + len(item.context or "") + choices
    return len(item.text if isinstance(item, TextItem) else item)


def _too_large(limit: int, actual: int | None) -> ApiError:
    size = "more" if actual is None else f"{actual} bytes"
    fault: dict[str, object] = {"pointer": "#", "limit": limit, "unit": "bytes"}
    if actual is not None:
        fault["actual"] = actual
    return ApiError(
        "body_too_large",
        f"the body has {size}; the limit max_body_bytes is {limit} bytes",
        errors=(fault,),
    )
