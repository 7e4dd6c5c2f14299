"""dalorra_core.predictive.scoring: cutting rows into forward passes."""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch

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
    layers: dict[str, Any] = {"num_hidden_layers": 4}
    if family == "gemma3":  # windows of 4, above the first adapted layer too
        layers["layer_types"] = ["sliding_attention", "full_attention"] * 2
    tiny = tiny_adapter(family, layers=(first, 3), **layers)
    assert tiny.model.fold_layer == first
    group = group_of(tiny)
    (whole,) = score_together([group], max_padded_tokens=10_000, label_mass=True)
    for limit in (1, 9, 24):
        (found,) = score_together([group], max_padded_tokens=limit, label_mass=True)
        assert_near(found.log_probs, whole.log_probs)
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
