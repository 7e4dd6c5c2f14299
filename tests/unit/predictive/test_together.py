"""Rows of several adapters in one forward: each answers as it does alone."""

import threading
import time
from collections.abc import Sequence
from itertools import accumulate

import pytest
import torch
from torch import Tensor, nn

from dalorra_core.adapters.inject import TargetSpec
from dalorra_core.adapters.pack import SamplePack
from dalorra_core.data.labels import LabelSet
from dalorra_core.errors import BaseModelError, ConfigError
from dalorra_core.predictive.forward import LabelModel, PackedRows, forward_together
from dalorra_core.predictive.scoring import (
    Prediction,
    RowsToScore,
    joined,
    score_rows,
    score_together,
)
from dalorra_core.predictive.trunk import Trunk
from tests.support.tiny_models import (
    FAMILIES,
    LABEL_TOKENS,
    TinyAdapter,
    assert_near,
    batch_of,
    gated_pack,
    merged_label_logits,
    random_rows,
    tiny_adapter,
    tiny_model,
)

M = 3


def gates_of(tiny: TinyAdapter, samples: int = M, seed: int = 3) -> Tensor:
    shape = (samples, len(tiny.state.specs), tiny.state.r)
    return (torch.rand(shape, generator=torch.Generator().manual_seed(seed)) > 0.4).float()


def family_of(family: str) -> tuple[TinyAdapter, ...]:
    """Return four adapters on one model: ranks, modules, layers and label counts all differ."""
    first = tiny_adapter(family)
    return (
        first,
        tiny_adapter(family, r=5, targets=("o_proj", "down_proj"), num_labels=3, beside=first),
        tiny_adapter(family, layers=(1, 1), num_labels=6, seed=4, beside=first),
        tiny_adapter(family, r=1, targets=("lm_head",), num_labels=2, seed=5, beside=first),
    )


@pytest.fixture(scope="module", params=FAMILIES)
def tinies(request: pytest.FixtureRequest) -> tuple[TinyAdapter, ...]:
    return family_of(request.param)


LENGTHS = ((7, 3), (11,), (2, 9, 5), (4,))


def groups_of(tinies: Sequence[TinyAdapter]) -> list[PackedRows]:
    return [
        PackedRows(
            tiny.model,
            gated_pack(tiny.state, gates_of(tiny)),
            batch_of(
                random_rows(lengths, num_labels=tiny.model.num_labels, seed=n),
                tiny.model.num_labels,
            ),
        )
        for n, (tiny, lengths) in enumerate(zip(tinies, LENGTHS, strict=False))
    ]


@torch.no_grad()
def test_each_group_answers_as_with_weights_merged_by_hand(
    tinies: tuple[TinyAdapter, ...],
) -> None:
    found = forward_together(groups_of(tinies))
    for n, (tiny, out) in enumerate(zip(tinies, found, strict=True)):
        z = gates_of(tiny)
        rows = random_rows(LENGTHS[n], num_labels=tiny.model.num_labels, seed=n)
        assert out.logits.shape == (M, len(rows), tiny.model.num_labels)
        for m in range(M):
            gates = {spec.name: z[m, i] for i, spec in enumerate(tiny.state.specs)}
            for b, row in enumerate(rows):
                expected = merged_label_logits(tiny, row.token_ids, gates)
                assert_near(out.logits[m, b].double(), expected)


@torch.no_grad()
def test_each_group_answers_as_alone_with_its_label_mass(tinies: tuple[TinyAdapter, ...]) -> None:
    groups = groups_of(tinies)
    for order in (groups, groups[::-1], [groups[2], groups[0]], [groups[0], groups[0]]):
        for group, together in zip(order, forward_together(order, label_mass=True), strict=True):
            alone = group.model(group.batch, group.pack, label_mass=True)
            assert_near(together.logits, alone.logits)
            assert alone.label_mass is not None
            assert together.label_mass is not None
            assert_near(together.label_mass, alone.label_mass)


def folds(tiny: TinyAdapter, run: Sequence[PackedRows]) -> list[int]:
    """Return the rows that each decoder layer sees in one forward."""
    seen: list[int] = []
    layers = tiny.model.decoder.get_submodule("layers")
    tiny.model.trunk.__dict__["shortens"] = False  # else the last one's parts are called, not it
    hooks = [
        layer.register_forward_hook(lambda _m, args, _out: seen.append(len(args[0])))
        for layer in layers.children()
    ]
    with torch.no_grad():
        forward_together(run)
    for hook in hooks:
        hook.remove()
    return seen


