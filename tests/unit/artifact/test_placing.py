"""dalorra_core.artifact.placing: whatever kills the writer and whenever, an adapter is there."""

import ctypes
import errno
import itertools
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from dalorra_core.artifact import placing, reading
from dalorra_core.artifact.placing import (
    leftovers,
    place_directory,
    place_file,
    put_back,
    scratch_directory,
    write_synced,
)
from dalorra_core.artifact.store import (
    calibration_file_name,
    load_artifact,
    pack_tensors,
    save_artifact,
    update_artifact,
)
from dalorra_core.errors import ArtifactMissingFileError
from tests.support.tiny_manifest import tiny_calibration, tiny_manifest, tiny_params

# Runs one call of the writer in a forked child that is killed at its nth audited step, until one
# child gets through; one process, because importing torch takes seconds.
KILLER = """
import json, os, signal, sys
from pathlib import Path
from dalorra_core.artifact import placing, store
from tests.support.tiny_manifest import tiny_calibration, tiny_manifest, tiny_params

kind, folder = sys.argv[1], Path(sys.argv[2])
# what changes a disk; a call through ctypes shows as the look-up of its function
STEPS = {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "ctypes.dlsym", "shutil.rmtree"}

def arm(n):
    seen = 0
    def hook(event, args):
        nonlocal seen
        if event in STEPS and (event != "open" or isinstance(args[1], str) and "w" in args[1]):
            seen += 1
            if seen > n:
                os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(hook)

def write(directory):
    if kind == "update":
        scores = store.dump_tensors({"confidence": __import__("torch").zeros(4)})
        record = tiny_calibration(store.calibration_file_name(scores))
        store.update_artifact(directory, tiny_manifest(name="new", calibration=record), scores)
        return
    if kind == "two steps":
        placing._exchanged = lambda one, other: False
    store.save_artifact(
        directory, tiny_manifest(name="new"), store.pack_tensors(tiny_params()), overwrite=True
    )

n = 0
while True:
    directory = folder / str(n) / "demo"
    store.save_artifact(directory, tiny_manifest(name="old"), store.pack_tensors(tiny_params()))
    child = os.fork()
    if child == 0:
        arm(n)
        write(directory)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    print(json.dumps([n, os.WIFSIGNALED(status) and os.WTERMSIG(status), os.WIFEXITED(status)]))
    if os.WIFEXITED(status):
        sys.exit(os.WEXITSTATUS(status))
    n += 1
"""


