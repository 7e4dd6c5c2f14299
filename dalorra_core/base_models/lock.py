"""A lock between processes; knows nothing of models."""

import fcntl
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from dalorra_core.errors import BaseModelError

__all__ = ["Progress", "exclusive"]

Progress = Callable[[str], None]  # takes one line, without its end


@contextmanager
def exclusive(lock_file: Path, progress: Progress) -> Iterator[None]:
    """Hold a lock against every other process and thread; wait for it if need be.

    The system drops the lock when its process ends, however it ends, so a killed process leaves
    nothing behind that would have to be cleaned up.

    Args:
        lock_file: Created, with its directory, when not there.
        progress: Told once when another process holds the lock.

    Raises:
        BaseModelError: The directory cannot be written.
    """
    try:
        lock_file.parent.mkdir(parents=True, exist_ok=True)
        handle = lock_file.open("a")
    except OSError as error:
        raise BaseModelError(
            f"cache directory {lock_file.parent} must be writable ({error.strerror}); "
            "set DALORRA_CACHE to another directory"
        ) from error
    with handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress("waiting for another process that fetches the same base model")
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
