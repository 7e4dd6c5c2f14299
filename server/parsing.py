"""From bytes to a checked request: size, JSON, schema, limits; each fault with its pointer."""

import asyncio
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
from server.schemas.vllm import INSTEAD
from server.settings import Settings

__all__ = [
    "MAX_FAULTS",
    "check_body_headers",
    "check_limits",
    "check_num_rows",
    "parse_document",
    "parse_json",
    "parse_request",
    "read_body",
    "validate",
]

M = TypeVar("M", bound=BaseModel)
MAX_FAULTS = 20
_MAX_READ = 10 * MAX_FAULTS  # of the schema's faults; several may be about one place
_MAX_NAME = 64
_FAULT_CODES = {"extra_forbidden": "unknown_field", "missing": "missing_field"}
# Faults of several fields together, and the one to point at
_FIELD_OF = {
    "duplicate_output": "outputs",
    "mixed_forms": "input",
    "no_effect": "truncation_side",
    "two_names": "truncate_prompt_tokens",
}
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


async def read_body(request: Request, settings: Settings) -> bytes:
    """Return the body, with or without an announced length.

    Raises:
        ApiError: 413 as soon as more bytes than ``max_body_bytes`` have come, 408 when they have
            not all come within ``body_timeout_s``.
        ClientDisconnect: The client left before the body was complete.
    """
    try:
        async with asyncio.timeout(settings.body_timeout_s):
            return await _receive(request, settings.max_body_bytes)
    except TimeoutError:
        raise ApiError(
            "request_timeout",
            f"the body did not come within body_timeout_s ({settings.body_timeout_s:g} s)",
            # the rest of the body may yet come, and is not to be read as the next request
            headers={"Connection": "close"},
        ) from None


async def _receive(request: Request, max_body_bytes: int) -> bytes:
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
    document = parse_json(body)
    check_num_rows(document.get("input") if isinstance(document, dict) else None, "input", settings)
    request = validate(document, ClassifyRequest)
    check_limits(request, settings)
    return request


def parse_document(body: bytes, schema: type[M]) -> M:
    """Return a body as the request that it must be.

    Raises:
        ApiError: 400 when it is not JSON, 422 when it does not keep to the schema.
    """
    return validate(parse_json(body), schema)


def check_num_rows(rows: object, field: str, settings: Settings) -> None:
    """Refuse a list that is too long, before anything is made of its entries.

    Args:
        rows: What the body has in a field, of any form.
        field: Where that is, such as ``input`` or ``inputs/0/data``.
        settings: Has ``max_rows``.

    Raises:
        ApiError: 413.
    """
    if isinstance(rows, list) and len(rows) > settings.max_rows:
        raise ApiError(
            "too_many_rows",
            f"{field} has {len(rows)} rows; the limit max_rows is {settings.max_rows}",
            errors=({"pointer": f"#/{field}", "limit": settings.max_rows, "actual": len(rows)},),
        )


def validate(document: Any, schema: type[M]) -> M:
    """Return a JSON document as the request that it must be.

    Raises:
        ApiError: 422 when it does not keep to the schema.
    """
    try:
        return schema.model_validate(document)
    except ValidationError as error:
        raise _schema_error(error, schema) from None  # the cause would carry the text


def parse_json(body: bytes) -> Any:
    """Return a body as JSON.

    Raises:
        ApiError: 400 when it is not JSON in UTF-8, has a key twice or is nested too deeply.
    """
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
    found = error.errors(include_url=False, include_input=False, include_context=False)
    for fault in found[:_MAX_READ]:  # a body has room for a hundred thousand
        described = _describe(fault["loc"], fault["type"], fault["msg"], schema)
        faults.setdefault(str(described["pointer"]), described)
    first = next(iter(faults.values()))
    others = len(faults) - 1
    at_least = "at least " if len(found) > _MAX_READ else ""
    more = f" (and {at_least}{others} more)" if others else ""
    detail = f"{first['pointer']}: {first['detail']}{more}"
    return ApiError("invalid_request", detail, errors=tuple(faults.values())[:MAX_FAULTS])


def _describe(
    location: tuple[int | str, ...], kind: str, message: str, schema: type[BaseModel]
) -> dict[str, object]:
    names = [str(part) for part in location if not is_union_tag(part)]
    if names[:1] == ["metadata"] and len(names) > 1:
        names, message, kind = names[:2], _METADATA_DETAIL, "metadata_value"
    if kind in _FIELD_OF and not names:
        names = [_FIELD_OF[kind]]
    fault: dict[str, object] = {
        "pointer": "/".join(["#", *(_escape(name) for name in names)]),
        "code": _FAULT_CODES.get(kind, kind),
        "detail": message[:1].lower() + message[1:],
    }
    if kind == "extra_forbidden":
        known = field_names(location, schema)
        close = difflib.get_close_matches(names[-1][:_MAX_NAME], known, n=3)
        advice = f"did you mean {close[0]}?" if close else f"allowed: {', '.join(known)}"
        if schema is ClassifyRequest and len(location) == 1:
            advice = INSTEAD.get(names[0], advice)
        fault |= {"detail": f"unknown field; {advice}", "close_names": close}
    return fault


def _escape(name: str) -> str:
    shown = name if len(name) <= _MAX_NAME else name[: _MAX_NAME - 3] + "..."
    return shown.replace("~", "~0").replace("/", "~1")


def check_limits(request: ClassifyRequest, settings: Settings) -> None:
    """Refuse rows with too many characters, and too many samples.

    Raises:
        ApiError: 422 naming the first row, or the number of samples.
    """
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
    costs_passes = request.estimator != "linearised"  # whose draws cost none; see resolve_sampling
    if costs_passes and samples is not None and samples > settings.max_num_samples:
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
