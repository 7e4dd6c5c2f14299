"""Tests that need a program which is not everywhere: skipped without it, but never in CI."""

import os
import shutil
import sys
from pathlib import Path

import pytest

__all__ = ["find_tool", "require_or_skip"]

VARIABLE = "DALORRA_TEST_REQUIRE"


def find_tool(name: str) -> str | None:
    """Return where a program of the `dev` extra is: beside Python, where `make dev` puts it, or
    on the PATH; None when it is nowhere.
    """
    return shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)


def require_or_skip(name: str, found: object) -> None:
    """Skip the calling test when a program was not found; fail it where the program is required.

    Args:
        name: The program's name in ``DALORRA_TEST_REQUIRE``, which lists names with commas between.
        found: Whether, or where, it was found.
    """
    if found:
        return
    required = os.environ.get(VARIABLE, "")
    if name in [entry.strip() for entry in required.split(",")]:
        pytest.fail(f"{name} was not found, and {VARIABLE}={required} asks for it")
    pytest.skip(f"{name} was not found; install it, or accept that this is not tested")
