"""Put files and directories into place whole or not at all, whatever ends the process.

A directory cannot be renamed over one that is not empty. Linux can exchange two in one step
(``renameat2`` with ``RENAME_EXCHANGE``). Where the file system cannot, the old one steps aside as
``.<name>.old-<random>``, and whoever finds only that one puts it back. A directory that a living
process is placing is locked (``flock`` on the directory), so a leftover of a dead one can be told
apart, also from another container.
"""

import contextlib
import ctypes
import errno
import fcntl
import os
import secrets
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

__all__ = [
    "leftovers",
    "place_directory",
    "place_file",
    "put_back",
    "scratch_directory",
    "write_synced",
]

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
# The file system, the kernel or a container's filter does not know the call.
_NO_EXCHANGE = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EPERM}
_PATIENCE_S = 2.0


def place_file(path: Path, content: bytes) -> None:
    """Write a file, or replace it, in one step that survives a power cut."""
    scratch = path.with_name(f".{path.name}.writing")
    write_synced(scratch, content)
    scratch.replace(path)
    _sync_directory(path.parent)


def write_synced(path: Path, content: bytes) -> None:
    """Write a file and wait until it is on the disk."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


@contextlib.contextmanager
def scratch_directory(directory: Path) -> Iterator[Path]:
    """Give an empty locked directory beside ``directory``; whatever lies there at the end goes.

    What dead writers of the same directory left goes first.
    """
    directory.parent.mkdir(parents=True, exist_ok=True)
    for left in leftovers(directory, "writing"):
        with _locked(left) as dead:
            if dead:
                _remove(left)
    scratch = _beside(directory, "writing")
    scratch.mkdir()
    try:
        with _locked(scratch):
            yield scratch
    finally:
        _remove(scratch)


def place_directory(scratch: Path, directory: Path) -> None:
    """Move ``scratch`` to ``directory``; what was there is at ``scratch`` afterwards, or gone.

    When this fails or the process dies, ``directory`` is what it was, except that without
    ``RENAME_EXCHANGE`` it may have to be put back first: see ``put_back``.
    """
    put_back(directory)
    if not directory.exists():
        scratch.replace(directory)
    elif not _exchanged(scratch, directory):
        _in_two_steps(scratch, directory)
    _sync_directory(directory.parent)
    for old in leftovers(directory, "old"):  # the new one is in place: nobody needs them
        with _locked(old) as dead:
            if dead:
                _remove(old)


def put_back(directory: Path) -> bool:
    """Return whether ``directory`` is there, after putting back what a dead writer moved aside.

    A living writer is given a moment to finish.
    """
    deadline_s = time.monotonic() + _PATIENCE_S
    while not directory.exists():
        aside = leftovers(directory, "old")
        for old in aside:
            with _locked(old) as dead, contextlib.suppress(OSError):
                if dead and not directory.exists():
                    old.rename(directory)
                    return True
        if not aside or time.monotonic() > deadline_s:
            return directory.exists()
        time.sleep(0.005)
    return True


def leftovers(directory: Path, kind: str) -> list[Path]:
    """Return the directories of one kind (``writing``, ``old``) beside ``directory``, newest first.

    A living writer's are among them.
    """
    prefix = f".{directory.name}.{kind}-"
    found = []
    with contextlib.suppress(OSError):
        for path in directory.parent.iterdir():
            if path.name.startswith(prefix) and path.is_dir():
                with contextlib.suppress(OSError):
                    found.append((path.stat().st_mtime_ns, path))
    return [path for _, path in sorted(found, reverse=True)]


def _remove(path: Path) -> None:
    if path.is_symlink():  # an adapter's directory may be one; what it points to is not ours
        path.unlink(missing_ok=True)
    else:
        shutil.rmtree(path, ignore_errors=True)


def _beside(directory: Path, kind: str) -> Path:
    return directory.with_name(f".{directory.name}.{kind}-{secrets.token_hex(4)}")


def _exchanged(one: Path, other: Path) -> bool:
    """Exchange two directories in one step; False when this cannot be done here."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):  # an old libc, or not Linux
        return False
    result = renameat2(
        _AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), ctypes.c_uint(_RENAME_EXCHANGE)
    )
    if result == 0:
        return True
    code = ctypes.get_errno()
    if code in _NO_EXCHANGE:
        return False
    raise OSError(code, os.strerror(code), str(other))


def _in_two_steps(scratch: Path, directory: Path) -> None:
    """Move the old directory aside and the new one in; the old one comes back when that fails."""
    old = _beside(directory, "old")
    with _locked(directory):  # the lock goes with the directory, whatever its name
        directory.rename(old)
        try:
            scratch.rename(directory)
        except OSError:
            old.rename(directory)
            raise


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[bool]:
    """Lock a directory for a while; gives False when another process has it, or it is gone."""
    try:
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:
        yield False
        return
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield False
        else:
            yield True
    finally:
        os.close(descriptor)


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
