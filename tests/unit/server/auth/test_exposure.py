from pathlib import Path

import pytest

from server.auth.exposure import exposure_fault, is_loopback
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
