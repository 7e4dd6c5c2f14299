"""The last layer at the last tokens only, against the whole layer."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dalorra_core.adapters.flipout import FlippedNoise
from dalorra_core.adapters.pack import Transform
from dalorra_core.predictive.last_layer import can_shorten, needs_every_position, shortened_to
from dalorra_core.predictive.trunk import Trunk
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


class _Doubling:
    """A transform without tensors."""

    def __call__(self, x: Tensor) -> Tensor:
        return 2 * x

    def narrow(self, start: int, stop: int) -> "_Doubling":  # noqa: ARG002
        return self

    def to(self, device: torch.device, dtype: torch.dtype) -> "_Doubling":  # noqa: ARG002
        return self

    def tensors(self) -> tuple[Tensor, ...]:
        return ()


def pack_of(tiny: TinyAdapter, m: int) -> Any:
    generator = torch.Generator().manual_seed(m)
    return gated_pack(tiny.state, torch.rand(m, len(tiny.state.specs), 3, generator=generator))


def answers(tiny: TinyAdapter, m: int, *, short: bool) -> Tensor:
    tiny.model.trunk.__dict__["shortens"] = short
    rows = random_rows((7, 1, 12, 4), seed=3)
    return tiny.model(batch_of(rows, num_labels=5), pack_of(tiny, m)).logits


@pytest.mark.parametrize("layers", [None, (1, 1)])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_short_last_layer_gives_the_answers_of_the_whole_one(
    family: str, layers: tuple[int, int] | None
) -> None:
    tiny = tiny_adapter(family, targets=LINEAR, layers=layers)
    assert can_shorten(tiny.model.decoder)
    with torch.no_grad():
        assert_near(answers(tiny, 3, short=True), answers(tiny, 3, short=False))


def test_the_last_layer_really_is_shorter() -> None:
    tiny = tiny_adapter(targets=LINEAR)
    seen: list[torch.Size] = []
    mlp: Any = tiny.model.decoder.layers[-1].mlp  # pyright: ignore
    mlp.register_forward_hook(lambda _, args, out: seen.append(args[0].shape))  # noqa: ARG005
    rows = random_rows((5, 2, 9, 9), seed=1)
    with torch.no_grad():
        tiny.model(batch_of(rows, num_labels=5), pack_of(tiny, 2))
    assert seen[-1] == (8, 1, 32)  # M * B rows, one position


def test_gradients_are_those_of_the_whole_layer() -> None:
    found = []
    for short in (True, False):
        tiny = tiny_adapter(targets=LINEAR)
        params = [value.requires_grad_() for value in tiny.state.params.values()]
        answers(tiny, 2, short=short).square().sum().backward()
        found.append([p.grad for p in params if p.grad is not None])
    assert len(found[0]) == len(found[1]) > 0
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_window_shorter_than_the_rows_is_kept(attention: str) -> None:
    kinds = ["full_attention", "sliding_attention"]
    model = tiny_model("gemma3", layer_types=kinds, attn_implementation=attention)
    trunk = Trunk(model)
    ids = torch.randint(3, 400, (3, 20), generator=torch.Generator().manual_seed(0))
    last = torch.tensor([19, 11, 2])
    with torch.no_grad():
        whole = trunk.decoder(input_ids=ids).last_hidden_state[torch.arange(3), last]
        with shortened_to(trunk.decoder, last):
            short = trunk.decoder(input_ids=ids).last_hidden_state[:, 0]
    assert_near(short, whole)


def test_what_is_not_understood_is_left_alone() -> None:
    assert not can_shorten(nn.Linear(2, 2))
    capped = Trunk(tiny_model("gemma2", attn_logit_softcapping=3.0))
    assert not can_shorten(capped.decoder)
    odd = Trunk(tiny_model())
    odd.decoder.config.sliding_window = "short"  # pyright: ignore  # nothing that Llama reads
    layers = odd.decoder.layers
    assert not can_shorten(odd.decoder)
    assert odd.decoder.layers is layers


def test_a_family_that_computes_something_else_is_found_out() -> None:
    trunk = Trunk(tiny_model())
    layer: Any = trunk.decoder.layers[-1]  # pyright: ignore
    plain = layer.mlp.forward
    layer.mlp.forward = lambda x: plain(x) + x.mean(dim=1, keepdim=True)  # mixes positions
    assert not can_shorten(trunk.decoder)


def test_transforms_keep_every_position() -> None:
    tiny = tiny_adapter()
    pack = pack_of(tiny, 1)
    assert not needs_every_position([pack])
    noise, head, below = torch.zeros(1, 3, 32), "lm_head", tiny.state.specs[0].name
    in_training = FlippedNoise(noise, ("a",), by_row=True)
    cases: list[tuple[str, Transform, bool]] = [
        (head, _Doubling(), False),
        (below, _Doubling(), True),
        (below, in_training, False),  # signs anew in every pass: any position is like any other
        (below, replace(in_training, by_row=False), True),
    ]
    for name, transform, expected in cases:
        module = replace(pack.modules[name], before=transform)
        changed = replace(pack, modules={**pack.modules, name: module})
        assert needs_every_position([pack, changed]) is expected
