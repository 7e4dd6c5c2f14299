"""The adapter root: paths never leave it."""

import os
from pathlib import Path

import pytest

from server.adapters import AdapterRoot
from server.errors import ApiError


@pytest.fixture
def root(tmp_path: Path) -> Path:
    path = tmp_path / "root"
    (path / "topics-v1").mkdir(parents=True)
    (path / "topics-v1" / "manifest.json").write_text("{}")
    (tmp_path / "outside").mkdir()
    return path


@pytest.mark.parametrize(
    "source",
    [
        "..",
        ".",
        "",
        "../outside",
        "topics-v1/..",
        "topics-v1/../../outside",
        "/etc",
        "//etc",
        "~root",
        "topics-v1\x00",
        "topics-v1/",
        "a\\b",
        "topics-v1\n",
        ".hidden",
        "%2e%2e",
        "x" * 65,
        "töpics",
    ],
)
def test_what_is_no_plain_name_is_refused_before_the_disk_is_asked(root: Path, source: str) -> None:
    with pytest.raises(ApiError) as caught:
        AdapterRoot(root).find(source)
    assert (caught.value.code, caught.value.status) == ("invalid_request", 422)
    assert str(root) not in caught.value.detail


def test_a_directory_is_found(root: Path) -> None:
    assert AdapterRoot(root).find("topics-v1") == root / "topics-v1"


def test_a_link_to_the_outside_is_no_directory(root: Path, tmp_path: Path) -> None:
    (root / "sly").symlink_to(tmp_path / "outside")
    with pytest.raises(ApiError) as caught:
        AdapterRoot(root).find("sly")
    assert caught.value.code == "source_not_found"
    assert AdapterRoot(root).names() == ["topics-v1"]


def test_a_link_inside_is_not_followed(root: Path, tmp_path: Path) -> None:
    (root / "topics-v1" / "adapter.safetensors").symlink_to(tmp_path / "outside")
    with pytest.raises(ApiError) as caught:
        AdapterRoot(root).find("topics-v1")
    assert caught.value.code == "adapter_invalid"
    assert str(tmp_path) not in caught.value.detail


def test_a_pipe_inside_is_never_opened(root: Path) -> None:
    os.mkfifo(root / "topics-v1" / "signature.json")
    with pytest.raises(ApiError, match="pipe") as caught:
        AdapterRoot(root).find("topics-v1")
    assert caught.value.code == "adapter_invalid"


def test_a_missing_directory_names_those_that_look_like_it(root: Path) -> None:
    with pytest.raises(ApiError) as caught:
        AdapterRoot(root).find("topic-v1")
    assert caught.value.status == 404
    assert caught.value.errors[0]["close_names"] == ["topics-v1"]


def test_files_and_odd_names_are_not_listed(root: Path) -> None:
    (root / "readme.txt").write_text("no directory")
    (root / ".writing").mkdir()
    (root / "with space").mkdir()
    assert AdapterRoot(root).names() == ["topics-v1"]
