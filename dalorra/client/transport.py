"""Between steps and httpx: the only file that knows both."""

from typing import Any, TypedDict

import httpx

from dalorra.client.access import find_key
from dalorra.client.steps import Lost, Received, Send

__all__ = [
    "FAILURES",
    "MAX_ANSWER_BYTES",
    "TIMED_OUT",
    "TOO_LARGE",
    "build",
    "connection",
    "lost",
    "received",
]

CONNECT_S = 5.0  # a host that does not answer by then is not there; another attempt may find one

MAX_ANSWER_BYTES = 256 * 2**20
"""More than the largest answer of a server's own limits: 64 rows, 64 samples, 1000 labels."""

FAILURES = (httpx.RequestError, httpx.InvalidURL, UnicodeError)
"""What sending may raise; httpx reads where a redirect leads, though none is followed."""

TIMED_OUT = Lost("no answer in time", timed_out=True)
TOO_LARGE = Lost(f"the answer has more than {MAX_ANSWER_BYTES} bytes", too_large=True)


class Connection(TypedDict):
    """The arguments that both kinds of httpx client take."""

    base_url: httpx.URL
    headers: dict[str, str]
    limits: httpx.Limits


def connection(url: str, api_key: str | None, max_connections: int) -> Connection:
    """Return how to reach a server.

    Args:
        url: Where it listens, such as ``http://127.0.0.1:8000``, with a path where a proxy adds it.
        api_key: As for ``find_key``.
        max_connections: Connections at a time, at least 1.

    Raises:
        ValueError: One of them cannot be used.
    """
    try:
        base_url = httpx.URL(url)
    except (httpx.InvalidURL, TypeError):
        raise ValueError("url cannot be read as an address") from None
    if base_url.scheme not in ("http", "https") or not base_url.host:
        raise ValueError("url must begin with http:// or https:// and name a host")
    if base_url.userinfo:  # httpx would send it in the place of the key
        raise ValueError("url must not hold a user name or a password")
    if max_connections < 1:
        raise ValueError(f"max_connections must be at least 1, got {max_connections}")
    headers = {"Accept": "application/json", "User-Agent": "dalorra-client"}
    if (key := find_key(api_key)) is not None:
        headers["Authorization"] = f"Bearer {key}"
    limits = httpx.Limits(
        max_connections=max_connections, max_keepalive_connections=max_connections
    )
    return {"base_url": base_url, "headers": headers, "limits": limits}


def build(http: httpx.Client | httpx.AsyncClient, step: Send) -> httpx.Request:
    """Return a step as a request of httpx."""
    timeout = httpx.Timeout(step.timeout_s, connect=min(step.timeout_s, CONNECT_S))
    content: dict[str, Any] = {} if step.body is None else {"content": step.body}
    return http.build_request(
        step.method, step.path, headers=dict(step.headers), timeout=timeout, **content
    )


def received(response: httpx.Response, body: bytes) -> Received:
    """Return an answer of httpx's."""
    headers = {name.lower(): value for name, value in response.headers.items()}
    return Received(response.status_code, headers, body)


def lost(error: Exception) -> Lost:
    """Return what became of a request that httpx has no answer to; the error is of FAILURES."""
    if isinstance(error, httpx.ConnectError | httpx.ConnectTimeout):
        return Lost("could not connect to the server")
    if isinstance(error, httpx.TimeoutException):
        return TIMED_OUT
    return Lost(f"the connection broke off ({type(error).__name__})")
