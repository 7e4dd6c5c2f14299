"""dalorra_core.predictive.scoring: cutting rows into forward passes."""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from dalorra_core.adapters.pack import SamplePack
from dalorra_core.predictive.scoring import (
    RowsToScore,
    padded_token_limit,
    score_rows,
    score_together,
)
from dalorra_core.predictive.stem import stem_states
from dalorra_core.predictive.trunk import Trunk
from tests.support.tiny_models import (
    FAMILIES,
    TinyAdapter,
    assert_near,
    gated_pack,
    random_rows,
    tiny_adapter,
)


def test_progress_counts_every_row_and_mass_is_the_mean_over_samples() -> None:
    tiny, rows = tiny_adapter(), random_rows((7, 3, 11))
    z = (torch.rand(4, 5, 3, generator=torch.Generator().manual_seed(0)) > 0.5).float()
    pack, seen = gated_pack(tiny.state, z), []
    found = score_rows(
        tiny.model,
        pack,
        rows,
        num_labels=5,
        max_padded_tokens=14,
        label_mass=True,
        on_progress=seen.append,
    )
    assert (sum(seen), len(seen)) == (3, 3)
    singles = [
        score_rows(
            tiny.model,
            pack.narrow(m, m + 1),
            rows,
            num_labels=5,
            max_padded_tokens=500,
            label_mass=True,
        ).label_mass
        for m in range(4)
    ]
    assert found.label_mass is not None
    expected = torch.stack([s for s in singles if s is not None]).mean(0)
    torch.testing.assert_close(found.label_mass, expected, rtol=1e-5, atol=1e-7)
    without = score_rows(tiny.model, pack, rows, num_labels=5, max_padded_tokens=14)
    assert without.label_mass is None
    assert torch.equal(without.log_probs, found.log_probs)


@pytest.mark.parametrize(("device", "limit"), [("cpu", 512), ("cuda", 65536)])
def test_the_default_size_of_a_pass(device: str, limit: int) -> None:
    assert padded_token_limit(torch.device(device)) == limit


# --- chunks of several passes ----------------------------------------------------------------

LENGTHS = (7, 3, 11, 5)


def group_of(tiny: TinyAdapter, lengths: Sequence[int] = LENGTHS, samples: int = 5) -> RowsToScore:
    shape = (samples, len(tiny.state.specs), tiny.state.r)
    z = (torch.rand(shape, generator=torch.Generator().manual_seed(3)) > 0.5).float()
    return RowsToScore(tiny.model, gated_pack(tiny.state, z), random_rows(lengths))


def four_layers(family: str) -> dict[str, Any]:
    layers: dict[str, Any] = {"num_hidden_layers": 4}
    if family == "gemma3":  # windows of 4, above the first adapted layer too
        layers["layer_types"] = ["sliding_attention", "full_attention"] * 2
    return layers


@contextmanager
def layer_runs(tiny: TinyAdapter) -> Iterator[Counter[int]]:
    """Count how often each decoder layer runs; the last one's parts are called, not itself."""
    runs: Counter[int] = Counter()
    layers = tiny.model.decoder.get_submodule("layers")
    hooks = [
        layer.register_forward_hook(lambda *_, n=number: runs.update([n]))
        for number, layer in enumerate(layers.children())
    ]
    yield runs
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("first", [1, 2, 3])
def test_several_passes_give_what_one_gives(family: str, first: int) -> None:
    tiny = tiny_adapter(family, layers=(first, 3), **four_layers(family))
    assert tiny.model.fold_layer == first
    group = group_of(tiny)
    (whole,) = score_together([group], max_padded_tokens=10_000, label_mass=True)
    for limit in (1, 9, 24):
        (found,) = score_together([group], max_padded_tokens=limit, label_mass=True)
        # Each may be 1e-5 from the truth, and rows with and without padding round differently.
        torch.testing.assert_close(found.log_probs, whole.log_probs, rtol=2e-5, atol=2e-5)
        assert found.label_mass is not None
        assert whole.label_mass is not None
        assert_near(found.label_mass, whole.label_mass)


