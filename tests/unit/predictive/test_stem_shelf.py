"""dalorra_core.predictive.stem_shelf: the same states for every run that meets a set of rows."""

from pathlib import Path

import pytest
import torch

from dalorra_core.predictive import stem_shelf
from dalorra_core.predictive.scoring import score_rows
from dalorra_core.predictive.stem import kept_stem_states
from dalorra_core.predictive.stem_shelf import MIN_ROWS, StemShelf
from tests.support.tiny_models import assert_near, gated_pack, random_rows, tiny_adapter

LENGTHS = [3 + i % 7 for i in range(MIN_ROWS + 5)]


def test_answers_from_kept_states_are_the_answers(tmp_path: Path) -> None:
    tiny = tiny_adapter(layers=(1, 1))
    rows = random_rows(LENGTHS)
    pack = gated_pack(
        tiny.state,
        torch.rand(4, len(tiny.state.specs), 3, generator=torch.Generator().manual_seed(1)),
    )
    shelf = StemShelf(tmp_path / "stems", "sha256:a")

    def log_probs(stems: object) -> torch.Tensor:
        return score_rows(
            tiny.model,
            pack,
            rows,
            num_labels=5,
            max_padded_tokens=100,
            stems=stems,  # pyright: ignore
        ).log_probs

    assert_near(log_probs(shelf.of(tiny.model, rows)), log_probs(None))


def test_another_process_finds_the_very_same_states(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny, rows = tiny_adapter(layers=(1, 1)), random_rows(LENGTHS)
    first = StemShelf(tmp_path, "sha256:a").of(tiny.model, rows)
    monkeypatch.setattr(stem_shelf, "stem_states", None)  # nothing is computed
    again = StemShelf(tmp_path, "sha256:a").of(tiny.model, rows)
    assert first is not None
    assert again is not None
    places = range(len(rows))
    assert torch.equal(first.of(places), again.of(places))
    assert torch.equal(first.pick([5, 2]).of([0, 1]), first.of([5, 2]))


def test_a_cut_file_is_made_again(tmp_path: Path) -> None:
    tiny, rows = tiny_adapter(layers=(1, 1)), random_rows(LENGTHS)
    first = StemShelf(tmp_path, "sha256:a").of(tiny.model, rows)
    (file,) = tmp_path.glob("*.safetensors")
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    again = StemShelf(tmp_path, "sha256:a").of(tiny.model, rows)
    assert first is not None
    assert again is not None
    assert torch.equal(first.flat, again.flat)
    assert file.read_bytes() == whole


def test_what_decides_the_states_decides_the_file(tmp_path: Path) -> None:
    rows = random_rows(LENGTHS)
    for fingerprint, model, own in (
        ("sha256:a", tiny_adapter(layers=(1, 1)), rows),
        ("sha256:b", tiny_adapter(layers=(1, 1)), rows),
        ("sha256:a", tiny_adapter(layers=(1, 2), num_hidden_layers=3), rows),
        ("sha256:a", tiny_adapter(layers=(2, 2), num_hidden_layers=3), rows),
        ("sha256:a", tiny_adapter(layers=(1, 1)), rows[1:]),
    ):
        assert StemShelf(tmp_path, fingerprint).of(model.model, own) is not None
    assert (
        len(list(tmp_path.glob("*.safetensors"))) == 4
    )  # the third is the first's, as far as names go


def test_states_may_be_trained_on_though_scoring_asked_first(tmp_path: Path) -> None:
    tiny, rows = tiny_adapter(layers=(1, 1)), random_rows(LENGTHS)
    with torch.inference_mode():
        found = StemShelf(tmp_path, "sha256:a").of(tiny.model, rows)
    assert found is not None
    weight = torch.ones(32, requires_grad=True)
    (found.of([0, 1]) * weight).sum().backward()
    assert weight.grad is not None


def test_nothing_is_kept_where_nothing_is_gained(tmp_path: Path) -> None:
    rows = random_rows(LENGTHS)
    whole = tiny_adapter()  # layer 0 is adapted
    assert StemShelf(tmp_path, "sha256:a").of(whole.model, rows) is None
    late = tiny_adapter(layers=(1, 1))
    assert StemShelf(tmp_path, "sha256:a").of(late.model, rows[: MIN_ROWS - 1]) is None
    assert kept_stem_states(late.model, rows) is None  # no shelf was set up
    assert not list(tmp_path.glob("*.safetensors"))


def test_the_sets_used_last_stay_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    two_sets = 2 * sum(LENGTHS) * 32 * 4  # tokens, width, bytes of a float
    monkeypatch.setattr(stem_shelf, "MAX_BYTES", two_sets)
    tiny, shelf = tiny_adapter(layers=(1, 1)), StemShelf(tmp_path, "sha256:a")
    sets = [random_rows(LENGTHS, seed=seed) for seed in range(3)]
    found = [shelf.of(tiny.model, rows) for rows in sets]
    assert shelf.of(tiny.model, sets[2]) is found[2]
    assert shelf.of(tiny.model, sets[0]) is not found[0]


def test_a_full_disk_costs_the_file_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(path: Path, content: bytes) -> None:  # noqa: ARG001
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(stem_shelf, "place_file", full)
    tiny, rows = tiny_adapter(layers=(1, 1)), random_rows(LENGTHS)
    assert StemShelf(tmp_path, "sha256:a").of(tiny.model, rows) is not None
    assert "No space left on device" in caplog.text