def killed_everywhere(kind: str, folder: Path) -> Iterator[tuple[Path, bool]]:
    """Yield the directory that each kill left, and whether the writer got through."""
    done = subprocess.run(
        [sys.executable, "-c", KILLER, kind, str(folder)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for line in done.stdout.splitlines():
        n, signal, finished = json.loads(line)
        assert finished or signal == 9
        yield folder / str(n) / "demo", finished


@pytest.mark.parametrize("kind", ["exchange", "two steps", "update"])
def test_a_writer_killed_at_any_step_leaves_the_old_or_the_new_adapter(
    kind: str, tmp_path: Path
) -> None:
    names, steps = [], 0
    for directory, finished in killed_everywhere(kind, tmp_path):
        steps += 1
        names.append(load_artifact(directory).manifest.name)
        assert names[-1] == "new" if finished else names[-1] in ("old", "new")
        if kind != "update":
            # the next writer clears away what the dead one left
            save_artifact(directory, tiny_manifest(), pack_tensors(tiny_params()), overwrite=True)
            assert [path.name for path in directory.parent.iterdir()] == ["demo"]
    assert steps >= 5
    assert names == sorted(names, reverse=True)  # once new, it stays new
    assert names[0] == "old"


def test_an_adapter_that_was_moved_aside_is_put_back_by_whoever_looks_for_it(
    tmp_path: Path,
) -> None:
    save_artifact(tmp_path / "demo", tiny_manifest(), pack_tensors(tiny_params()))
    (tmp_path / "demo").rename(tmp_path / ".demo.old-0a1b2c3d")
    assert load_artifact(tmp_path / "demo").manifest.name == "demo"
    assert [path.name for path in tmp_path.iterdir()] == ["demo"]


def test_nothing_is_put_back_over_an_adapter_that_is_there(tmp_path: Path) -> None:
    for name in ("demo", ".demo.old-1"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "which").write_text(name, "utf-8")
    assert put_back(tmp_path / "demo")
    assert (tmp_path / "demo" / "which").read_text("utf-8") == "demo"


def test_only_leftovers_of_this_very_name_are_put_back(tmp_path: Path) -> None:
    (tmp_path / ".demo2.old-1").mkdir()
    (tmp_path / ".demo.olden").mkdir()
    assert not put_back(tmp_path / "demo")
    with pytest.raises(ArtifactMissingFileError, match="does not exist"):
        load_artifact(tmp_path / "demo")


def test_what_a_living_writer_has_aside_is_not_touched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(placing, "_PATIENCE_S", 0.02)
    old = tmp_path / ".demo.old-1"
    old.mkdir()
    with placing._locked(old) as ours:
        assert ours
        assert not put_back(tmp_path / "demo")
    assert old.is_dir()
    assert put_back(tmp_path / "demo")


def test_a_living_writers_scratch_is_not_cleared_away(tmp_path: Path) -> None:
    with scratch_directory(tmp_path / "demo") as one:
        with scratch_directory(tmp_path / "demo") as other:
            assert set(leftovers(tmp_path / "demo", "writing")) == {one, other}
        assert one.is_dir()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("exchange", [True, False])
def test_a_link_to_an_adapter_is_replaced_and_what_it_points_to_stays(
    exchange: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not exchange:
        monkeypatch.setattr(placing, "_exchanged", lambda _one, _other: False)
    save_artifact(tmp_path / "real", tiny_manifest(name="old"), pack_tensors(tiny_params()))
    (tmp_path / "link").symlink_to("real")
    save_artifact(
        tmp_path / "link", tiny_manifest(name="new"), pack_tensors(tiny_params()), overwrite=True
    )
    assert load_artifact(tmp_path / "link").manifest.name == "new"
    assert load_artifact(tmp_path / "real").manifest.name == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "real"]


class _NoExchange:
    """A libc whose kernel or file system refuses the call."""

    def __init__(self, code: int) -> None:
        self._code = code

    def renameat2(self, *_arguments: object) -> int:
        ctypes.set_errno(self._code)
        return -1


def _no_libc(*_arguments: object, **_options: object) -> None:
    raise OSError(errno.ENOENT, "no such library")


@pytest.mark.parametrize("code", [None, errno.EINVAL, errno.ENOSYS, errno.EPERM])
def test_where_directories_cannot_be_exchanged_they_are_moved_in_two_steps(
    code: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_artifact(tmp_path / "demo", tiny_manifest(name="old"), pack_tensors(tiny_params()))
    libc = _no_libc if code is None else lambda *_, **__: _NoExchange(code)
    monkeypatch.setattr(ctypes, "CDLL", libc)
    save_artifact(
        tmp_path / "demo", tiny_manifest(name="new"), pack_tensors(tiny_params()), overwrite=True
    )
    assert load_artifact(tmp_path / "demo").manifest.name == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["demo"]


def test_another_refusal_of_the_exchange_is_an_error_and_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_artifact(tmp_path / "demo", tiny_manifest(name="old"), pack_tensors(tiny_params()))
    monkeypatch.setattr(ctypes, "CDLL", lambda *_, **__: _NoExchange(errno.EACCES))
    with pytest.raises(PermissionError):
        save_artifact(
            tmp_path / "demo", tiny_manifest(), pack_tensors(tiny_params()), overwrite=True
        )
    assert load_artifact(tmp_path / "demo").manifest.name == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["demo"]


def test_what_another_writer_has_aside_stays_when_ours_is_in_place(tmp_path: Path) -> None:
    old = tmp_path / ".demo.old-1"
    old.mkdir()
    save_artifact(tmp_path / "other", tiny_manifest(), pack_tensors(tiny_params()))
    with placing._locked(old), placing._locked(tmp_path / "gone") as gone:
        assert not gone
        (tmp_path / "demo").mkdir()
        save_artifact(
            tmp_path / "demo", tiny_manifest(), pack_tensors(tiny_params()), overwrite=True
        )
    assert old.is_dir()


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    place_file(tmp_path / "a", b"one")
    place_file(tmp_path / "a", b"two")
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == {"a": b"two"}


def test_the_content_of_a_placed_directory_is_that_of_the_scratch_one(tmp_path: Path) -> None:
    (tmp_path / "demo").mkdir()
    write_synced(tmp_path / "demo" / "a", b"old")
    with scratch_directory(tmp_path / "demo") as scratch:
        write_synced(scratch / "b", b"new")
        place_directory(scratch, tmp_path / "demo")
    assert {p.name: p.read_bytes() for p in (tmp_path / "demo").iterdir()} == {"b": b"new"}


def scores_of(value: int) -> bytes:
    return pack_tensors({"confidence": tiny_params()["phi"] + value})


@pytest.mark.parametrize("how", ["recalibrated", "replaced"])
def test_a_reader_never_sees_half_of_an_adapter_that_is_being_written(
    how: str, tmp_path: Path
) -> None:
    """The writer changes the adapter as fast as it can while the reader loads it."""
    directory, stop, errors = tmp_path / "demo", threading.Event(), list[BaseException]()
    save_artifact(directory, tiny_manifest(), pack_tensors(tiny_params()))

    def write() -> None:
        number = 0
        try:
            while not stop.is_set():
                number += 1
                if how == "recalibrated":
                    scores = scores_of(number)
                    record = tiny_calibration(calibration_file_name(scores))
                    update_artifact(directory, tiny_manifest(calibration=record), scores)
                else:
                    params = {**tiny_params(), "phi": tiny_params()["phi"] + number}
                    save_artifact(directory, tiny_manifest(), pack_tensors(params), overwrite=True)
        except BaseException as error:  # noqa: BLE001 - handed to the test
            errors.append(error)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        seen = {load_artifact(directory).manifest_sha256 for _ in range(150)}
    finally:
        stop.set()
        writer.join(30)
    assert not errors
    assert len(seen) > 1  # it was written meanwhile


def test_a_directory_that_changes_all_the_time_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    peeks = itertools.count()
    monkeypatch.setattr(reading, "_peek", lambda _directory: str(next(peeks)).encode())
    with pytest.raises(ArtifactMissingFileError):
        load_artifact(tmp_path / "demo")
    assert next(peeks) < 20


def test_a_directory_that_goes_while_it_is_listed_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_artifact(tmp_path / "demo", tiny_manifest(), pack_tensors(tiny_params()))

    def gone(self: Path) -> Iterator[Path]:
        raise FileNotFoundError(self)

    monkeypatch.setattr(Path, "iterdir", gone)
    with pytest.raises(ArtifactMissingFileError, match="demo does not exist"):
        load_artifact(tmp_path / "demo")


def test_a_fault_that_stays_is_not_read_over_and_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory, reads = tmp_path / "demo", list[str]()
    save_artifact(directory, tiny_manifest(), pack_tensors(tiny_params()))
    (directory / "adapter.safetensors").unlink()
    read_bytes = Path.read_bytes

    def counted(self: Path) -> bytes:
        reads.append(self.name)
        return read_bytes(self)

    monkeypatch.setattr(Path, "read_bytes", counted)
    with pytest.raises(ArtifactMissingFileError):
        load_artifact(directory)
    assert reads.count("adapter.safetensors") == 1
