from pathlib import Path

import pytest
import typer
from typer.core import TyperGroup
from typer.testing import CliRunner

from server.cli import app
from server.settings import Settings

RUN = CliRunner()


def test_help_names_every_option_and_the_exit_codes() -> None:
    result = RUN.invoke(app, ["serve", "--help"], env={"COLUMNS": "200", "TERM": "dumb"})
    assert result.exit_code == 0
    for option in (
        *("--base", "--host", "--port", "--device", "--dtype", "--drain-seconds"),
        *("--max-rows", "--max-queued-rows", "--max-batch-tokens", "--request-timeout"),
        *("--adapter-root", "--trusted-keys", "--api-keys-file", "--allow-unauthenticated"),
        *("--engine", "--vllm-url", "--vllm-export"),
        *("--tls-cert", "--tls-key", "--tls-client-ca", "--otel-endpoint"),
    ):
        assert option in result.output
    assert "Exit status" in result.output
    assert "DALORRA_MAX_ROWS" in result.output


def test_every_default_in_the_help_is_the_settings_default() -> None:
    group = typer.main.get_command(app)
    assert isinstance(group, TyperGroup)
    compared = 0
    for option in group.commands["serve"].params:
        stated = (getattr(option, "help", None) or "").partition("[default: ")[2].rstrip("]")
        default = Settings.model_fields[option.name or ""].default if option.name else None
        if stated and default is not None and not isinstance(default, bool):
            shown = f"{default:g}" if isinstance(default, float) else str(default)
            assert stated == shown, option.name
            compared += 1
    assert compared >= 15


def test_an_adapter_is_needed() -> None:
    result = RUN.invoke(app, ["serve"])
    assert result.exit_code == 2
    assert "give an adapter directory" in result.output


def test_a_directory_that_is_no_adapter(tmp_path: Path) -> None:
    result = RUN.invoke(app, ["serve", str(tmp_path)])
    assert result.exit_code == 2
    assert "has no manifest.json" in result.output


def test_the_vllm_engine_needs_an_export(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").touch()
    vllm = ["serve", str(tmp_path), "--engine", "vllm", "--vllm-url", "http://127.0.0.1:1"]
    result = RUN.invoke(app, vllm)
    assert result.exit_code == 2
    assert "engine vllm needs vllm_export" in result.output
    result = RUN.invoke(app, [*vllm, "--vllm-export", str(tmp_path)])
    assert result.exit_code == 2
    assert "has no dalorra-export.json" in result.output
    result = RUN.invoke(app, ["serve", str(tmp_path), "--engine", "tpu"])
    assert result.exit_code == 2
    assert "engine" in result.output


@pytest.mark.parametrize(
    ("arguments", "says"),
    [(["--port", "99999"], "port"), (["--dtype", "int3"], "dtype"), (["--max-rows", "0"], "rows")],
)
def test_a_setting_outside_its_domain(arguments: list[str], says: str) -> None:
    result = RUN.invoke(app, ["serve", "somewhere", *arguments])
    assert result.exit_code == 2
    assert f"dalorra serve: {'max_' if says == 'rows' else ''}{says}: " in result.output


def test_settings_that_contradict_each_other_show_no_password(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DALORRA_FEEDBACK_URL", "postgresql://u:hunter2@h/d")
    monkeypatch.setenv("DALORRA_REQUEST_TIMEOUT_S", "500")
    result = RUN.invoke(app, ["serve", str(tmp_path)])
    assert result.exit_code == 2
    assert "request_timeout_s (500.0) must not exceed max_request_timeout_s (120.0)" in (
        result.output
    )
    assert "hunter2" not in result.output


@pytest.fixture
def adapter(tmp_path: Path) -> str:
    (tmp_path / "manifest.json").write_text("{}")
    return str(tmp_path)


def test_an_open_address_without_keys_does_not_start(adapter: str) -> None:
    result = RUN.invoke(app, ["serve", adapter, "--host", "0.0.0.0"])
    assert result.exit_code == 2
    for name in ("host is '0.0.0.0'", "api_keys_file", "allow_unauthenticated"):
        assert name in result.output


def test_files_of_keys_and_certificates_that_cannot_be_used(adapter: str, tmp_path: Path) -> None:
    wrong = str(tmp_path / "manifest.json")
    cases = {
        "api_keys_file: No such file": ["--api-keys-file", str(tmp_path / "none")],
        "api_keys_file: keys: ": ["--api-keys-file", str(_file(tmp_path, '{"keys": 3}'))],
        "tls_cert and tls_key must be given together": ["--tls-cert", wrong],
        "tls_client_ca needs": ["--tls-client-ca", wrong],
        "tls_cert or tls_key cannot be used": ["--tls-cert", wrong, "--tls-key", wrong],
    }
    for says, options in cases.items():
        result = RUN.invoke(app, ["serve", adapter, *options], env={"DALORRA_FEEDBACK_URL": "off"})
        assert result.exit_code == 2, says
        assert says in result.output
        assert "Traceback" not in result.output


def _file(folder: Path, text: str) -> Path:
    path = folder / "keys.json"
    path.write_text(text)
    return path


def test_an_adapter_root_is_enough_and_must_be_a_directory(tmp_path: Path) -> None:
    missing = RUN.invoke(app, ["serve", "--adapter-root", str(tmp_path / "none")])
    assert missing.exit_code == 2
    assert "is not a directory" in missing.output
    # past the options: the next fault is found
    enough = RUN.invoke(app, ["serve", "--adapter-root", str(tmp_path), "--host", "0.0.0.0"])
    assert "api_keys_file" in enough.output
