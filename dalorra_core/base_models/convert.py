"""A GGUF file -> a Hugging Face model directory; the slow part of a fetch."""

import struct
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from dalorra_core.errors import BaseModelError

__all__ = ["convert_gguf"]


def convert_gguf(gguf_file: Path, target: Path) -> None:
    """Write the model and tokenizer of a GGUF file as safetensors and JSON.

    The weights are dequantised and stored in bfloat16: half the disk of float32, and its rounding
    (2**-9 relative) is far below the steps of a 4-bit weight, so nothing is lost that was there.

    Args:
        gguf_file: A GGUF file of an architecture that transformers reads.
        target: Directory to write to; created.

    Raises:
        BaseModelError: A package is missing, or the file cannot be converted.
        OSError: The directory cannot be written, for one because the disk is full.
    """
    try:
        import accelerate  # noqa: F401, PLC0415  transformers needs both for this, and
        import gguf  # noqa: F401, PLC0415        would only say so half way through
        from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: PLC0415  slow
    except ImportError as error:
        raise BaseModelError(
            f"converting a GGUF file needs the package {error.name!r}, which is not installed"
        ) from error
    folder, name = str(gguf_file.parent), gguf_file.name
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
        model: Any = AutoModelForCausalLM.from_pretrained(
            folder, gguf_file=name, dtype=torch.float32
        )
    except (OSError, ValueError, LookupError, RuntimeError, struct.error) as error:
        raise BaseModelError(
            f"the GGUF file {name} cannot be converted by this version of transformers: {error}"
        ) from error
    # transformers still calls the dequantised model quantised, and would refuse to save it.
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    try:
        model.to(torch.bfloat16).save_pretrained(target)
    except SafetensorError as error:  # what the library makes of a full disk
        raise OSError(f"the weights cannot be written: {error}") from error
    tokenizer.save_pretrained(target)
