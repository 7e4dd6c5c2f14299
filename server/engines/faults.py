"""From what the core and torch raise to what the server knows; texts name no host path.

Each function returns the error instead of raising it: raised after the ``except`` block, it holds
no frame of the failed call, hence none of its tensors.
"""

import re
from pathlib import Path

import torch
from safetensors import SafetensorError

from dalorra_core.errors import (
    ArtifactUntrustedError,
    BaseMismatchError,
    DalorraError,
    GoldenProbeError,
)
from server.ports import (
    AdapterBaseMismatchError,
    AdapterLoadError,
    AdapterSelfTestError,
    AdapterUntrustedError,
    EngineFatalError,
    EngineMemoryError,
)

__all__ = ["LOAD_FAILURES", "batch_fault", "load_fault", "without_paths"]

LOAD_FAILURES = (
    DalorraError,
    ArithmeticError,
    AttributeError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
    SafetensorError,
    TypeError,
    ValueError,
)
"""What loading files that others wrote may raise."""

_OUT_OF_MEMORY = (
    "DefaultCPUAllocator: can't allocate memory",
    "DefaultCPUAllocator: not enough memory",
    "CUDA error: out of memory",
    "CUDA out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
)
_PATH = re.compile(r"(?<![\w.:/])/(?:[^\s/:'\"]+/)+")


def load_fault(error: Exception, what: str, *directories: Path) -> AdapterLoadError:
    """Return why an adapter, or the base model, cannot be served.

    Args:
        error: One of ``LOAD_FAILURES``.
        what: Name of what was loaded.
        directories: Of the adapter and of the base model, where they are known.
    """
    text = without_paths(str(error), *directories)
    if isinstance(error, BaseMismatchError):
        return AdapterBaseMismatchError(text, expected=error.expected, found=error.found)
    if isinstance(error, ArtifactUntrustedError):
        return AdapterUntrustedError(text)
    if isinstance(error, GoldenProbeError):
        return AdapterSelfTestError(text)
    if isinstance(error, DalorraError):
        return AdapterLoadError(text)
    if _is_out_of_memory(error):
        return AdapterLoadError(f"{what} does not fit into memory")
    return AdapterLoadError(f"{what} cannot be loaded: {type(error).__name__}: {text}")


def batch_fault(error: Exception) -> Exception:
    """Return what the error of a batch means; the error itself where it means nothing else."""
    first_line = str(error).partition("\n")[0]
    if _is_out_of_memory(error):
        return EngineMemoryError(first_line)
    if "CUDA error" in first_line:  # the context is gone
        return EngineFatalError(first_line)
    return error


def without_paths(text: str, *directories: Path) -> str:
    """Return a text with every directory's path cut to its last name."""
    for directory in directories:
        for spelling in (directory, directory.absolute(), directory.resolve()):
            if len(spelling.parts) > 1:
                text = text.replace(str(spelling), directory.name or spelling.name)
    return _PATH.sub("", text)


def _is_out_of_memory(error: Exception) -> bool:
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(mark in str(error) for mark in _OUT_OF_MEMORY)
