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


VLLM = {
    "engine": "vllm",
    "vllm_url": "http://127.0.0.1:8001",
    "vllm_export": "exported",
    "adapter": "adapters/clinc150",
}


def test_the_vllm_engine_needs_an_artifact_and_its_export() -> None:
    settings = Settings(**VLLM)  # type: ignore[arg-type]
    assert settings.vllm_api_key is None
    assert "hush" not in repr(Settings(**VLLM, vllm_api_key="hush"))  # type: ignore[arg-type]
    for name in ("vllm_url", "vllm_export", "adapter"):
        rest = {key: value for key, value in VLLM.items() if key != name}
        with pytest.raises(ValidationError, match=f"engine vllm needs {name}"):
            Settings(**rest)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"adapter_root": "adapters"}, "adapter_root must be left out with engine vllm"),
        ({"pass_memory_mb": 10}, "pass_memory_mb must be left out with engine vllm"),
        ({"deterministic": True}, "deterministic must be left out with engine vllm"),
        ({"device": "cuda"}, "device must be auto with engine vllm, .* got cuda"),
        ({"engine": "local"}, "vllm_export needs engine vllm, got engine local"),
        ({"vllm_url": "127.0.0.1:8001"}, "must be http://HOST:PORT"),
        ({"vllm_url": "http://user:pass@host:1"}, "must be http://HOST:PORT"),
        ({"vllm_url": "http://host:8001/v1/"}, "must be http://HOST:PORT"),
        ({"vllm_url": "http://host:99999"}, "must be http://HOST:PORT"),
        ({"vllm_url": "http://a host:8001"}, "must be http://HOST:PORT"),
        ({"vllm_url": "http://host\x01:8001"}, "must be http://HOST:PORT"),
        ({"vllm_timeout_s": 0}, "greater than 0"),
    ],
)
def test_what_does_not_go_with_the_vllm_engine(values: dict[str, object], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        Settings(**{**VLLM, **values})  # type: ignore[arg-type]
