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
