"""The name of a base model -> a directory with config, tokenizer and safetensors weights.

This is the only place where the core reads the environment: where the cache lies.
"""

import os
import sys
from pathlib import Path
from typing import cast

from dalorra_core.base_models.catalogue import BUILTIN_MODELS
from dalorra_core.base_models.fetch import fetch_builtin
from dalorra_core.base_models.lock import Progress
from dalorra_core.errors import BaseModelError

__all__ = ["cache_root", "resolve_base_model"]

# Weights as pickle are never fetched: reading them can run code.
HUB_PATTERNS = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja")


def resolve_base_model(
    name: str | Path,
    *,
    cache_dir: str | Path | None = None,
    progress: Progress | None = None,
) -> Path:
    """Return the directory of a base model, fetching it the first time.

    Args:
        name: A directory; or a built-in alias, ``smollm2-135m-instruct``; or a hub id,
            ``<owner>/<model>``. They are tried in this order.
        cache_dir: Where built-in models are kept; see :func:`cache_root` for the default. Models
            of the hub lie in the hub's own cache.
        progress: Takes one line at a time; None writes to standard error.

    Raises:
        BaseModelError: The model is not there or cannot be fetched; says what to do.
    """
    directory = Path(name).expanduser()
    if directory.is_dir():
        return _checked(directory.absolute())
    if str(name) in BUILTIN_MODELS:
        builtin = BUILTIN_MODELS[str(name)]
        return fetch_builtin(builtin, cache_root(cache_dir), progress=progress or _to_stderr)
    if not _looks_like_hub_id(str(name)):
        raise BaseModelError(
            "base model must be a directory, a built-in alias "
            f"({', '.join(BUILTIN_MODELS)}) or a hub id <owner>/<model>, got {str(name)!r}"
        )
    return _checked(_from_hub(str(name)))


def cache_root(cache_dir: str | Path | None = None) -> Path:
    """Return the directory for files that can be fetched again; it need not exist.

    Args:
        cache_dir: Used when given; else ``$DALORRA_CACHE``, else ``$XDG_CACHE_HOME/dalorra``, else
            ``~/.cache/dalorra``. An empty variable counts as not set.
    """
    chosen = cache_dir or os.environ.get("DALORRA_CACHE")
    if chosen:
        return Path(chosen).expanduser().absolute()
    shared = os.environ.get("XDG_CACHE_HOME")
    return Path(shared or "~/.cache").expanduser().absolute() / "dalorra"


def _checked(directory: Path) -> Path:
    if not (directory / "config.json").is_file():
        raise BaseModelError(
            f"base model directory {directory} must hold config.json, a tokenizer and "
            ".safetensors files; config.json is missing"
        )
    if not any(directory.glob("*.safetensors")):
        raise BaseModelError(
            f"base model directory {directory} must hold its weights as .safetensors, got none "
            "(weights as pickle are not read)"
        )
    return directory


def _looks_like_hub_id(name: str) -> bool:
    owner, slash, model = name.partition("/")
    return bool(owner.strip(".~") and slash and model) and "/" not in model


def _from_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download  # noqa: PLC0415  slow, and only needed here
    from huggingface_hub.errors import HfHubHTTPError  # noqa: PLC0415

    # Its bases are OSError and the HTTP client's own root error; which client that is differs
    # between versions of the hub's library.
    failures = cast("tuple[type[Exception], ...]", (ValueError, *HfHubHTTPError.__bases__))
    try:
        return Path(snapshot_download(name, allow_patterns=list(HUB_PATTERNS)))
    except failures as error:
        raise BaseModelError(
            f"base model {name!r} is no directory here and could not be fetched from the hub; "
            f"check name and network, or give a directory (--base DIR): {error}"
        ) from error


def _to_stderr(line: str) -> None:
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()
