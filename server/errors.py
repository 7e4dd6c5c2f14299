"""Every error the API can answer with, and its one form: RFC 9457 with an OpenAI-shaped member.

``ProblemCode`` -> status and title is one table. Details name what is wrong, the limit and the
value; they never quote a request's text.
"""

import json
from collections.abc import Mapping
from http import HTTPStatus
from typing import Literal

from starlette.responses import Response

__all__ = ["PROBLEMS", "ApiError", "ProblemCode", "problem_body", "problem_response"]

ProblemCode = Literal[
    "malformed_json",
    "bad_header",
    "unauthorized",
    "forbidden",
    "not_found",
    "model_not_found",
    "source_not_found",
    "alias_not_found",
    "prediction_not_found",
    "feedback_disabled",
    "method_not_allowed",
    "request_timeout",
    "feedback_conflict",
    "base_mismatch",
    "adapter_in_use",
    "no_room",
    "adapters_fixed",
    "body_too_large",
    "too_many_rows",
    "unsupported_media_type",
    "bad_host",
    "invalid_request",
    "input_too_long",
    "input_rejected",
    "unknown_label",
    "unknown_policy",
    "policy_not_applicable",
    "policy_locked",
    "not_certified",
    "not_calibrated",
    "adapter_invalid",
    "adapter_untrusted",
    "self_test_failed",
    "queue_full",
    "rate_limited",
    "headers_too_large",
    "internal_error",
    "not_ready",
    "draining",
    "engine_unavailable",
    "out_of_memory",
    "feedback_unavailable",
    "deadline_exceeded",
    "client_disconnected",
    "http_error",
]

PROBLEMS: dict[ProblemCode, tuple[int, str]] = {
    "malformed_json": (400, "Malformed JSON"),
    "bad_header": (400, "Bad header value"),
    "unauthorized": (401, "Unauthorized"),
    "forbidden": (403, "Forbidden"),
    "not_found": (404, "Route not found"),
    "model_not_found": (404, "Model not found"),
    "source_not_found": (404, "Adapter directory not found"),
    "alias_not_found": (404, "Alias not found"),
    "prediction_not_found": (404, "Prediction not found"),
    "feedback_disabled": (404, "Feedback disabled"),
    "method_not_allowed": (405, "Method not allowed"),
    "request_timeout": (408, "Request timeout"),
    "feedback_conflict": (409, "Feedback conflict"),
    "base_mismatch": (409, "Base model mismatch"),
    "adapter_in_use": (409, "Adapter in use"),
    "no_room": (409, "No room for the adapter"),
    "adapters_fixed": (409, "Adapters are fixed"),
    "body_too_large": (413, "Body too large"),
    "too_many_rows": (413, "Too many rows"),
    "unsupported_media_type": (415, "Unsupported media type"),
    "bad_host": (421, "Bad host"),
    "invalid_request": (422, "Invalid request"),
    "input_too_long": (422, "Input too long"),
    "input_rejected": (422, "Input rejected"),
    "unknown_label": (422, "Unknown label"),
    "unknown_policy": (422, "Unknown policy"),
    "policy_not_applicable": (422, "Policy not applicable"),
    "policy_locked": (422, "Policy locked"),
    "not_certified": (422, "Not certified"),
    "not_calibrated": (422, "Not calibrated"),
    "adapter_invalid": (422, "Adapter invalid"),
    "adapter_untrusted": (422, "Adapter not trusted"),
    "self_test_failed": (422, "Self test failed"),
    "queue_full": (429, "Queue full"),
    "rate_limited": (429, "Rate limited"),
    "headers_too_large": (431, "Headers too large"),
    "client_disconnected": (499, "Client disconnected"),
    "internal_error": (500, "Internal error"),
    "not_ready": (503, "Not ready"),
    "draining": (503, "Draining"),
    "engine_unavailable": (503, "Engine unavailable"),
    "out_of_memory": (503, "Out of memory"),
    "feedback_unavailable": (503, "Feedback unavailable"),
    "deadline_exceeded": (504, "Deadline exceeded"),
    "http_error": (0, "HTTP error"),
}


class ApiError(Exception):
    """An answer other than 2xx.

    Attributes:
        code: The machine-readable name of the error.
        detail: One sentence for a person.
        errors: One mapping per fault, with ``pointer`` (RFC 6901, as a URI fragment) and what
            else is known: ``code``, ``detail``, ``limit``, ``actual``, ``close_names``.
        headers: Further response headers.
        status: HTTP status, from the table unless the error says otherwise.
    """

    def __init__(
        self,
        code: ProblemCode,
        detail: str,
        *,
        errors: tuple[Mapping[str, object], ...] = (),
        headers: Mapping[str, str] | None = None,
        status: int | None = None,
    ) -> None:
        super().__init__(detail)
        self.code: ProblemCode = code
        self.detail = detail
        self.errors = errors
        self.headers = dict(headers or {})
        self.status = status or PROBLEMS[code][0]


def problem_body(
    error: ApiError, *, instance: str, request_id: str, type_base: str
) -> dict[str, object]:
    """Return the problem document of an error.

    Args:
        error: The error.
        instance: Path of the request.
        request_id: Id by which the logs know the request.
        type_base: Prefix of the ``type`` URI.
    """
    title = PROBLEMS[error.code][1]
    if error.code == "http_error":
        title = HTTPStatus(error.status).phrase
    pointer = str(error.errors[0].get("pointer", "")) if error.errors else ""
    return {
        "type": type_base + error.code.replace("_", "-"),
        "title": title,
        "status": error.status,
        "detail": error.detail,
        "instance": instance,
        "code": error.code,
        "request_id": request_id,
        "errors": [dict(fault) for fault in error.errors],
        # the Open Inference Protocol, spoken under /v2, has a string there
        "error": error.detail
        if instance == "/v2" or instance.startswith("/v2/")
        else {
            "message": error.detail,
            "type": _openai_type(error.status),
            "param": _param(pointer),
            "code": error.code,
        },
    }


def problem_response(
    error: ApiError, *, instance: str, request_id: str, type_base: str
) -> Response:
    """Return an error as an HTTP response; see ``problem_body``."""
    body = problem_body(error, instance=instance, request_id=request_id, type_base=type_base)
    # ASCII escapes: a lone surrogate in a client's field name has no UTF-8 form
    return Response(
        json.dumps(body),
        status_code=error.status,
        media_type="application/problem+json",
        headers=error.headers,
    )


def _openai_type(status: int) -> str:
    if status == HTTPStatus.TOO_MANY_REQUESTS:
        return "rate_limit_error"
    if status >= HTTPStatus.INTERNAL_SERVER_ERROR:
        return "server_error"
    return "invalid_request_error"


def _param(pointer: str) -> str | None:
    """Return ``#/input/1/text`` as ``input[1].text``; None for the whole document."""
    parts = [part.replace("~1", "/").replace("~0", "~") for part in pointer.split("/")[1:]]
    text = ""
    for part in parts:
        text += f"[{part}]" if part.isdecimal() else f".{part}"
    return text.removeprefix(".") or None
