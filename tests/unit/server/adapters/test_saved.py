"""What administrators did survives a restart, and a bad file is told apart from none."""

import json
import os
from pathlib import Path

import pytest

from server.adapters import (
    AdapterRegistry,
    Alias,
    SavedState,
    SavedStateError,
    ShadowTarget,
    Slot,
    Target,
)
from tests.support.fake_engine import QUIZ, TOPICS


def registry() -> AdapterRegistry:
    filled = AdapterRegistry()
    filled.publish(Slot(TOPICS, source="topics-v1", pinned=True))
    filled.publish(Slot(QUIZ))  # given at start: no part of the state
    filled.set_alias(
        Alias("topics@prod", (Target("topics", 2.0),), ShadowTarget("topics:3f9a00112233", 0.5))
    )
    return filled


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "state" / "adapters.json"
    state = SavedState.of(registry())
    state.write(path)
    assert SavedState.read(path) == state
    assert [(one.source, one.pinned, one.current) for one in state.adapters] == [
        ("topics-v1", True, True)
    ]
    assert state.aliases[0].alias() == registry().aliases[0]
    assert [file.name for file in path.parent.iterdir()] == ["adapters.json"]  # no drafts left


def test_no_file_is_no_state(tmp_path: Path) -> None:
    assert SavedState.read(tmp_path / "adapters.json") is None


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b'{"version": 2}',
        b'{"version": 1, "more": 0}',
        b'{"version": 1, "adapters": [{"name": "a"}]}',
        b"\xff\xfe",
    ],
)
def test_a_file_that_is_something_else_names_itself(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "adapters.json"
    path.write_bytes(content)
    with pytest.raises(SavedStateError, match=r"adapters\.json is not a list of adapters"):
        SavedState.read(path)


def test_a_directory_in_its_place_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(SavedStateError, match="cannot be read"):
        SavedState.read(tmp_path)


def test_a_failed_write_leaves_the_old_file_whole(tmp_path: Path) -> None:
    path = tmp_path / "adapters.json"
    SavedState().write(path)
    before = path.read_bytes()
    (tmp_path / f".adapters.json.{os.getpid()}").mkdir()  # where the draft would be written
    with pytest.raises(IsADirectoryError):
        SavedState.of(registry()).write(path)
    assert path.read_bytes() == before
    assert json.loads(before) == {"version": 1, "adapters": [], "aliases": []}