def test_samples_are_folded_in_at_the_first_layer_that_any_pack_adapts() -> None:
    base = tiny_adapter(layers=(2, 3), num_hidden_layers=4)
    early = tiny_adapter(layers=(1, 1), beside=base)
    late = tiny_adapter(layers=(3, 3), beside=base)
    whole = tiny_adapter(beside=base)
    for tinies, expected in (
        ((late,), [2, 2, 2, 6]),
        ((base,), [2, 2, 6, 6]),
        ((late, base), [3, 3, 9, 9]),
        ((base, late, early), [6, 18, 18, 18]),
        ((late, whole), [9, 9, 9, 9]),
        ((late,), [2, 2, 2, 6]),  # nothing is left of the forwards before
    ):
        groups = groups_of(tinies)
        assert folds(base, groups) == expected
        with torch.no_grad():
            for group, out in zip(groups, forward_together(groups), strict=True):
                assert_near(out.logits, group.model(group.batch, group.pack).logits)
    layers = base.model.decoder.get_submodule("layers")
    assert not any(layer._forward_pre_hooks for layer in layers.children())


def test_a_later_adapter_changes_no_bit_of_an_earlier_ones_answers() -> None:
    first = tiny_adapter(layers=(1, 1))
    (group,) = groups_of((first,))
    with torch.no_grad():
        before = first.model(group.batch, group.pack).logits
        tiny_adapter(r=7, targets=("up_proj", "q_proj", "lm_head"), seed=8, beside=first)
        assert torch.equal(first.model(group.batch, group.pack).logits, before)


def test_what_cannot_share_a_forward_is_refused() -> None:
    one, other = tiny_adapter(), tiny_adapter(seed=1)
    (a,), (b,) = groups_of((one,)), groups_of((other,))
    with pytest.raises(ConfigError, match="one base model in memory"):
        forward_together([a, b])
    fewer = PackedRows(one.model, a.pack.narrow(0, 2), a.batch)
    with pytest.raises(ConfigError, match="equal num_samples"):
        forward_together([a, fewer])
    with torch.no_grad():
        forward_together([a])  # the failed ones left nothing bound and no turn taken


@pytest.mark.parametrize(
    ("spec", "tokens", "said"),
    [
        (TargetSpec("lm_head", 32, 4, None), (3, 4, 5), "has 3 label rows of width 32, the"),
        (TargetSpec("lm_head", 31, 3, None), (3, 4, 5), "lm_head has 3 of width 31"),
        (TargetSpec("lm_head", 32, 2, None), (3, 480), r"lie in 0\.\.479 for this.*got 3 to 480"),
        (TargetSpec("lm_head", 32, 2, None), (-1, 3), "got -1 to 3"),
    ],
)
def test_labels_that_do_not_fit_the_base_are_refused(
    spec: TargetSpec, tokens: tuple[int, ...], said: str
) -> None:
    labels = LabelSet(tuple("ABC"[: len(tokens)]), tokens)
    with pytest.raises(BaseModelError, match=said):
        LabelModel(Trunk(tiny_model()), (spec,), labels)


# --- scoring --------------------------------------------------------------------------------


def to_score(tinies: Sequence[TinyAdapter], samples: int = M) -> list[RowsToScore]:
    return [
        RowsToScore(
            tiny.model,
            gated_pack(tiny.state, gates_of(tiny, samples)),
            random_rows(lengths, num_labels=tiny.model.num_labels, seed=n),
        )
        for n, (tiny, lengths) in enumerate(zip(tinies, LENGTHS, strict=False))
    ]


@pytest.mark.parametrize("limit", [1, 20, 60, 10_000])
def test_scores_of_mixed_chunks_are_those_of_each_adapter_alone(limit: int) -> None:
    groups = to_score(family_of("llama"))
    seen: list[int] = []
    found = score_together(
        groups, max_padded_tokens=limit, label_mass=True, on_progress=seen.append
    )
    assert sum(seen) == sum(len(lengths) for lengths in LENGTHS)
    for group, prediction in zip(groups, found, strict=True):
        (alone,) = score_together([group], max_padded_tokens=10_000, label_mass=True)
        assert_near(prediction.log_probs, alone.log_probs)
        assert prediction.label_mass is not None
        assert alone.label_mass is not None
        assert_near(prediction.label_mass, alone.label_mass)
        assert prediction.answered_rows == list(range(len(group.rows)))
        assert prediction.of_answered() is prediction


class Passes:
    """Counts the forward passes of a decoder."""

    def __init__(self, tiny: TinyAdapter) -> None:
        self.count = 0
        self._hook = tiny.model.decoder.register_forward_hook(self._seen)

    def _seen(self, _module: nn.Module, _args: object, _out: object) -> None:
        self.count += 1

    def __enter__(self) -> "Passes":
        return self

    def __exit__(self, *_: object) -> None:
        self._hook.remove()


