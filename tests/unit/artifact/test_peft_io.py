"""dalorra_core.artifact.peft_io: what PEFT writes is read exactly, and nothing else is."""

import json
import math
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor

from dalorra_core.adapters.plain_lora import Factors, PlainLora
from dalorra_core.artifact.peft_io import (
    PEFT_CONFIG_FILE,
    PEFT_TENSOR_FILE,
    copied_weights,
    peft_sha256,
    read_peft,
    write_peft,
)
from dalorra_core.errors import (
    ArtifactCorruptError,
    ArtifactError,
    ArtifactMissingFileError,
    ArtifactUnsafeError,
)
from tests.support.tiny_models import assert_near, tiny_model

Q, V = "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.v_proj"
KEY = f"base_model.model.{Q}.lora_A.weight"

quiet = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # PEFT's own


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def lora(r: int = 4, scaling: float = 2.0) -> PlainLora:
    modules = {
        name: Factors(random(r, 32, seed=i), random(d_out, r, seed=i + 5))
        for i, (name, d_out) in enumerate({Q: 32, V: 16}.items())
    }
    return PlainLora(r, scaling, modules)


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    write_peft(tmp_path / "adapter", lora(), "some/base")
    return tmp_path / "adapter"


def assert_equal(found: PlainLora, expected: PlainLora) -> None:
    assert (found.r, found.scaling) == (expected.r, expected.scaling)
    assert sorted(found.modules) == sorted(expected.modules)
    for name, factors in expected.modules.items():
        assert torch.equal(found.modules[name].down, factors.down)
        assert torch.equal(found.modules[name].up, factors.up)


def configured(adapter: Path, **changes: Any) -> Path:
    path = adapter / PEFT_CONFIG_FILE
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | changes), encoding="utf-8")
    return adapter


def with_tensors(adapter: Path, change: Callable[[dict[str, Tensor]], object]) -> Path:
    tensors = load_file(adapter / PEFT_TENSOR_FILE)
    change(tensors)
    save_file(tensors, adapter / PEFT_TENSOR_FILE)
    return adapter


def test_what_is_written_comes_back(adapter: Path) -> None:
    assert_equal(read_peft(adapter), lora())
    assert sorted(p.name for p in adapter.iterdir()) == [PEFT_CONFIG_FILE, PEFT_TENSOR_FILE]


@pytest.mark.parametrize("scaling", [2 / 3, 1e-4, 0.3])
def test_lora_alpha_is_a_whole_number_and_b_takes_the_rest(tmp_path: Path, scaling: float) -> None:
    write_peft(tmp_path / "a", lora(scaling=scaling), "some/base")
    config = json.loads((tmp_path / "a" / PEFT_CONFIG_FILE).read_text("utf-8"))
    assert config["lora_alpha"] == config["r"] == 4
    found = read_peft(tmp_path / "a")
    assert found.scaling == 1.0
    for name, factors in lora().modules.items():
        assert_near(found.modules[name].up, factors.up * scaling)


@quiet
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"q_proj": 5}, "alpha_pattern": {"layers.1.self_attn.v_proj": 9}},
        {"use_rslora": True, "rank_pattern": {Q: 2}, "alpha_pattern": {Q: 1, "q_proj": 7}},
        {"layers_to_transform": [1], "init_lora_weights": "gaussian", "lora_dropout": 0.3},
    ],
)
def test_what_peft_saves_is_the_same_function(tmp_path: Path, changes: dict[str, Any]) -> None:
    targets = ["q_proj", "v_proj"]
    config = LoraConfig(r=3, lora_alpha=6, target_modules=targets, **changes)
    model: Any = get_peft_model(tiny_model(), config)
    with torch.no_grad():
        for i, (name, value) in enumerate(model.named_parameters()):
            if "lora_B" in name:
                value.copy_(random(*value.shape, seed=i))
    model.save_pretrained(tmp_path / "theirs")
    found = read_peft(tmp_path / "theirs")
    base = model.base_model.model
    layers = [n for n, m in base.named_modules() if hasattr(m, "lora_A") and m.lora_A]
    assert sorted(found.modules) == sorted(layers)
    for name, factors in found.modules.items():
        expected = base.get_submodule(name).get_delta_weight("default")
        assert_near(found.scaling * factors.up @ factors.down, expected)


@quiet
def test_peft_loads_what_is_written(adapter: Path) -> None:
    model: Any = PeftModel.from_pretrained(tiny_model(), str(adapter))
    for name, factors in lora().modules.items():
        layer = model.base_model.model.get_submodule(name)
        assert torch.equal(layer.lora_A["default"].weight, factors.down)
        assert torch.equal(layer.lora_B["default"].weight, factors.up)
        assert layer.scaling["default"] == 2.0
    assert model.active_peft_config.base_model_name_or_path == "some/base"


# --- hostile input --------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter_model.pt"])
def test_a_pickle_is_refused_even_beside_safetensors(adapter: Path, name: str) -> None:
    (adapter / name).write_bytes(pickle.dumps({KEY: 1}))
    with pytest.raises(ArtifactUnsafeError, match=f"{name}: pickle"):
        read_peft(adapter)


@pytest.mark.parametrize("name", [PEFT_CONFIG_FILE, PEFT_TENSOR_FILE])
def test_a_missing_file_is_named(adapter: Path, name: str) -> None:
    (adapter / name).unlink()
    with pytest.raises(ArtifactMissingFileError, match=name):
        read_peft(adapter)


