"""What identifies a base model: its tensors, however they are cut into files; needs no torch."""

import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from dalorra_core.errors import BaseModelError

__all__ = ["describe", "fingerprint"]

_CHUNK_BYTES = 1 << 20
_MAX_HEADER_BYTES = 100_000_000  # the format's own limit
_INDEX_FILE = "model.safetensors.index.json"
_SINGLE_FILE = "model.safetensors"


@dataclass(frozen=True)
class _StoredTensor:
    """Where one tensor lies: bytes ``start`` to ``end`` of a file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int
    end: int


def fingerprint(model_dir: str | Path) -> str:
    """Return the sha256 over all tensors of a model directory.

    Tensors are taken in order of their names: name, dtype and shape, then the raw bytes. The same
    weights therefore have the same fingerprint in one file or in many. Reads one MiB at a time.

    Args:
        model_dir: Directory with ``model.safetensors``, or with shards and their index; without
            either, all ``*.safetensors`` files count.

    Returns:
        ``sha256:`` and 64 hex digits.

    Raises:
        BaseModelError: There are no safetensors files, one is damaged, or a tensor is there twice.
    """
    digest = hashlib.sha256()
    for tensor in _stored_tensors(Path(model_dir)):
        title = json.dumps([tensor.name, tensor.dtype, list(tensor.shape)])
        digest.update(title.encode() + b"\n")
        with tensor.file.open("rb") as file:
            for chunk in _chunks(file, tensor):
                digest.update(chunk)
    return f"sha256:{digest.hexdigest()}"


def describe(model_dir: str | Path) -> dict[str, object]:
    """Return what a person wants to know of a base model, for ``inspect``.

    Args:
        model_dir: Directory with ``config.json`` and safetensors files.

    Returns:
        ``model_type``, ``architectures``, ``hidden_size``, ``num_layers``,
        ``num_attention_heads``, ``num_key_value_heads``, ``vocab_size``, ``max_positions`` (tokens)
        and ``tied_embeddings`` from the configuration, null where it does not say;
        ``num_parameters``, ``dtypes`` and ``size_bytes`` as stored (a tied matrix counts once).

    Raises:
        BaseModelError: A file is missing or damaged.
    """
    config = _config(Path(model_dir))
    text = config.get("text_config")
    inner = text if isinstance(text, dict) else config  # multimodal models nest theirs
    tensors = _stored_tensors(Path(model_dir))
    return {
        "model_type": config.get("model_type"),
        "architectures": config.get("architectures"),
        "hidden_size": inner.get("hidden_size"),
        "num_layers": inner.get("num_hidden_layers"),
        "num_attention_heads": inner.get("num_attention_heads"),
        "num_key_value_heads": inner.get("num_key_value_heads"),
        "vocab_size": inner.get("vocab_size"),
        "max_positions": inner.get("max_position_embeddings"),
        "tied_embeddings": config.get("tie_word_embeddings", inner.get("tie_word_embeddings")),
        "num_parameters": sum(math.prod(tensor.shape) for tensor in tensors),
        "dtypes": sorted({tensor.dtype for tensor in tensors}),
        "size_bytes": sum(tensor.end - tensor.start for tensor in tensors),
    }


def _config(model_dir: Path) -> dict[str, object]:
    path = model_dir / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BaseModelError(f"{path} must be a readable JSON file: {error}") from error
    if not isinstance(config, dict):
        raise BaseModelError(f"{path} must hold a JSON object, got {type(config).__name__}")
    return config


def _weight_files(model_dir: Path) -> list[Path]:
    """Return the files that hold the weights, those transformers itself would load."""
    index = model_dir / _INDEX_FILE
    try:
        if index.is_file():
            names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
            return [model_dir / name for name in sorted(names)]
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise BaseModelError(f"{index} must map tensors to files: {error!r}") from error
    if (model_dir / _SINGLE_FILE).is_file():
        return [model_dir / _SINGLE_FILE]
    files = sorted(model_dir.glob("*.safetensors"))
    if not files:
        raise BaseModelError(
            f"base model directory {model_dir} must hold its weights as .safetensors, got none"
        )
    return files


def _stored_tensors(model_dir: Path) -> list[_StoredTensor]:
    """Return all tensors of a directory in order of their names."""
    found: dict[str, _StoredTensor] = {}
    for path in _weight_files(model_dir):
        try:
            for tensor in _read_header(path):
                if tensor.name in found:
                    raise BaseModelError(
                        f"tensor {tensor.name!r} must be stored once, got it in "
                        f"{found[tensor.name].file.name} and {path.name}"
                    )
                found[tensor.name] = tensor
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise BaseModelError(f"{path} is not a whole safetensors file: {error}") from error
    return [found[name] for name in sorted(found)]


def _read_header(path: Path) -> Iterator[_StoredTensor]:
    """Yield the tensors of one file: 8 bytes of header length, a JSON header, raw data."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 0 < length <= min(size - 8, _MAX_HEADER_BYTES):
            raise ValueError(f"its header cannot have {length} bytes")
        header = json.loads(file.read(length))
    data = 8 + length
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        start, end = entry["data_offsets"]
        if not 0 <= start <= end <= size - data:
            raise ValueError(f"tensor {name!r} ends after the end of the file")
        shape = tuple(int(n) for n in entry["shape"])
        yield _StoredTensor(name, str(entry["dtype"]), shape, path, data + start, data + end)


def _chunks(file: BinaryIO, tensor: _StoredTensor) -> Iterator[bytes]:
    file.seek(tensor.start)
    left = tensor.end - tensor.start
    while left:
        chunk = file.read(min(left, _CHUNK_BYTES))
        if not chunk:
            raise BaseModelError(f"{tensor.file} became shorter while it was read")
        left -= len(chunk)
        yield chunk
