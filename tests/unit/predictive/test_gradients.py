"""Derivatives of the label logits, against finite differences of merged weights in float64."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from dalorra_core.adapters.gradients import LabelGradients
from dalorra_core.errors import ConfigError, RowMemoryError
from dalorra_core.predictive import gradients as gradients_module
from dalorra_core.predictive.gradients import (
    bytes_per_token,
    label_gradients,
    label_gradients_of_rows,
)
from tests.support.tiny_models import (
    FAMILIES,
    TinyAdapter,
    assert_near,
    batch_of,
    gated_pack,
    merged_label_logits,
    random_rows,
    tiny_adapter,
)

LENGTHS = (5, 1, 3)
_STEP = 0.01
_STENCIL = {1: 8 / 12, -1: -8 / 12, 2: -1 / 12, -2: 1 / 12}
"""Five-point derivative: error of the fourth order, since norms inside the models are float32."""


def names_of(tiny: TinyAdapter) -> tuple[str, ...]:
    return tuple(spec.name for spec in tiny.state.specs)


def gradients_of(tiny: TinyAdapter, lengths: tuple[int, ...] = LENGTHS) -> LabelGradients:
    pack = gated_pack(tiny.state, None)
    batch = batch_of(random_rows(lengths), tiny.model.num_labels)
    return label_gradients(tiny.model, pack, batch, names_of(tiny))


def moved(tiny: TinyAdapter, name: str, direction: Tensor, step: float) -> TinyAdapter:
    params = {k: v.double() for k, v in tiny.state.params.items()}
    params[name] = params[name] + step * direction
    return replace(tiny, state=replace(tiny.state, params=params))


@pytest.mark.parametrize("family", FAMILIES)
def test_they_are_finite_differences_of_merged_weights(family: str) -> None:
    """Also with soft-capped logits (gemma2), where the head's derivative is not the identity."""
    tiny = tiny_adapter(family, targets=("q_proj", "v_proj", "down_proj", "lm_head"))
    found, rows = gradients_of(tiny), random_rows(LENGTHS)
    gates = {name: torch.ones(tiny.state.r) for name in names_of(tiny)}
    generator = torch.Generator().manual_seed(5)
    for name in names_of(tiny):
        module, s = found.modules[name], tiny.state.scaling
        up, down = (tiny.state.params[f"{name}.{f}"].double() for f in ("lora_B", "lora_A"))
        for factor in ("lora_A", "lora_B"):
            shape = (down if factor == "lora_A" else up).shape
            direction = torch.randn(shape, generator=generator, dtype=torch.float64)
            direction /= direction.norm()
            delta = up @ direction if factor == "lora_A" else direction @ down
            through = module.inputs.double() @ (s * delta).T  # (B, T, d_out)
            ours = torch.einsum("cbto,bto->bc", module.outputs.double(), through)
            for b, row in enumerate(rows):
                slope = torch.zeros(5, dtype=torch.float64)
                for step, weight in _STENCIL.items():
                    there = moved(tiny, f"{name}.{factor}", direction, step * _STEP)
                    slope += weight * merged_label_logits(there, row.token_ids, gates) / _STEP
                error = (ours[b] - slope).abs().max()
                assert error < 5e-4 * max(1.0, float(slope.abs().max()))


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_has_none_and_company_changes_nothing(family: str) -> None:
    tiny = tiny_adapter(family)
    together = gradients_of(tiny)
    rows = random_rows(LENGTHS)
    for b, row in enumerate(rows):
        (alone,) = label_gradients_of_rows(
            tiny.model,
            gated_pack(tiny.state, None),
            [row],
            modules=names_of(tiny),
            max_padded_tokens=1,
        )
        assert alone[0] == [0]
        assert_near(together.logits[b], alone[1].logits[0])
        for name, module in together.modules.items():
            single, tokens = alone[1].modules[name], module.is_token[b]
            assert int(tokens.sum()) == (1 if name == "lm_head" else LENGTHS[b])
            assert_near(module.inputs[b][tokens], single.inputs[0])
            assert_near(module.outputs[:, b, tokens], single.outputs[:, 0])
            assert not module.inputs[b][~tokens].any()
            assert not module.outputs[:, b, ~tokens].any()


def test_the_logits_are_those_of_the_forward_pass() -> None:
    tiny = tiny_adapter()
    batch = batch_of(random_rows(LENGTHS))
    with torch.no_grad():
        plain = tiny.model(batch, gated_pack(tiny.state, None)).logits[0]
    found = gradients_of(tiny)
    assert_near(found.logits, plain)
    assert not found.logits.requires_grad
    assert all(not m.outputs.requires_grad for m in found.modules.values())


def test_gradients_are_taken_whatever_mode_the_caller_is_in() -> None:
    tiny = tiny_adapter()
    with torch.no_grad():
        quiet = gradients_of(tiny)
    loud = gradients_of(tiny)
    for name, module in loud.modules.items():
        assert torch.equal(module.outputs, quiet.modules[name].outputs)