@pytest.mark.parametrize("kept", [0, 7, 8, 100, -1])
def test_truncated_tensors_are_refused(adapter: Path, kept: int) -> None:
    path = adapter / PEFT_TENSOR_FILE
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ArtifactCorruptError, match="cannot be read"):
        read_peft(adapter)


@pytest.mark.parametrize("text", ["", "{", "[]", "[" * 100_000, '"LORA"', "nul"])
def test_a_config_that_is_none_is_refused(adapter: Path, text: str) -> None:
    (adapter / PEFT_CONFIG_FILE).write_text(text, encoding="utf-8")
    with pytest.raises(ArtifactCorruptError):
        read_peft(adapter)


def test_a_config_of_unlikely_size_is_not_parsed(adapter: Path) -> None:
    (adapter / PEFT_CONFIG_FILE).write_text(" " * ((1 << 20) + 1), encoding="utf-8")
    with pytest.raises(ArtifactCorruptError, match="at most 1048576 bytes"):
        read_peft(adapter)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "LOHA"}, "peft_type must be LORA.*got 'LOHA'"),
        ({"peft_type": None}, "peft_type must be LORA.*got None"),
        ({"bias": "all"}, "bias must be none.*got 'all'"),
        ({"use_dora": True}, "use_dora must be off.*got True"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save must be off"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out must be off"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights must be.*pissa"),
        ({"a_setting_of_tomorrow": {"on": 1}}, "a_setting_of_tomorrow must be off"),
        ({"alpha_pattern": {".*q_proj(a+)+$": 3}}, "alpha_pattern must have module names"),
    ],
)
def test_more_than_plain_lora_is_refused_by_name(
    adapter: Path, changes: Mapping[str, Any], message: str
) -> None:
    with pytest.raises(ArtifactError, match=message):
        read_peft(configured(adapter, **changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"lora_alpha": 0},
        {"lora_alpha": math.nan},
        {"lora_alpha": math.inf},
        {"lora_alpha": 10**400},
        {"lora_alpha": "16"},
        {"lora_alpha": True},
        {"lora_alpha": None},
        {"alpha_pattern": [Q]},
        {"alpha_pattern": {Q: -1}},
    ],
)
def test_a_scale_that_is_no_positive_number_is_refused(
    adapter: Path, changes: Mapping[str, Any]
) -> None:
    with pytest.raises(ArtifactCorruptError, match="alpha"):
        read_peft(configured(adapter, **changes))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.clear(), "no LoRA factor"),
        (lambda t: t.pop(KEY), f"{Q} has lora_B alone"),
        (lambda t: t.update({KEY: torch.zeros(3, 32)}), "do not fit each other"),
        (lambda t: t.update({KEY: torch.zeros(4)}), "do not fit each other"),
        (lambda t: t.update({KEY: t[KEY] * math.nan}), "finite floats"),
        (lambda t: t.update({KEY: t[KEY].long()}), "finite floats"),
        (lambda t: t.update({KEY: torch.zeros(0, 32), _b(KEY): torch.zeros(32, 0)}), "got 0"),
        (lambda t: t.update({KEY: torch.zeros(513, 2), _b(KEY): torch.zeros(2, 513)}), "got 513"),
    ],
)
def test_tensors_that_fit_nothing_are_refused(
    adapter: Path, change: Callable[[dict[str, Tensor]], object], message: str
) -> None:
    with pytest.raises(ArtifactCorruptError, match=message):
        read_peft(with_tensors(adapter, change))


@pytest.mark.parametrize(
    "key",
    [
        "base_model.model.lm_head.weight",
        "base_model.model.embed.lora_embedding_A",
        f"base_model.model.{Q}.lora_magnitude_vector.weight",
        f"base_model.model.{Q}.lora_B.bias",
        "base_model.model.../../etc/passwd.lora_A.weight",
        "lora_A.weight",
    ],
)
def test_a_tensor_that_is_no_factor_is_refused(adapter: Path, key: str) -> None:
    with_tensors(adapter, lambda tensors: tensors.update({key: torch.zeros(2, 2)}))
    with pytest.raises(ArtifactError, match=r"must be lora_A\.weight or lora_B\.weight"):
        read_peft(adapter)


def test_a_copy_of_a_base_weight_is_kept_apart(adapter: Path) -> None:
    """As PEFT saves it beside the factors of an output projection."""
    copy = random(4, 32)
    key = "base_model.model.lm_head.base_layer.weight"
    with_tensors(adapter, lambda tensors: tensors.update({key: copy}))
    assert_equal(read_peft(adapter), lora())
    (found,) = copied_weights(adapter).items()
    assert found[0] == "lm_head"
    assert torch.equal(found[1], copy)


def test_a_directory_is_known_by_its_tensors_and_its_config(adapter: Path) -> None:
    before = peft_sha256(adapter)
    assert before == peft_sha256(adapter)
    with_tensors(adapter, lambda tensors: next(iter(tensors.values())).add_(1.0))
    other = peft_sha256(adapter)
    configured(adapter, lora_alpha=3)
    assert len({before, other, peft_sha256(adapter)}) == 3


def test_the_base_that_a_config_names_is_never_looked_for(adapter: Path, tmp_path: Path) -> None:
    trap = tmp_path / "trap"
    assert_equal(read_peft(configured(adapter, base_model_name_or_path=str(trap))), lora())
    assert not trap.exists()


def _b(key: str) -> str:
    return key.replace("lora_A", "lora_B")
