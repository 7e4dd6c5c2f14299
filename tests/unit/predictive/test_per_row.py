"""Packs that depend on their rows, in batches of several adapters, in chunks, and settled twice."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from dalorra_core.adapters.pack import ModulePack, RowContext, SamplePack
from dalorra_core.config import MethodSettings
from dalorra_core.methods import METHODS
from dalorra_core.methods.amortised_prompt import AmortisedPromptConfig
from dalorra_core.methods.amortised_token import AmortisedTokenConfig
from dalorra_core.methods.c_lora import CLoraConfig
from dalorra_core.methods.dalorra import DalorraConfig
from dalorra_core.methods.method import Draw
from dalorra_core.predictive.scoring import RowsToScore, score_rows, score_together
from tests.support.tiny_models import (
    FAMILIES,
    TinyAdapter,
    assert_near,
    batch_of,
    random_rows,
    tiny_adapter,
)

SETTINGS: tuple[MethodSettings, ...] = (
    AmortisedPromptConfig(width=4),
    CLoraConfig(width=4),
    AmortisedTokenConfig(width=4),
    DalorraConfig(),
    AmortisedPromptConfig(width=3, projection="learned"),
)
LENGTHS = ((7, 3), (11,), (2, 9, 5), (4,), (6, 12))
M = 3


@dataclass(frozen=True)
class Served:
    """One adapter with the pack that answers for it."""

    tiny: TinyAdapter
    pack: SamplePack


def served(tiny: TinyAdapter, config: MethodSettings, seed: int, *, mean: bool) -> Served:
    """Return random factors and nets of a method on a tiny model."""
    method, specs = METHODS[config.name], tiny.state.specs
    params = method.init(specs, tiny.state.r, seed, config)
    generator = torch.Generator().manual_seed(seed)
    for name, value in params.items():
        if not name.endswith("lora_A"):
            params[name] = value + 0.5 * torch.randn(value.shape, generator=generator)
    state = replace(tiny.state, params=params)
    if mean:
        return Served(tiny, method.mean_pack(state, config))
    return Served(tiny, method.predict_pack(state, config, Draw(("draw", seed), M)))


def family_of(family: str, *, mean: bool) -> list[Served]:
    """Return five adapters on one model: methods, ranks, modules and layers differ."""
    first = tiny_adapter(family)
    tinies = (
        first,
        tiny_adapter(family, r=4, num_labels=3, beside=first),
        tiny_adapter(family, layers=(1, 1), num_labels=6, seed=4, beside=first),
        tiny_adapter(family, r=2, beside=first),
        tiny_adapter(family, r=1, targets=("q_proj",), num_labels=2, seed=5, beside=first),
    )
    return [
        served(tiny, config, seed, mean=mean)
        for seed, (tiny, config) in enumerate(zip(tinies, SETTINGS, strict=True))
    ]


def groups_of(adapters: Sequence[Served]) -> list[RowsToScore]:
    return [
        RowsToScore(
            one.tiny.model,
            one.pack,
            random_rows(lengths, num_labels=one.tiny.model.num_labels, seed=n),
        )
        for n, (one, lengths) in enumerate(zip(adapters, LENGTHS, strict=True))
    ]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("mean", [False, True])
@pytest.mark.parametrize("limit", [24, 10_000])
def test_adapters_of_several_methods_share_a_batch(family: str, *, mean: bool, limit: int) -> None:
    groups = groups_of(family_of(family, mean=mean))
    together = score_together(groups, max_padded_tokens=limit)
    for group, found in zip(groups, together, strict=True):
        labels = group.model.num_labels
        for b, row in enumerate(group.rows):
            alone = score_rows(
                group.model, group.pack, [row], num_labels=labels, max_padded_tokens=10_000
            )
            assert_near(found.log_probs[:, b], alone.log_probs[:, 0])


def test_a_settled_pack_is_settled() -> None:
    one = served(tiny_adapter(), AmortisedPromptConfig(width=4), 0, mean=False)
    batch = batch_of(random_rows((4, 6)))
    settled = one.tiny.model.settled(one.pack, batch)
    assert settled.per_row is None
    assert one.tiny.model.settled(settled, batch) is settled
    with torch.no_grad():
        found, expected = (one.tiny.model(batch, p).logits for p in (settled, one.pack))
    assert torch.equal(found, expected)


def test_samples_are_cut_before_or_after_the_rows_are_known() -> None:
    one = served(tiny_adapter(), AmortisedPromptConfig(width=4), 0, mean=False)
    batch = batch_of(random_rows((4, 6)))
    first = one.tiny.model.settled(one.pack.narrow(1, 3), batch)
    after = one.tiny.model.settled(one.pack, batch).narrow(1, 3)
    for name, module in first.modules.items():
        other = after.modules[name].z
        assert module.z is not None
        assert other is not None
        assert torch.equal(module.z, other)


class Watch:
    """A ``PerRow`` that changes nothing and keeps what it was told."""

    def __init__(self) -> None:
        self.seen: list[RowContext] = []

    def __call__(
        self, modules: Mapping[str, ModulePack], context: RowContext
    ) -> Mapping[str, ModulePack]:
        self.seen.append(context)
        return modules

    def narrow(self, start: int, stop: int) -> "Watch":  # noqa: ARG002
        return self

    def to(self, device: torch.device, dtype: torch.dtype) -> "Watch":  # noqa: ARG002
        return self

    def tensors(self) -> Sequence[Tensor]:
        return ()


def test_the_rows_are_told_by_their_tokens_alone() -> None:
    """What a pack sees of its rows: mean embeddings, exact to the last digit, and the tokens."""
    tiny, watch = tiny_adapter(), Watch()
    pack = served(tiny, DalorraConfig(), 0, mean=False).pack
    rows = random_rows((4, 6, 50))
    tiny.model.settled(replace(pack, per_row=watch), batch_of(rows))
    (context,) = watch.seen
    embedding: Any = tiny.base.get_input_embeddings()
    table = embedding.weight.double()
    for b, row in enumerate(rows):
        expected = table[list(row.token_ids)].mean(0).float()
        assert torch.equal(context.mean_embedding[b], expected)
        assert context.is_token[b].tolist() == [t < len(row.token_ids) for t in range(50)]


def test_embeddings_are_looked_up_only_when_they_are_asked_for() -> None:
    tiny, watch = tiny_adapter(), Watch()
    pack = replace(served(tiny, DalorraConfig(), 0, mean=False).pack, per_row=watch)
    looked_up: list[int] = []
    model: Any = tiny.model.trunk.model
    embedding = model.get_input_embeddings()
    handle = embedding.register_forward_hook(lambda *_: looked_up.append(1))
    tiny.model.settled(pack, batch_of(random_rows((4, 6))))
    assert looked_up == []
    (context,) = watch.seen
    assert context.mean_embedding is context.mean_embedding
    assert looked_up == [1]
    handle.remove()
