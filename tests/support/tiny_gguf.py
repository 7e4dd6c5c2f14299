"""A whole GGUF file with a tiny random Llama in it, as a model converter would write it."""

import json
from pathlib import Path

import gguf
import numpy as np
from numpy.typing import NDArray

from tests.support.tiny_tokenizer import SPECIAL_TOKENS, tiny_tokenizer

__all__ = ["write_gguf"]

WIDTH, INNER, LAYERS, HEADS, KV_HEADS = 64, 96, 2, 4, 2
_NORMAL, _CONTROL = 1, 3  # GGUF's token types


def write_gguf(path: Path, seed: int = 0) -> dict[str, NDArray[np.float32]]:
    """Write a two-layer Llama with 4-bit weights and the tokenizer of `tiny_tokenizer`.

    Returns:
        The values that a reader must find, by GGUF name: what is left after quantisation.
    """
    writer = gguf.GGUFWriter(path, "llama")
    size = _add_tokenizer(writer)
    writer.add_block_count(LAYERS)
    writer.add_context_length(256)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_vocab_size(size)
    generator = np.random.default_rng(seed)
    written: dict[str, NDArray[np.float32]] = {}
    for name, shape in _shapes(size).items():
        values = generator.normal(0.0, 0.1, shape).astype(np.float32)
        if len(shape) == 1:
            writer.add_tensor(name, values)
            written[name] = values
            continue
        kind = gguf.GGMLQuantizationType.Q4_1
        packed = gguf.quants.quantize(values, kind)
        writer.add_tensor(name, packed, raw_dtype=kind)
        written[name] = gguf.quants.dequantize(packed, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return written


def _add_tokenizer(writer: gguf.GGUFWriter) -> int:
    """Add the tiny tokenizer's vocabulary and merges; return the number of tokens."""
    model = json.loads(tiny_tokenizer().backend_tokenizer.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([_CONTROL if t in SPECIAL_TOKENS else _NORMAL for t in tokens])
    writer.add_token_merges([" ".join(pair) for pair in model["merges"]])
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_add_bos_token(False)
    writer.add_add_space_prefix(False)
    return len(tokens)


def _shapes(vocabulary: int) -> dict[str, tuple[int, ...]]:
    kv_width = WIDTH * KV_HEADS // HEADS
    shapes: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (vocabulary, WIDTH),
        "output_norm.weight": (WIDTH,),
    }
    for layer in range(LAYERS):
        shapes |= {
            f"blk.{layer}.attn_norm.weight": (WIDTH,),
            f"blk.{layer}.ffn_norm.weight": (WIDTH,),
            f"blk.{layer}.attn_q.weight": (WIDTH, WIDTH),
            f"blk.{layer}.attn_k.weight": (kv_width, WIDTH),
            f"blk.{layer}.attn_v.weight": (kv_width, WIDTH),
            f"blk.{layer}.attn_output.weight": (WIDTH, WIDTH),
            f"blk.{layer}.ffn_gate.weight": (INNER, WIDTH),
            f"blk.{layer}.ffn_up.weight": (INNER, WIDTH),
            f"blk.{layer}.ffn_down.weight": (WIDTH, INNER),
        }
    return shapes
