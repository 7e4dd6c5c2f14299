"""Where the key comes from, where it goes, and where it never shows."""

import httpx
import pytest

from dalorra.client import AsyncClient, Client, Retries
from dalorra.client.access import KEY_VARIABLE, find_key
from dalorra.client.retries import read_retry_after
from dalorra.client.transport import connection
from server.settings import unknown_environment

KEY = "dal_0123456789"


def test_the_argument_comes_before_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    assert find_key(None) is None
    monkeypatch.setenv(KEY_VARIABLE, KEY)
    assert find_key(None) == KEY
    assert find_key("another") == "another"
    assert find_key("") is None  # asked for none, although there is one


def test_the_server_does_not_take_the_variable_for_a_misspelt_setting(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(KEY_VARIABLE, KEY)
    assert KEY_VARIABLE not in unknown_environment()


@pytest.mark.parametrize("key", ["a b", "a\nb", "schlüssel", "\x00"])
def test_a_key_that_cannot_be_sent_is_refused_and_not_shown(key: str) -> None:
    with pytest.raises(ValueError, match=KEY_VARIABLE) as caught:
        find_key(key)
    assert key not in str(caught.value)


def test_the_key_goes_into_one_header_and_into_no_repr() -> None:
    made = connection("http://127.0.0.1:8000", KEY, 3)
    assert made["headers"]["Authorization"] == f"Bearer {KEY}"
    with Client(api_key=KEY) as client:
        assert KEY not in repr(client)
        assert KEY not in repr(vars(client))


@pytest.mark.parametrize(
    "url",
    ["", "127.0.0.1:8000", "ftp://host", "http://", "http://host:port", "/v1", "http://me:pw@host"],
)
def test_an_address_that_is_none_is_refused(url: str) -> None:
    for kind in (Client, AsyncClient):
        with pytest.raises(ValueError, match="url"):
            kind(url)


def test_numbers_outside_of_their_domain_are_refused() -> None:
    with pytest.raises(ValueError, match="max_connections must be at least 1, got 0"):
        Client(max_connections=0)
    with pytest.raises(ValueError, match="timeout_s"):
        AsyncClient(timeout_s=0)
    with pytest.raises(ValueError, match="max_attempts must be at least 1, got 0"):
        Retries(max_attempts=0)
    with pytest.raises(ValueError, match="base_s"):
        Retries(base_s=2, cap_s=1)


def test_a_path_before_the_routes_is_kept() -> None:
    seen: list[str] = []

    def answer(request: httpx.Request) -> httpx.Response:
        seen.append(str(request.url))
        return httpx.Response(200, json={})

    with Client("https://host/dalorra/", transport=httpx.MockTransport(answer)) as client:
        assert client.ready()
    assert seen == ["https://host/dalorra/health/ready"]


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("0", 0.0),
        ("120", 120.0),
        (" 7 ", 7.0),
        ("", None),
        ("soon", None),
        ("-1", None),
        ("1.5", None),
        ("9" * 10, None),
        ("٣", None),
        ("Thu, 01 Jan 1970 00:00:30 GMT", 20.0),
        ("Thu, 01 Jan 1970 00:00:01 GMT", 0.0),
        ("Thu, 01 Jan 99999 00:00:01 GMT", None),
    ],
)
def test_retry_after_is_read_or_left_alone(value: str, seconds: float | None) -> None:
    assert read_retry_after({"retry-after": value}, now_s=10.0) == seconds
