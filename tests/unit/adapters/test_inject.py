"""dalorra_core.adapters.inject and state: which layers are adapted, and from what they start."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from dalorra_core.adapters.binding import Binding
from dalorra_core.adapters.inject import (
    TargetSpec,
    decoder_of,
    find_targets,
    inject,
    lm_head_of,
    num_layers_of,
)
from dalorra_core.adapters.linear import AdaptedLinear
from dalorra_core.adapters.state import AdapterState, init_factors, label_rows_only, module_packs
from dalorra_core.errors import BaseModelError, ConfigError
from dalorra_core.sampling.streams import uniforms
from tests.support.tiny_models import FAMILIES, tiny_model


def test_targets_are_those_of_the_model_whatever_is_adapted_already() -> None:
    model = tiny_model()
    plain = find_targets(model, ("q_proj", "o_proj", "lm_head"))
    inject(model, find_targets(model, ("q_proj", "v_proj")), Binding())
    assert find_targets(model, ("q_proj", "o_proj", "lm_head")) == plain


@pytest.mark.parametrize("family", FAMILIES)
def test_targets_are_found_in_forward_order_with_their_shapes(family: str) -> None:
    model = tiny_model(family)
    specs = find_targets(model, ("lm_head", "v_proj", "q_proj"))
    names = [f"model.layers.{n}.self_attn.{p}_proj" for n in (0, 1) for p in ("q", "v")]
    assert [s.name for s in specs] == [*names, "lm_head"]
    assert [s.layer for s in specs] == [0, 0, 1, 1, None]
    for spec in specs[:-1]:
        layer = model.get_submodule(spec.name)
        assert (spec.d_in, spec.d_out) == (layer.in_features, layer.out_features)
    assert (specs[-1].d_in, specs[-1].d_out) == (32, 480)
    assert num_layers_of(model) == 2


def test_a_layer_range_keeps_both_its_ends_and_the_head() -> None:
    model = tiny_model(num_hidden_layers=4)
    specs = find_targets(model, ("q_proj", "lm_head"), (1, 2))
    assert [s.layer for s in specs] == [1, 2, None]
    assert [s.layer for s in find_targets(model, ("q_proj",), (3, 3))] == [3]


@pytest.mark.parametrize("layers", [(0, 2), (-1, 1), (1, 0), (5, 6)])
def test_a_layer_range_outside_the_model_is_refused(layers: tuple[int, int]) -> None:
    with pytest.raises(ConfigError, match=rf"first <= last <= 1.*got {layers[0]}\.\.{layers[1]}"):
        find_targets(tiny_model(), ("q_proj",), layers)


def test_an_unknown_target_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError) as caught:
        find_targets(tiny_model(), ("q_proj", "query", "c_attn"))
    known = "down_proj, gate_proj, k_proj, lm_head, o_proj, q_proj, up_proj, v_proj"
    assert "names c_attn, query, which" in str(caught.value)
    assert known in str(caught.value)


def test_injection_replaces_the_named_layers_and_no_other() -> None:
    model = tiny_model()
    head, kept = lm_head_of(model), model.get_submodule("model.layers.0.self_attn.k_proj")
    old = model.get_submodule("model.layers.1.self_attn.q_proj")
    inject(model, find_targets(model, ("q_proj", "lm_head"), (1, 1)), Binding())
    replaced = model.get_submodule("model.layers.1.self_attn.q_proj")
    assert isinstance(replaced, AdaptedLinear)
    assert replaced.base is old
    assert [n for n, m in model.named_modules() if isinstance(m, AdaptedLinear)] == [
        "model.layers.1.self_attn.q_proj"
    ]
    assert lm_head_of(model) is head
    assert model.get_submodule("model.layers.0.self_attn.k_proj") is kept


def test_a_second_adapter_adds_its_own_layers_and_keeps_those_that_are_there() -> None:
    model, binding = tiny_model(), Binding()
    first = find_targets(model, ("q_proj",))
    inject(model, first, binding)
    layers = [model.get_submodule(spec.name) for spec in first]
    second = find_targets(tiny_model(), ("q_proj", "o_proj"), (1, 1))
    inject(model, second, binding)
    assert [model.get_submodule(spec.name) for spec in first] == layers
    adapted = [n for n, m in model.named_modules() if isinstance(m, AdaptedLinear)]
    assert adapted == [
        "model.layers.0.self_attn.q_proj",
        "model.layers.1.self_attn.q_proj",
        "model.layers.1.self_attn.o_proj",
    ]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"name": "model.layers.0.self_attn.z_proj"}, "has no module 'model.layers.0.self_attn.z"),
        ({"name": "model.layers.1.self_attn.q_proj.base"}, "has no module"),
        ({"name": "model.layers.1.mlp"}, "must be a linear layer to be adapted, got LlamaMLP"),
        ({"name": ""}, "has no module ''"),
        ({"d_in": 31}, r"\(32, 32, 1\), the adapter's has \(31, 32, 1\)"),
        ({"d_out": 33}, r"the adapter's has \(32, 33, 1\)"),
        ({"layer": 0}, r"the adapter's has \(32, 32, 0\)"),
        ({"layer": None}, r"the adapter's has \(32, 32, None\)"),
    ],
)
def test_a_module_that_does_not_fit_is_refused_before_anything_changes(
    changes: dict[str, Any], said: str
) -> None:
    model, binding = tiny_model(), Binding()
    inject(model, find_targets(model, ("q_proj",), (1, 1)), binding)
    good = find_targets(tiny_model(), ("o_proj", "q_proj"), (1, 1))
    bad = replace(next(s for s in good if s.name.endswith("q_proj")), **changes)
    with pytest.raises(BaseModelError, match=said):
        inject(model, [*good, bad], binding)
    adapted = [n for n, m in model.named_modules() if isinstance(m, AdaptedLinear)]
    assert adapted == ["model.layers.1.self_attn.q_proj"]


def test_a_model_without_a_decoder_or_a_linear_head_is_refused() -> None:
    model = tiny_model()
    decoder = decoder_of(model)
    assert decoder is model.get_submodule("model")
    with pytest.raises(ConfigError, match="LlamaModel has no decoder"):
        decoder_of(decoder)
    with pytest.raises(ConfigError, match="LlamaModel has no linear output projection"):
        lm_head_of(decoder)


def test_a_model_without_numbered_layers_names_its_range() -> None:
    assert num_layers_of(nn.Linear(2, 2)) == 0
    with pytest.raises(ConfigError, match=r"last <= -1"):
        find_targets(nn.Linear(2, 2), ("q_proj",))


def test_factors_start_as_loras_do() -> None:
    """A uniform in +-1/sqrt(d_in), B zero: methods.md 1.6."""
    specs = (TargetSpec("a", 400, 7, 0), TargetSpec("b", 100, 3, 1))
    params = init_factors(specs, 20, seed=3)
    for spec in specs:
        a, b = params[f"{spec.name}.lora_A"], params[f"{spec.name}.lora_B"]
        assert (a.shape, b.shape) == ((20, spec.d_in), (spec.d_out, 20))
        assert torch.equal(b, torch.zeros_like(b))
        bound = 1 / math.sqrt(spec.d_in)
        assert a.abs().max() < bound
        n = a.numel()
        assert abs(float(a.double().mean())) < 5 * bound / math.sqrt(3 * n)
        # variance of a square of U(-1, 1) is 4/45
        squares = float((a.double() / bound).square().mean())
        assert abs(squares - 1 / 3) < 5 * math.sqrt(4 / 45 / n)
    draw = (2 * uniforms(("init", 3, "b", "lora_A"), 2000) - 1) / 10
    assert params["b.lora_A"].flatten().tolist() == pytest.approx(draw.tolist(), rel=1e-6)


def test_adding_a_module_changes_no_other() -> None:
    one, other = TargetSpec("a", 8, 4, 0), TargetSpec("b", 8, 4, 1)
    alone, both = init_factors([one], 2, 0), init_factors([other, one], 2, 0)
    assert torch.equal(alone["a.lora_A"], both["a.lora_A"])
    assert not torch.equal(both["a.lora_A"], both["b.lora_A"])
    assert not torch.equal(alone["a.lora_A"], init_factors([one], 2, 1)["a.lora_A"])


def test_the_head_is_cut_to_its_label_rows() -> None:
    specs = [TargetSpec("q", 8, 4, 0), TargetSpec("lm_head", 8, 480, None)]
    assert label_rows_only(specs, 5) == (specs[0], TargetSpec("lm_head", 8, 5, None))


def test_each_module_gets_its_own_row_of_gates() -> None:
    specs = (TargetSpec("a", 4, 3, 0), TargetSpec("b", 4, 3, 1))
    state = AdapterState(specs, 2, 1.0, init_factors(specs, 2, 0))
    z = torch.arange(12.0).view(3, 2, 2)
    packs = module_packs(state, z)
    assert torch.equal(packs["b"].z if packs["b"].z is not None else z, z[:, 1])
    assert torch.equal(packs["a"].lora_A[0], state.params["a.lora_A"])
    assert module_packs(state, None)["a"].z is None
