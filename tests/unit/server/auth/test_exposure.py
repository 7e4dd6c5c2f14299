from pathlib import Path

import pytest

from server.auth.exposure import exposure_fault, is_loopback, names_loopback
from server.settings import Settings


@pytest.mark.parametrize("host", ["127.0.0.1", "127.5.0.9", "::1", "[::1]", "localhost"])
def test_loopback(host: str) -> None:
    assert is_loopback(host)
    assert exposure_fault(Settings(host=host)) is None


@pytest.mark.parametrize(
    "host", ["0.0.0.0", "::", "", "10.0.0.1", "192.168.1.4", "example.org", "localhost.example"]
)
def test_other_addresses_need_keys_or_a_word(host: str) -> None:
    fault = exposure_fault(Settings(host=host))
    assert fault is not None
    for name in (repr(host), "host", "api_keys_file", "allow_unauthenticated"):
        assert name in fault
    assert exposure_fault(Settings(host=host, allow_unauthenticated=True)) is None
    assert exposure_fault(Settings(host=host, api_keys_file=Path("keys.json"))) is None


@pytest.mark.parametrize(
    "host",
    ["localhost", "localhost:8000", "LOCALHOST:1", "127.0.0.1:80", "[::1]:8000", "a.localhost"],
)
def test_a_host_header_may_name_this_machine(host: str) -> None:
    assert names_loopback([host])


@pytest.mark.parametrize(
    "host",
    [
        "",
        "evil.example",
        "evil.example:8000",
        "localhost.evil.example",
        "127.0.0.1.evil.example",
        "10.0.0.1:8000",
        "0.0.0.0:8000",
        "[::ffff:10.0.0.1]",
        "localhost:8000:evil",
        "localhost@evil.example",
        "localhost evil",
        "localhost\x00",
    ],
)
def test_a_host_header_may_name_nothing_else(host: str) -> None:
    assert not names_loopback([host])


def test_one_host_header_or_none() -> None:
    assert names_loopback([])
    assert not names_loopback(["localhost", "evil.example"])
