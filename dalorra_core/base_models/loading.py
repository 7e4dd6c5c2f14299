"""Load a base model and its tokenizer from a directory, for training or prediction."""

from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from dalorra_core.errors import BaseModelError, ConfigError

__all__ = ["load_model", "load_tokenizer", "pick_device", "pick_dtype"]


def pick_device(device: str) -> torch.device:
    """Return the device for ``auto``, ``cpu`` or ``cuda[:n]``: CUDA when there is one.

    Raises:
        ConfigError: If CUDA is asked for and absent, or the name is unknown.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.partition(":")[0] not in ("cpu", "cuda"):
        raise ConfigError(f"device must be auto, cpu, cuda or cuda:N, got {device!r}")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(f"device {device!r} was asked for, but this torch sees no CUDA device")
    return torch.device(device)


def pick_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """Return the base model's dtype; ``auto`` is bfloat16 on CUDA and float32 on CPU.

    Raises:
        ConfigError: If the name is not auto, float32 or bfloat16.
    """
    if dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    names = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    if dtype not in names:
        raise ConfigError(f"dtype must be auto, float32 or bfloat16, got {dtype!r}")
    return names[dtype]


def load_model(
    directory: Path,
    device: torch.device,
    dtype: torch.dtype,
    attention: Literal["sdpa", "eager"] = "sdpa",
) -> nn.Module:
    """Return the causal LM of ``directory``, frozen and in evaluation mode.

    ``sdpa`` falls back to ``eager`` for a family that cannot use it.

    Raises:
        BaseModelError: If the directory holds no causal LM that transformers can read.
    """
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(
            directory,
            dtype=dtype,
            # None is sdpa wherever the family allows it; Gemma 2, which caps scores, does not.
            attn_implementation=None if attention == "sdpa" else attention,
            local_files_only=True,
        )
    except (OSError, ValueError, KeyError) as error:
        raise BaseModelError(f"cannot load a causal LM from {directory}: {error}") from error
    return model.to(device).eval().requires_grad_(requires_grad=False)


def load_tokenizer(directory: Path) -> Any:
    """Return the tokenizer of ``directory``.

    Raises:
        BaseModelError: If there is none that transformers can read.
    """
    try:
        return AutoTokenizer.from_pretrained(directory, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise BaseModelError(f"cannot load a tokenizer from {directory}: {error}") from error