def test_layers_below_the_first_adapted_one_run_once_a_chunk() -> None:
    tiny = tiny_adapter(layers=(2, 3), num_hidden_layers=4)
    group = group_of(tiny)
    with layer_runs(tiny) as runs:
        score_together([group], max_padded_tokens=1)
    assert [runs[n] for n in range(3)] == [4, 4, 4 * 5]
    with layer_runs(tiny) as runs:
        score_together([group], max_padded_tokens=10_000)
    assert [runs[n] for n in range(3)] == [1, 1, 1]


def test_states_that_came_with_the_rows_are_not_computed_again() -> None:
    tiny = tiny_adapter(layers=(2, 3), num_hidden_layers=4)
    group = group_of(tiny)
    known = RowsToScore(group.model, group.pack, group.rows, stem_states(tiny.model, group.rows))
    (whole,) = score_together([group], max_padded_tokens=10_000)
    with layer_runs(tiny) as runs:
        (found,) = score_together([known], max_padded_tokens=1)
    assert [runs[n] for n in range(3)] == [0, 0, 4 * 5]
    assert_near(found.log_probs, whole.log_probs)


def test_a_model_that_cannot_begin_in_its_middle_runs_from_its_start(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tiny = tiny_adapter(layers=(1, 1))
    (whole,) = score_together([group_of(tiny)], max_padded_tokens=10_000)
    monkeypatch.setattr(Trunk, "begins_at", lambda *_: False)
    tiny = tiny_adapter(layers=(1, 1))
    group = group_of(tiny)
    with layer_runs(tiny) as runs:
        (found,) = score_together([group], max_padded_tokens=1)
    assert runs[0] == 4 * 5
    assert_near(found.log_probs, whole.log_probs)


def test_rows_given_up_between_passes_cost_no_further_one() -> None:
    tiny = tiny_adapter(layers=(1, 1))
    group, asked = group_of(tiny, (7,)), []

    def wanted(place: int) -> bool:
        asked.append(place)
        return len(asked) <= 2

    ran = []
    hook = tiny.model.decoder.register_forward_hook(lambda *_: ran.append(1))
    (found,) = score_together([group], max_padded_tokens=1, wanted=wanted)
    hook.remove()
    assert (len(ran), asked) == (2, [0, 0, 0])
    assert found.answered_rows == []
    assert found.log_probs.isnan().all()


# --- layers that all samples share ------------------------------------------------------------


def shared_below(tiny: TinyAdapter, layer: int | None, samples: int = 5) -> SamplePack:
    """Return samples whose gates below a layer are those of the first; None: below the head."""
    shape = (samples, len(tiny.state.specs), tiny.state.r)
    z = (torch.rand(shape, generator=torch.Generator().manual_seed(3)) > 0.5).float()
    for place, spec in enumerate(tiny.state.specs):
        if spec.layer is not None and (layer is None or spec.layer < layer):
            z[:, place] = z[:1, place]
    return gated_pack(tiny.state, z)


@contextmanager
def rows_of_layers(tiny: TinyAdapter) -> Iterator[dict[int, list[int]]]:
    """Note how many rows each decoder layer but the last gets, run by run, padded as they are."""
    before = tiny.model.trunk.unpads
    tiny.model.trunk.__dict__["unpads"] = False  # without padding rows cannot be told apart
    seen: dict[int, list[int]] = {}
    layers = list(tiny.model.decoder.get_submodule("layers").children())

    def note(number: int, rows: int) -> None:
        seen.setdefault(number, []).append(rows)

    hooks = [
        layer.register_forward_hook(lambda _, args, __, n=number: note(n, len(args[0])))
        for number, layer in enumerate(layers[:-1])
    ]
    yield seen
    tiny.model.trunk.__dict__["unpads"] = before
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("first", [None, 1, 2, 3])
@pytest.mark.parametrize("adapted", [(0, 3), (1, 3)])
def test_layers_that_all_samples_share_see_each_row_once(
    family: str, first: int | None, adapted: tuple[int, int]
) -> None:
    tiny = tiny_adapter(family, layers=adapted, **four_layers(family))
    rows, pack = random_rows(LENGTHS), shared_below(tiny, first)
    begins = max(first if first is not None else 3, adapted[0])
    (whole,) = score_together([RowsToScore(tiny.model, pack, rows)], max_padded_tokens=10_000)
    group = RowsToScore(tiny.model, pack.condensed(), rows)
    score_together([group], max_padded_tokens=10_000)  # tries once whether it can begin there
    for limit in (10_000, 24, 1):
        with rows_of_layers(tiny) as seen:
            (found,) = score_together([group], max_padded_tokens=limit)
        assert_near(found.log_probs, whole.log_probs)
        for number in range(3):
            times = 5 if number >= begins else 1
            assert sum(seen[number]) == times * len(rows)


def test_what_all_samples_share_runs_once_for_as_many_rows_as_fit_into_a_pass() -> None:
    tiny = tiny_adapter(layers=(0, 3), num_hidden_layers=4)
    group = RowsToScore(tiny.model, shared_below(tiny, 2).condensed(), random_rows((7, 3, 6, 7, 7)))
    (whole,) = score_together([group], max_padded_tokens=10_000)
    with rows_of_layers(tiny) as seen:
        (found,) = score_together([group], max_padded_tokens=30)
    assert seen == {0: [4, 1], 1: [4, 1], 2: [5, 5, *(3, 2) * 3]}
    assert_near(found.log_probs, whole.log_probs)


def test_rows_given_up_after_the_shared_layers_go_no_further() -> None:
    tiny = tiny_adapter(layers=(0, 3), num_hidden_layers=4)
    group = RowsToScore(tiny.model, shared_below(tiny, 2).condensed(), random_rows((7, 7, 7, 7)))
    (whole,) = score_together([group], max_padded_tokens=10_000)
    asked: Counter[int] = Counter()

    def wanted(place: int) -> bool:
        asked[place] += 1
        return place not in {1, 2} or (place == 2 and asked[2] == 1)

    with rows_of_layers(tiny) as seen:
        (found,) = score_together([group], max_padded_tokens=5 * 7, wanted=wanted)
    assert seen == {
        0: [3],
        1: [3],
        2: [5, 5],
    }  # one never began, one went half way
    assert asked == {0: 1, 1: 1, 2: 2, 3: 2}
    assert found.answered_rows == [0, 3]
    assert_near(found.log_probs[:, [0, 3]], whole.log_probs[:, [0, 3]])


def test_states_that_came_with_the_rows_go_on_through_shared_layers() -> None:
    tiny = tiny_adapter(layers=(1, 3), num_hidden_layers=4)
    rows, pack = random_rows(LENGTHS), shared_below(tiny, 2)
    (whole,) = score_together([RowsToScore(tiny.model, pack, rows)], max_padded_tokens=10_000)
    stems = stem_states(tiny.model, rows)
    known = RowsToScore(tiny.model, pack.condensed(), rows, stems)
    score_together([known], max_padded_tokens=10_000)  # tries once whether it can begin there
    for limit in (10_000, 1):
        with rows_of_layers(tiny) as seen:
            (found,) = score_together([known], max_padded_tokens=limit)
        assert_near(found.log_probs, whole.log_probs)
        assert (0 in seen, sum(seen[1]), sum(seen[2])) == (False, len(rows), 5 * len(rows))


@pytest.mark.parametrize("limit", [10_000, 30, 1])
def test_adapters_that_share_different_layers_answer_together(limit: int) -> None:
    first = tiny_adapter(layers=(1, 3), num_hidden_layers=4)
    second = tiny_adapter(layers=(0, 3), num_labels=3, seed=5, beside=first)
    alone, together = [], []
    for tiny, below, lengths in ((first, 3, (7, 3)), (second, 2, (4, 6, 7))):
        rows = random_rows(lengths, num_labels=len(tiny.label_set.labels))
        pack = shared_below(tiny, below)
        alone += score_together([RowsToScore(tiny.model, pack, rows)], max_padded_tokens=10_000)
        together.append(RowsToScore(tiny.model, pack.condensed(), rows))
    score_together(together, max_padded_tokens=10_000)  # tries once whether it can begin there
    with rows_of_layers(first) as seen:
        found = score_together(together, max_padded_tokens=limit)
    for one, expected in zip(found, alone, strict=True):
        assert_near(one.log_probs, expected.log_probs)
    if limit == 30:  # 3 + 4 + 6 + 7 tokens padded to 4 x 7, and the other row of 7
        assert seen[0] == [4, 1]
