"""A test that needs a program must not be skipped where its absence would hide something."""

import pytest

from tests.support.required import require_or_skip


def test_what_is_found_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DALORRA_TEST_REQUIRE", "postgresql")
    assert require_or_skip("postgresql", "/usr/bin/pg_ctl") is None


def test_what_is_missing_is_skipped_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DALORRA_TEST_REQUIRE", "postgresql")
    with pytest.raises(pytest.skip.Exception, match="prometheus was not found"):
        require_or_skip("prometheus", None)


def test_what_is_missing_but_required_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DALORRA_TEST_REQUIRE", "postgresql, prometheus")
    with pytest.raises(pytest.fail.Exception, match="asks for it"):
        require_or_skip("prometheus", None)