def test_a_row_that_nobody_wants_is_not_computed() -> None:
    tinies = family_of("llama")[:3]
    groups = to_score(tinies)
    places = list(accumulate((len(g.rows) for g in groups), initial=0))
    gone = {places[0] + 1, places[1], places[2] + 2}
    with Passes(tinies[0]) as passes:
        found = score_together(
            groups, max_padded_tokens=1, label_mass=True, wanted=lambda n: n not in gone
        )
    assert passes.count == (6 - len(gone)) * M  # at this limit each row and sample is a pass
    for g, (group, prediction) in enumerate(zip(groups, found, strict=True)):
        (alone,) = score_together([group], max_padded_tokens=10_000, label_mass=True)
        answered = [i for i in range(len(group.rows)) if places[g] + i not in gone]
        assert prediction.answered_rows == answered
        kept = prediction.of_answered()
        assert_near(kept.log_probs, alone.log_probs[:, answered])
        assert kept.label_mass is not None
        assert alone.label_mass is not None
        assert_near(kept.label_mass, alone.label_mass[answered])
        left_out = [i for i in range(len(group.rows)) if i not in answered]
        assert prediction.log_probs[:, left_out].isnan().all()
        assert prediction.label_mass is not None
        assert prediction.label_mass[left_out].isnan().all()


def test_a_row_that_is_given_up_midway_costs_no_further_pass() -> None:
    tiny = tiny_adapter()
    groups = to_score((tiny,), samples=5)
    groups = [RowsToScore(groups[0].model, groups[0].pack, groups[0].rows[:1])]
    asked: list[int] = []

    def wanted(place: int) -> bool:
        asked.append(place)
        return len(asked) <= 2

    with Passes(tiny) as passes:
        (found,) = score_together(groups, max_padded_tokens=1, wanted=wanted)
    assert (passes.count, asked) == (2, [0, 0, 0])
    assert found.answered_rows == []
    assert found.log_probs.isnan().all()
    assert found.of_answered().log_probs.shape == (5, 0, 5)


def test_joined_predictions_remember_what_was_answered() -> None:
    log_probs = torch.zeros(2, 1, 3)
    one = Prediction(log_probs, None, torch.tensor([False]))
    both = joined([Prediction(log_probs, None), one])
    assert both.answered_rows == [0]
    assert Prediction(log_probs, None).answered_rows == [0]


def test_a_wrong_number_of_labels_is_refused() -> None:
    (group,) = to_score((tiny_adapter(),))
    with pytest.raises(ConfigError, match="num_labels must be the model's 5, got 6"):
        score_rows(group.model, group.pack, group.rows, num_labels=6, max_padded_tokens=100)


def test_adapters_come_while_others_answer() -> None:
    """A thread adds adapters on every module; running answers stay as they were, bit for bit."""
    first = tiny_adapter(layers=(1, 1))
    (group,) = to_score((first,))
    (before,) = score_together([group], max_padded_tokens=10_000)
    targets = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    errors: list[BaseException] = []

    def add() -> None:
        try:
            for n in range(14):
                added = tiny_adapter(
                    targets=(targets[n % 7],), layers=(n // 7, n // 7), seed=n, beside=first
                )
                (other,) = to_score((added,))
                score_together([other], max_padded_tokens=10_000)
        except BaseException as error:  # noqa: BLE001  shown by the test
            errors.append(error)

    thread = threading.Thread(target=add)
    thread.start()
    answered, deadline_s = 0, time.monotonic() + 60
    while (thread.is_alive() and time.monotonic() < deadline_s) or answered < 3:
        (found,) = score_together([group], max_padded_tokens=10_000)
        assert torch.equal(found.log_probs, before.log_probs)
        answered += 1
    thread.join(60)
    assert not thread.is_alive()
    assert errors == []


def test_a_pack_of_nothing_is_the_base_model_in_company_too() -> None:
    tiny = tiny_adapter()
    (a,) = groups_of((tiny,))
    bare = PackedRows(tiny.model, SamplePack(M, 2.0, {}), a.batch)
    with torch.no_grad():
        _, out = forward_together([a, bare])
        rows = random_rows(LENGTHS[0], seed=0)
        for b, row in enumerate(rows):
            full = tiny.base(input_ids=torch.tensor([row.token_ids])).logits[0, -1]
            for m in range(M):
                assert_near(out.logits[m, b], full[list(LABEL_TOKENS[:5])])
