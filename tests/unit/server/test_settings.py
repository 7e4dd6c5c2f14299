import pytest
from pydantic import ValidationError

from server.settings import Settings, unknown_environment


def test_the_environment_is_read_with_its_prefix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DALORRA_MAX_ROWS", "7")
    monkeypatch.setenv("DALORRA_HOST", "0.0.0.0")
    settings = Settings()
    assert (settings.max_rows, settings.host) == (7, "0.0.0.0")


def test_an_argument_wins_over_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DALORRA_MAX_ROWS", "7")
    assert Settings(max_rows=9).max_rows == 9


@pytest.mark.parametrize(("text", "value"), [("auto", "auto"), ("256", 256)])
def test_the_size_of_a_pass_is_a_number_or_left_to_a_trial(
    monkeypatch: pytest.MonkeyPatch, text: str, value: int | str
) -> None:
    assert Settings().pass_tokens is None
    monkeypatch.setenv("DALORRA_PASS_TOKENS", text)
    assert Settings().pass_tokens == value


def test_an_unknown_setting_is_an_error() -> None:
    with pytest.raises(ValidationError, match="max_row"):
        Settings(max_row=9)  # type: ignore[call-arg]


def test_a_misspelt_variable_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DALORRA_MAX_ROW", "7")
    monkeypatch.setenv("DALORRA_PORT", "80")
    monkeypatch.setenv("DALORRA_CACHE", "/tmp")
    assert unknown_environment() == ["DALORRA_MAX_ROW"]


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"request_timeout_s": 10, "max_request_timeout_s": 5}, "must not exceed"),
        ({"max_rows": 600}, "could never enter"),
        ({"port": 70_000}, "65535"),
        ({"pass_tokens": 0}, "greater than or equal to 1"),
        ({"pass_tokens": "many"}, "'auto'"),
        ({"drain_seconds": -1}, "greater than or equal to 0"),
    ],
)
def test_values_outside_their_domain(values: dict[str, float | str], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        Settings(**values)  # type: ignore[arg-type]
