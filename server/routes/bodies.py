"""Read the JSON body of a short request."""

from typing import TypeVar

from pydantic import BaseModel
from starlette.requests import ClientDisconnect, Request

from server.errors import ApiError
from server.parsing import check_body_headers, parse_document, read_body
from server.service import service_of

__all__ = ["read_document"]

M = TypeVar("M", bound=BaseModel)


async def read_document(request: Request, schema: type[M]) -> M:
    """Return the body of a request as the document that it must be.

    Raises:
        ApiError: 400, 408, 413, 415 or 422, saying what is wrong with it.
    """
    settings = service_of(request).settings
    check_body_headers(request, settings.max_body_bytes)
    try:
        body = await read_body(request, settings)
    except ClientDisconnect:
        raise ApiError("client_disconnected", "the client left before the answer") from None
    return parse_document(body, schema)
