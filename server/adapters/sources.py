"""The adapter root: the one directory that adapters may be loaded from at run time.

A source is the plain name of a directory in it. Nothing else is ever a path: no separators, no
``..``, no absolute paths, no NUL, and no symbolic links, neither as the directory nor inside it.
Nor is anything opened that is no file: a pipe would be waited for without end. All this is looked
at when a load is asked for; who may write into the root can change it until it is read.
"""

import re
import stat
from pathlib import Path

from server.errors import ApiError
from server.lookup import close_names, quoted

__all__ = ["NAME_PATTERN", "AdapterRoot"]

NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"
"""Of sources, of names to serve under, and of both halves of an alias."""

_NAME = re.compile(NAME_PATTERN.removeprefix("^").removesuffix("$"))


class AdapterRoot:
    """Finds adapter directories by name."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def names(self) -> list[str]:
        """Return the names of the directories in it, sorted.

        Raises:
            OSError: The root cannot be read.
        """
        return sorted(
            entry.name
            for entry in self._path.iterdir()
            if _NAME.fullmatch(entry.name) and _is_plain_directory(entry)
        )

    def path(self, source: str) -> Path:
        """Return where a source lies; it need not exist.

        Raises:
            ValueError: It is no plain name.
        """
        if not _NAME.fullmatch(source):
            raise ValueError(f"source must be a plain directory name, got {quoted(source)}")
        return self._path / source

    def find(self, source: str) -> Path:
        """Return the directory of a source.

        Raises:
            ApiError: 422 when it is no plain name, or holds a symbolic link or what is no file, 404
                with close names when there is no such directory.
        """
        pointer = "#/source"
        try:
            directory = self.path(source)
        except ValueError as error:
            fault = {"pointer": pointer, "code": "bad_name"}
            raise ApiError("invalid_request", str(error), errors=(fault,)) from None
        if not _is_plain_directory(directory):
            raise self._missing(source, pointer)
        if (held := _must_not_hold(directory)) is not None:
            raise ApiError(
                "adapter_invalid",
                f"adapter directory {quoted(source)} holds {held}",
                errors=({"pointer": pointer},),
            )
        return directory

    def _missing(self, source: str, pointer: str) -> ApiError:
        try:
            close = close_names(source, self.names())
        except OSError:  # the root itself is away
            close = []
        advice = f"; close names: {', '.join(close)}" if close else ""
        return ApiError(
            "source_not_found",
            f"the adapter root has no directory {quoted(source)}{advice}",
            errors=({"pointer": pointer, "close_names": close},),
        )


def _must_not_hold(directory: Path) -> str | None:
    """Return what is in it and must not be; what cannot be read is left to the load to say."""
    try:
        modes = [entry.lstat().st_mode for entry in directory.iterdir()]
    except OSError:
        return None
    if any(stat.S_ISLNK(mode) for mode in modes):
        return "a symbolic link; links are not followed"
    if not all(stat.S_ISREG(mode) or stat.S_ISDIR(mode) for mode in modes):
        return "a pipe, a socket or a device, which is never opened"
    return None


def _is_plain_directory(path: Path) -> bool:
    """Whether it is a directory itself, not a link to one."""
    try:
        return stat.S_ISDIR(path.lstat().st_mode)
    except OSError:
        return False
