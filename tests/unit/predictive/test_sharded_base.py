"""dalorra_core.predictive.sharded_base in a group of one process: what is gathered, and when.

Two processes are in tests/integration/test_sharded_base.py.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.distributed.tensor import DTensor

from dalorra_core.adapters.inject import find_targets
from dalorra_core.adapters.state import label_rows_only
from dalorra_core.config import AdapterConfig, OptimConfig
from dalorra_core.errors import BaseModelError, ConfigError
from dalorra_core.methods.dalorra import DalorraConfig
from dalorra_core.predictive.forward import LabelModel
from dalorra_core.predictive.sharded_base import load_sharded, shard_layers
from dalorra_core.predictive.shared_base import SharedBase, identify
from dalorra_core.predictive.trunk import Trunk
from dalorra_core.training.step import TrainStep
from tests.support.tiny_models import (
    FAMILIES,
    TinyAdapter,
    batch_of,
    random_rows,
    save_tiny_base,
    tiny_adapter,
    tiny_model,
)

pytestmark = pytest.mark.skipif(
    not hasattr(torch.cpu.Stream, "record_event"), reason="torch 2.6 gathers on GPUs only"
)

NUM_LAYERS = 4
CPU = torch.device("cpu")
ROWS = random_rows((3, 9, 5, 8, 4))


@pytest.fixture(autouse=True)
def _group(tmp_path: Path) -> Iterator[None]:
    meeting = f"file://{tmp_path / 'group'}"
    distributed.init_process_group("gloo", init_method=meeting, rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def adapted(family: str, *, sharded: bool, layers: tuple[int, int] | None = None) -> TinyAdapter:
    """Return an adapter on a model of four layers."""
    tiny = tiny_adapter(family, layers=layers, num_hidden_layers=NUM_LAYERS, **kinds_of(family))
    if not sharded:
        return tiny
    model = tiny_model(family, num_hidden_layers=NUM_LAYERS, **kinds_of(family))
    shard_layers(model, CPU)
    found = find_targets(model, ("q_proj", "v_proj", "lm_head"), layers)
    specs = label_rows_only(found, len(tiny.label_set.labels))
    spread = LabelModel(Trunk(model, sharded=True), specs, tiny.label_set)
    return TinyAdapter(tiny.base, spread, tiny.state, tiny.label_set)


def kinds_of(family: str) -> dict[str, Any]:
    """Return what Gemma 3 says of each layer."""
    kinds = ["sliding_attention", "full_attention"] * (NUM_LAYERS // 2)
    return {"layer_types": kinds} if family == "gemma3" else {}


def layers_of(model: LabelModel) -> list[nn.Module]:
    layers: Any = model.decoder.layers
    return list(layers)


def gathered(layers: Sequence[nn.Module]) -> list[int]:
    """Return the numbers of the layers whose weights are whole."""
    return [
        number
        for number, layer in enumerate(layers)
        if not any(isinstance(weight, DTensor) for weight in layer.parameters())
    ]


def gradients(tiny: TinyAdapter, *, recompute: bool) -> dict[str, Tensor]:
    """Return the gradients of a step of two samples."""
    step = TrainStep(
        tiny.model,
        tiny.state.specs,
        AdapterConfig(r=tiny.state.r),
        DalorraConfig(num_train_samples=2),
        optim=OptimConfig(),
        num_examples=50,
        seed=4,
        recompute=recompute,
    )
    with torch.no_grad():
        for name, value in step.params.items():
            value.copy_(tiny.state.params[name])
    step(batch_of(ROWS), 3).loss.backward()
    return {name: p.grad for name, p in step.params.items() if p.grad is not None}


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("layers", [None, (2, 3)])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_those_of_a_base_that_is_whole(
    family: str, layers: tuple[int, int] | None, recompute: bool
) -> None:
    expected = gradients(adapted(family, sharded=False, layers=layers), recompute=recompute)
    spread = adapted(family, sharded=True, layers=layers)
    found = gradients(spread, recompute=recompute)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert max(float(value.abs().max()) for value in found.values()) > 1e-3
    assert gathered(layers_of(spread.model)) == []


@pytest.mark.parametrize("recompute", [False, True])
def test_one_layer_is_whole_at_a_time(recompute: bool) -> None:
    spread = adapted("llama", sharded=True)
    layers = layers_of(spread.model)
    seen: list[tuple[int, list[int]]] = []
    for number, layer in enumerate(layers):

        def note(*_: Any, number: int = number) -> None:
            seen.append((number, gathered(layers)))

        layer.get_submodule("mlp.down_proj").register_forward_hook(note)
        layer.get_submodule("mlp.down_proj").register_full_backward_hook(note)
    gradients(spread, recompute=recompute)
    assert [number for number, _ in seen[:NUM_LAYERS]] == [0, 1, 2, 3]
    assert {number for number, _ in seen[NUM_LAYERS:]} == {0, 1, 2, 3}
    assert all(whole == [number] for number, whole in seen)


def test_a_pass_that_is_stopped_gathers_nothing_of_the_layer_where_it_stops() -> None:
    spread = adapted("llama", sharded=True, layers=(2, 3))
    with spread.model.trunk.turns:
        stem = spread.model.trunk.stem(batch_of(ROWS).input_ids, 2)
    assert stem.layer == 2
    assert gathered(layers_of(spread.model)) == []


def test_a_base_is_loaded_in_parts(tmp_path: Path) -> None:
    identity = identify(save_tiny_base(tmp_path, "qwen2"))
    for dtype in ("float32", "bfloat16"):
        base = SharedBase.load(identity, device="cpu", dtype=dtype, sharded=True)
        whole = SharedBase.load(identity, device="cpu", dtype=dtype)
        assert base.trunk.sharded
        assert not whole.trunk.sharded
        assert base.dtype is whole.dtype
        parts = dict(base.trunk.model.named_parameters())
        for name, value in whole.trunk.model.named_parameters():
            part = parts[name]
            assert isinstance(part, DTensor) == (".layers." in name)
            assert torch.equal(part.full_tensor() if isinstance(part, DTensor) else part, value)


def test_a_torch_that_cannot_gather_on_a_cpu_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(torch.cpu.Stream, "record_event")  # as in torch 2.6
    with pytest.raises(ConfigError, match=r"run\.shard_base must be false on a CPU"):
        load_sharded(tmp_path, CPU, torch.float32)


def test_a_decoder_without_a_list_of_layers_is_refused() -> None:
    model = tiny_model("llama")
    decoder: Any = model.base_model
    decoder.layers = nn.Sequential(*decoder.layers)
    with pytest.raises(BaseModelError, match=r"run\.shard_base must be false for LlamaForCausalLM"):
        shard_layers(model, CPU)


def test_layers_of_several_precisions_are_refused() -> None:
    model = tiny_model("llama")
    decoder: Any = model.base_model
    decoder.layers[1].mlp.bfloat16()
    with pytest.raises(BaseModelError, match=r"must be false .* torch\.bfloat16, torch\.float32"):
        shard_layers(model, CPU)
