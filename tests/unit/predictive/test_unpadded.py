"""Rows without padding, against the same rows with it."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import MistralConfig, MistralForCausalLM

from dalorra_core.adapters.flipout import FlippedNoise
from dalorra_core.adapters.inject import LM_HEAD
from dalorra_core.adapters.pack import SamplePack
from dalorra_core.predictive.forward import (
    PackedRows,
    begun_together,
    forward_together,
)
from dalorra_core.predictive.lean_layers import make_lean
from dalorra_core.predictive.trunk import Trunk
from dalorra_core.predictive.unpadded import LayerWork, UnpaddedRows, any_length
from tests.support.tiny_models import (
    FAMILIES,
    LINEAR,
    TinyAdapter,
    assert_near,
    batch_of,
    gated_pack,
    random_rows,
    tiny_adapter,
    tiny_model,
)

LENGTHS = (7, 1, 12, 4)


def group_of(tiny: TinyAdapter, m: int, lengths: Sequence[int] = LENGTHS) -> PackedRows:
    generator = torch.Generator().manual_seed(m)
    gates = torch.rand(m, len(tiny.state.specs), tiny.state.r, generator=generator)
    num_labels = tiny.model.num_labels
    rows = random_rows(lengths, num_labels=num_labels, seed=sum(lengths))
    batch = batch_of(rows, num_labels)
    return PackedRows(tiny.model, gated_pack(tiny.state, gates), batch)


@torch.no_grad()
def answers(groups: Sequence[PackedRows], *, unpadded: bool, begun: bool = False) -> list[Tensor]:
    groups[0].model.trunk.__dict__["unpads"] = unpadded
    if begun:
        batches = begun_together(groups)
        groups = [replace(g, batch=b) for g, b in zip(groups, batches, strict=True)]
    return [found.logits for found in forward_together(groups)]


def seen_by(layer: Any, groups: Sequence[PackedRows]) -> tuple[int, ...]:
    """Return the shape of what a layer is given."""
    seen: list[tuple[int, ...]] = []
    hook = layer.register_forward_pre_hook(lambda _, args: seen.append(tuple(args[0].shape)))
    answers(groups, unpadded=True)
    hook.remove()
    (shape,) = seen
    return shape


@pytest.mark.parametrize("begun", [False, True])
@pytest.mark.parametrize("m", [1, 3])
@pytest.mark.parametrize("layers", [None, (1, 1), (0, 0)])
@pytest.mark.parametrize("family", FAMILIES)
def test_answers_are_those_of_padded_rows(
    family: str, layers: tuple[int, int] | None, m: int, *, begun: bool
) -> None:
    tiny = tiny_adapter(family, targets=LINEAR, layers=layers)
    assert tiny.model.trunk.unpads
    groups = [group_of(tiny, m)]
    found = answers(groups, unpadded=True, begun=begun)
    assert_near(found[0], answers(groups, unpadded=False)[0])


@pytest.mark.parametrize("begun", [False, True])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_so_are_those_of_several_adapters(family: str, *, begun: bool) -> None:
    first = tiny_adapter(family)
    others = (
        tiny_adapter(family, r=5, targets=("o_proj", "down_proj"), num_labels=3, beside=first),
        tiny_adapter(family, layers=(1, 1), num_labels=6, seed=4, beside=first),
    )
    lengths = ((7, 3), (11,), (2, 9, 5))
    groups = [group_of(t, 3, own) for t, own in zip((first, *others), lengths, strict=True)]
    found = answers(groups, unpadded=True, begun=begun)
    for ours, padded in zip(found, answers(groups, unpadded=False), strict=True):
        assert_near(ours, padded)


def test_layers_of_fewer_operations_take_them_too() -> None:
    tiny = tiny_adapter(targets=LINEAR)
    groups = [group_of(tiny, 3)]
    padded = answers(groups, unpadded=False)
    assert make_lean(tiny.model.decoder)
    assert_near(answers(groups, unpadded=True)[0], padded[0])


@torch.no_grad()
def test_a_window_shorter_than_the_rows_is_kept() -> None:
    sizes: dict[str, Any] = {"vocab_size": 480, "hidden_size": 32, "intermediate_size": 48}
    sizes |= {"num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2}
    trunk = Trunk(MistralForCausalLM(MistralConfig(**sizes, sliding_window=4)))
    ids = torch.randint(3, 400, (3, 20), generator=torch.Generator().manual_seed(0))
    last = torch.tensor([19, 4, 11])
    whole = trunk.decoder(input_ids=ids, use_cache=False).last_hidden_state[torch.arange(3), last]
    with trunk.turns:
        assert trunk.unpads
        found = trunk.last_states(ids, last, [SamplePack(1, 1.0, {})], (), None)
    assert_near(found, whole)


def test_layers_really_see_tokens_only() -> None:
    tiny = tiny_adapter(layers=(1, 1))
    layers: Any = tiny.model.decoder.layers
    lower, last = layers
    assert seen_by(lower, [group_of(tiny, 3)]) == (1, sum(LENGTHS), 32)
    assert seen_by(last.mlp, [group_of(tiny, 3)]) == (3 * len(LENGTHS), 1, 32)
    assert seen_by(lower, [group_of(tiny, 3, (5, 5, 5))]) == (3, 5, 32)  # there is no padding


def test_gradients_are_taken_through_padded_rows() -> None:
    tiny = tiny_adapter()
    group, seen = group_of(tiny, 1), []
    lower: Any = tiny.model.decoder.layers[0]  # pyright: ignore
    lower.register_forward_pre_hook(lambda _, args: seen.append(tuple(args[0].shape)))
    forward_together([group])
    assert seen == [(4, 12, 32)]


def test_packs_that_treat_rows_or_places_unlike_keep_padding() -> None:
    tiny = tiny_adapter()
    pack = group_of(tiny, 3).pack
    assert any_length([pack])
    name = next(iter(pack.modules))
    module = pack.modules[name]
    of_rows = replace(module, z=torch.ones(3, 4, tiny.state.r))
    noisy = replace(module, beside=FlippedNoise(torch.ones(3, 3, 32), ("a",)))
    for odd in (of_rows, noisy):
        changed = replace(pack, modules={**pack.modules, name: odd})
        assert not any_length([pack, changed])
        at_head = {**pack.modules, LM_HEAD: odd}
        assert any_length([replace(pack, modules=at_head)])


def test_padding_goes_and_comes_back() -> None:
    rows = UnpaddedRows.of([2, 4, 1])
    assert rows.positions.tolist() == [[0, 1, 0, 1, 2, 3, 0]]
    ids = torch.tensor([[1, 2, 0, 0, 0, 0], [3, 4, 5, 6, 0, 0], [7, 0, 0, 0, 0, 0]])
    assert rows.joined(ids).tolist() == [[1, 2, 3, 4, 5, 6, 7]]
    states = torch.stack([ids.float(), 10 * ids.float()], dim=-1)  # (3, 6, 2)
    twice = torch.cat([rows.joined(states), -rows.joined(states)])
    assert torch.equal(rows.padded(twice), torch.cat([states, -states])[:, :4])
    assert rows.of_longest(twice)[0, :, 0].tolist() == [3, 4, 5, 6]


def test_it_is_done_where_it_is_less_work() -> None:
    work = LayerWork.of(tiny_model("llama").model)
    by_hand = sum(
        p.numel() for n, p in tiny_model("llama").model.layers[0].named_parameters() if "proj" in n
    )
    assert work == LayerWork(by_hand, 2 * 32)
    assert LayerWork(100, 1).saved_by([10, 5]) == 100 * (20 - 15) + (2 * 10**2 - 15**2)
    assert LayerWork(1, 1000).saved_by([10, 5]) < 0
    assert LayerWork(100, 1).saved_by([5, 5]) < 0


@pytest.mark.parametrize("refuses", [False, True])
def test_a_model_that_does_not_keep_rows_apart_is_found_out(
    monkeypatch: pytest.MonkeyPatch, *, refuses: bool
) -> None:
    trunk = Trunk(tiny_model())
    decoder: Any = trunk.decoder
    forward = decoder.forward

    def without_positions(*, position_ids: Tensor | None = None, **options: Any) -> Any:
        if refuses and position_ids is not None:
            raise TypeError("positions")
        return forward(**options)

    monkeypatch.setattr(decoder, "forward", without_positions)
    assert trunk.shortens
    assert not trunk.unpads
