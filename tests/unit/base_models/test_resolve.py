"""dalorra_core.base_models.resolve and the command line over it."""

import json
from pathlib import Path

import pytest

from dalorra_core.base_models.__main__ import main
from dalorra_core.base_models.catalogue import DEFAULT_ALIAS, builtin_model
from dalorra_core.base_models.fetch import RECORD_FILE
from dalorra_core.base_models.resolve import cache_root, resolve_base_model
from dalorra_core.errors import BaseModelError


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    directory = tmp_path / "model"
    directory.mkdir()
    (directory / "config.json").write_text("{}")
    (directory / "model.safetensors").write_bytes(b"")
    return directory


def test_a_directory_is_itself(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_base_model(model_dir) == model_dir
    monkeypatch.chdir(model_dir.parent)
    assert resolve_base_model("model") == model_dir


def test_a_home_directory_is_found(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(model_dir.parent))
    assert resolve_base_model("~/model") == model_dir


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors"])
def test_a_directory_that_is_no_model_is_named(model_dir: Path, missing: str) -> None:
    (model_dir / missing).unlink()
    (model_dir / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(BaseModelError, match=rf"{model_dir} must hold .*{missing[-11:]}"):
        resolve_base_model(model_dir)


@pytest.mark.parametrize("name", ["no-such-model", "./absent/dir", "/absent/dir", "a/b/c"])
def test_an_unknown_name_lists_what_it_could_be(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BaseModelError, match=f"a built-in alias \\({DEFAULT_ALIAS}\\) or a hub id"):
        resolve_base_model(name)


def test_an_unreachable_hub_says_what_to_do() -> None:
    """The test session is offline by HF_HUB_OFFLINE, so this is the library's real failure."""
    with pytest.raises(BaseModelError, match=r"'nobody/nothing' is no directory.*--base DIR"):
        resolve_base_model("nobody/nothing")


def complete(cache: Path) -> Path:
    """Write what a finished fetch leaves."""
    target = cache / "base_models" / builtin_model(DEFAULT_ALIAS).directory_name
    target.mkdir(parents=True)
    (target / "config.json").write_text("{}")
    (target / RECORD_FILE).write_text(json.dumps({"files": {"config.json": 2}}))
    return target


def test_a_fetched_alias_needs_nothing_but_the_cache(tmp_path: Path) -> None:
    target = complete(tmp_path)
    assert resolve_base_model(DEFAULT_ALIAS, cache_dir=tmp_path) == target


def test_the_cache_lies_where_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.setenv("XDG_CACHE_HOME", "/var/xdg")
    monkeypatch.setenv("DALORRA_CACHE", "~/dalorra")
    assert cache_root("/given") == Path("/given")
    assert cache_root() == Path("/home/someone/dalorra")
    monkeypatch.setenv("DALORRA_CACHE", "")
    assert cache_root() == Path("/var/xdg/dalorra")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_root() == Path("/home/someone/.cache/dalorra")


def test_the_command_prints_the_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    target = complete(tmp_path)
    monkeypatch.setenv("DALORRA_CACHE", str(tmp_path))
    assert main(["fetch"]) == 0
    assert capsys.readouterr().out == f"{target}\n"


def test_the_command_explains_a_failure(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fetch", "gpt-5"]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == (
        f"error: built-in base model must be one of {DEFAULT_ALIAS}, got 'gpt-5'\n"
    )


def test_the_command_reports_an_unwritable_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DALORRA_CACHE", str(tmp_path / "file"))
    assert main(["fetch"]) == 1
    error = capsys.readouterr().err
    assert "must be writable" in error
    assert "set DALORRA_CACHE to another directory" in error
