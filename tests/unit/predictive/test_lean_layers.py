"""Layers in fewer operations, against the layers of transformers."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import MistralConfig, MistralForCausalLM, Qwen3Config, Qwen3ForCausalLM

from dalorra_core.base_models.packed import pack_linears
from dalorra_core.predictive import lean_layers
from dalorra_core.predictive.lean_layers import make_lean
from dalorra_core.predictive.trunk import Trunk
from tests.support.tiny_models import (
    LINEAR,
    TinyAdapter,
    assert_near,
    batch_of,
    gated_pack,
    random_rows,
    tiny_adapter,
    tiny_model,
)

SIZES: dict[str, Any] = {
    "vocab_size": 480,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
IDS = torch.randint(3, 400, (3, 20), generator=torch.Generator().manual_seed(0))


def is_lean(decoder: nn.Module) -> bool:
    layers: Any = decoder.layers
    return all("forward" in vars(layer) for layer in layers)


def states(decoder: nn.Module) -> Tensor:
    found: Tensor = decoder(input_ids=IDS, use_cache=False).last_hidden_state
    return found


def answers(tiny: TinyAdapter, m: int) -> Tensor:
    generator = torch.Generator().manual_seed(m)
    z = torch.rand(m, len(tiny.state.specs), 3, generator=generator)
    rows = random_rows((7, 1, 12, 4), seed=3)
    return tiny.model(batch_of(rows, num_labels=5), gated_pack(tiny.state, z)).logits


@pytest.mark.parametrize("m", [1, 3])
@pytest.mark.parametrize("layers", [None, (1, 1)])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_answers_are_those_of_the_plain_layers(
    family: str, layers: tuple[int, int] | None, m: int
) -> None:
    plain, lean = (tiny_adapter(family, targets=LINEAR, layers=layers) for _ in range(2))
    pack_linears(lean.model.trunk.model)
    assert make_lean(lean.model.decoder)
    with torch.no_grad():
        assert_near(answers(lean, m), answers(plain, m))
        assert_near(answers(lean, m), answers(plain, m))  # nor does a pass leave anything behind
    assert is_lean(lean.model.decoder)
    assert not is_lean(plain.model.decoder)


def mistral() -> nn.Module:
    return MistralForCausalLM(MistralConfig(**SIZES, sliding_window=4)).model


def qwen3() -> nn.Module:
    kinds = ["full_attention", "sliding_attention", "full_attention"]
    more: dict[str, Any] = {"use_sliding_window": True, "sliding_window": 4, "layer_types": kinds}
    return Qwen3ForCausalLM(Qwen3Config(**SIZES, **more)).model


@pytest.mark.parametrize("family", [mistral, qwen3])
def test_windows_shorter_than_the_rows_and_norms_of_heads_are_kept(family: Any) -> None:
    decoder, generator = family().eval(), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for value in decoder.parameters():
            noise = torch.randn(value.shape, generator=generator)
            value.copy_(1 + 0.2 * noise if value.dim() == 1 else noise / value.shape[1] ** 0.5)
        whole = states(decoder)
        assert make_lean(decoder)
        assert_near(states(decoder), whole)


def test_gradients_are_those_of_the_plain_layers() -> None:
    found = []
    for lean in (True, False):
        tiny = tiny_adapter(targets=LINEAR)
        assert not lean or make_lean(tiny.model.decoder)
        params = [value.requires_grad_() for value in tiny.state.params.values()]
        answers(tiny, 2).square().sum().backward()
        found.append([p.grad for p in params if p.grad is not None])
    assert len(found[0]) == len(found[1]) > 0
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_what_was_not_read_stays_as_it_is() -> None:
    assert not make_lean(nn.Linear(2, 2))
    others = {
        "family": tiny_model("gemma3"),
        "precision": tiny_model().bfloat16(),
        "attention": tiny_model(attn_implementation="eager"),
    }
    for what, model in others.items():
        decoder = Trunk(model).decoder
        assert not make_lean(decoder), what
        assert not is_lean(decoder), what


@pytest.mark.parametrize("error", [None, TypeError])
def test_layers_that_compute_something_else_are_taken_back(
    monkeypatch: pytest.MonkeyPatch, error: type[Exception] | None
) -> None:
    decoder = Trunk(tiny_model()).decoder
    whole = states(decoder)

    def odd(x: Tensor, *_: Tensor) -> Tensor:
        if error is not None:
            raise error
        return x

    monkeypatch.setattr(lean_layers, "rotated", odd)
    assert not make_lean(decoder)
    assert torch.equal(states(decoder), whole)
