"""dalorra_core.base_models.fingerprint: one identity for the same weights, however stored."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from dalorra_core.base_models.fingerprint import describe, fingerprint
from dalorra_core.errors import BaseModelError

TENSORS = {
    "b.weight": torch.arange(6, dtype=torch.float32).reshape(2, 3),
    "a.weight": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
    "c.scale": torch.tensor(3, dtype=torch.int64),
}


def store(directory: Path, **files: dict[str, Tensor]) -> Path:
    directory.mkdir(exist_ok=True)
    for name, tensors in files.items():
        save_file(tensors, directory / f"{name}.safetensors")
    return directory


def test_the_fingerprint_is_what_its_definition_says(tmp_path: Path) -> None:
    parts = [
        b'["a.weight", "BF16", [2]]\n' + bytes.fromhex("c03f00c0"),
        b'["b.weight", "F32", [2, 3]]\n' + np.arange(6, dtype="<f4").tobytes(),
        b'["c.scale", "I64", []]\n' + (3).to_bytes(8, "little"),
    ]
    expected = "sha256:" + hashlib.sha256(b"".join(parts)).hexdigest()
    assert fingerprint(store(tmp_path, model=TENSORS)) == expected


def test_sharding_does_not_count(tmp_path: Path) -> None:
    whole = store(tmp_path / "whole", model=TENSORS)
    first = {name: TENSORS[name] for name in ("c.scale", "a.weight")}
    rest = {"b.weight": TENSORS["b.weight"]}
    loose = store(tmp_path / "loose", one=rest, two=first)
    indexed = store(tmp_path / "indexed", one=rest, two=first, stray=TENSORS)
    index = {
        "weight_map": dict.fromkeys(first, "two.safetensors") | {"b.weight": "one.safetensors"}
    }
    (indexed / "model.safetensors.index.json").write_text(json.dumps(index))
    assert fingerprint(whole) == fingerprint(loose) == fingerprint(indexed)


@pytest.mark.parametrize(
    "change",
    [
        {"a.weight": torch.tensor([1.5, -2.015625], dtype=torch.bfloat16)},
        {"a.weight": torch.tensor([1.5, -2.0], dtype=torch.float32)},
        {"b.weight": TENSORS["b.weight"].reshape(3, 2)},
        {"d.scale": torch.tensor(3)},
    ],
)
def test_every_change_of_a_tensor_counts(tmp_path: Path, change: dict[str, Tensor]) -> None:
    before = fingerprint(store(tmp_path / "a", model=TENSORS))
    assert fingerprint(store(tmp_path / "b", model={**TENSORS, **change})) != before


def test_other_files_do_not_count(tmp_path: Path) -> None:
    store(tmp_path, model=TENSORS)
    before = fingerprint(tmp_path)
    store(tmp_path, adapter={"x": torch.ones(1)})
    (tmp_path / "config.json").write_text("{}")
    assert fingerprint(tmp_path) == before


def test_a_large_tensor_is_read_in_pieces(tmp_path: Path) -> None:
    big = {"x": torch.arange(700_000, dtype=torch.int32)}  # 2.8 MB
    halves = store(tmp_path / "a", model=big)
    assert fingerprint(halves) == fingerprint(store(tmp_path / "b", other=big))


def test_a_tensor_stored_twice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BaseModelError, match=r"'a.weight' must be stored once, got it in one"):
        fingerprint(store(tmp_path, one=TENSORS, two={"a.weight": torch.ones(1)}))


def test_no_weights_are_named(tmp_path: Path) -> None:
    with pytest.raises(BaseModelError, match=r"must hold its weights as .safetensors, got none"):
        fingerprint(tmp_path)


@pytest.mark.parametrize(
    "content", [b"", b"short", b"\xff" * 64, (9).to_bytes(8, "little") + b"x" * 9]
)
def test_a_damaged_file_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(BaseModelError, match=r"model.safetensors is not a whole safetensors file"):
        fingerprint(tmp_path)


def test_a_truncated_file_is_named(tmp_path: Path) -> None:
    path = store(tmp_path, model=TENSORS) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(BaseModelError, match="ends after the end of the file"):
        fingerprint(tmp_path)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"weight_map": 3}'])
def test_a_damaged_index_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(BaseModelError, match="must map tensors to files"):
        fingerprint(tmp_path)


def test_describe_counts_what_is_stored(tmp_path: Path) -> None:
    store(tmp_path, model=TENSORS)
    config = {"model_type": "llama", "hidden_size": 8, "num_hidden_layers": 2, "vocab_size": 40}
    (tmp_path / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    found = describe(tmp_path)
    assert (found["model_type"], found["hidden_size"], found["num_layers"]) == ("llama", 8, 2)
    assert (found["vocab_size"], found["tied_embeddings"]) == (40, True)
    assert (found["num_parameters"], found["size_bytes"]) == (9, 36)
    assert found["dtypes"] == ["BF16", "F32", "I64"]
    assert found["max_positions"] is None


def test_describe_finds_a_nested_text_model(tmp_path: Path) -> None:
    store(tmp_path, model=TENSORS)
    nested = {"model_type": "gemma3", "text_config": {"hidden_size": 16}}
    (tmp_path / "config.json").write_text(json.dumps(nested))
    assert describe(tmp_path)["hidden_size"] == 16


@pytest.mark.parametrize("content", ["{", "[]"])
def test_a_damaged_configuration_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(BaseModelError, match=r"config.json must"):
        describe(tmp_path)