def test_what_is_not_asked_for_is_not_computed() -> None:
    tiny = tiny_adapter(layers=(1, 1))
    pack, batch = gated_pack(tiny.state, None), batch_of(random_rows(LENGTHS))
    whole = label_gradients(tiny.model, pack, batch, names_of(tiny))
    only = label_gradients(tiny.model, pack, batch, ("lm_head",))
    assert set(only.modules) == {"lm_head"}
    assert torch.equal(only.modules["lm_head"].outputs, whole.modules["lm_head"].outputs)
    assert torch.equal(only.modules["lm_head"].inputs, whole.modules["lm_head"].inputs)
    with_trunk = label_gradients(tiny.model, pack, batch, names_of(tiny)[:1])
    assert set(with_trunk.modules) == {"model.layers.1.self_attn.q_proj"}


def test_nothing_is_left_on_the_model() -> None:
    tiny = tiny_adapter()
    gradients_of(tiny)
    with pytest.raises(AttributeError):
        label_gradients(
            tiny.model, gated_pack(tiny.state, None), batch_of(random_rows((3,))), ("no.such",)
        )
    assert not any(module._forward_hooks for module in tiny.model.trunk.model.modules())
    assert_near(gradients_of(tiny).logits, gradients_of(tiny).logits)  # the turn was given back
    assert all(p.grad is None for p in tiny.model.trunk.model.parameters())


def test_rows_that_nobody_wants_are_left_out() -> None:
    tiny = tiny_adapter()
    asked: list[int] = []

    def wanted(place: int) -> bool:
        asked.append(place)
        return place != 0

    found = label_gradients_of_rows(
        tiny.model,
        gated_pack(tiny.state, None),
        random_rows(LENGTHS),
        modules=names_of(tiny),
        max_padded_tokens=1,
        wanted=wanted,
    )
    assert [places for places, _ in found] == [[1], [2]]
    assert asked == [1, 2, 0]  # shortest first


def test_modules_that_read_the_same_share_their_inputs() -> None:
    tiny = tiny_adapter(targets=("q_proj", "v_proj", "down_proj"), layers=(1, 1))
    found = gradients_of(tiny).modules
    query, value, down = (found[name].inputs for name in names_of(tiny))
    assert query is value
    assert down is not query


def chunks_of(tiny: TinyAdapter, modules: tuple[str, ...], limit: int = 1000) -> list[list[int]]:
    found = label_gradients_of_rows(
        tiny.model,
        gated_pack(tiny.state, None),
        random_rows(LENGTHS),
        modules=modules,
        max_padded_tokens=limit,
    )
    return [places for places, _ in found]


def test_memory_bounds_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rows have 1, 3 and 5 tokens; a chunk is padded to its longest one."""
    tiny = tiny_adapter()
    each = bytes_per_token(tiny.model, names_of(tiny))
    for tokens, chunks in ((5, [[1], [2], [0]]), (6, [[1, 2], [0]]), (15, [[1, 2, 0]])):
        monkeypatch.setattr(gradients_module, "CHUNK_BYTES", tokens * each)
        assert chunks_of(tiny, names_of(tiny)) == chunks
        assert chunks_of(tiny, names_of(tiny), limit=1) == [[1], [2], [0]]


def test_what_a_token_takes_is_at_least_what_is_given_back() -> None:
    tiny = tiny_adapter(targets=("q_proj", "down_proj", "lm_head"))
    found = gradients_of(tiny, (7, 7))
    given = sum(m.inputs.nbytes + m.outputs.nbytes for m in found.modules.values())
    assert given <= 2 * 7 * bytes_per_token(tiny.model, names_of(tiny))
    head = bytes_per_token(tiny.model, ("lm_head",))
    assert head == 4 * (5 * 5 + 32)  # C^2 derivatives and the state; no layer is differentiated


def test_a_row_that_would_take_too_much_is_refused_and_spoils_no_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tiny = tiny_adapter()
    each = bytes_per_token(tiny.model, names_of(tiny))
    monkeypatch.setattr(gradients_module, "MOST_ROW_BYTES", 4 * each)
    monkeypatch.setattr(gradients_module, "CHUNK_BYTES", each)
    found = label_gradients_of_rows(
        tiny.model,
        gated_pack(tiny.state, None),
        random_rows(LENGTHS),
        modules=names_of(tiny),
        max_padded_tokens=1000,
    )
    assert [next(found)[0], next(found)[0]] == [[1], [2]]
    message = f"5 labels for a prompt of 5 tokens would take about {5 * each} bytes"
    with pytest.raises(RowMemoryError, match=message):
        next(found)
    assert chunks_of(tiny, ("lm_head",)) == [[1, 2, 0]]


def test_one_function_only() -> None:
    tiny = tiny_adapter()
    pack = gated_pack(tiny.state, torch.ones(2, len(tiny.state.specs), tiny.state.r))
    with pytest.raises(ConfigError, match="of one function, got a pack of 2"):
        label_gradients(tiny.model, pack, batch_of(random_rows((3,))), names_of(tiny))
