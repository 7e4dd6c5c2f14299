"""dalorra_core.calibration.labelled_rows and score_cache: what is refused, and by which words."""

from pathlib import Path
from typing import Any

import pytest
import torch

from dalorra_core.artifact.manifest import LabelsRef
from dalorra_core.calibration.labelled_rows import RowSource, content_digest, read_labelled_rows
from dalorra_core.calibration.score_cache import read_scores, write_scores
from dalorra_core.errors import ConfigError, DataError
from dalorra_core.predictive.scoring import Prediction
from tests.support.tiny_models import write_jsonl

LABELS = LabelsRef(labels=("a", "b"), token_ids=(1, 2), out_of_scope_label="oos")


def row(name: str, text: str, label: str) -> dict[str, Any]:
    return {"id": name, "text": text, "label": label}


@pytest.fixture
def files(tmp_path: Path) -> Path:
    rows = [row("1", "x", "a"), row("2", "y", "b")]
    write_jsonl(tmp_path / "validation.jsonl", rows)
    write_jsonl(tmp_path / "train.jsonl", [row("3", "z", "a"), row("4", "w", "oos")])
    return tmp_path


def test_all_of_one_source_and_the_out_of_scope_rows_of_another(files: Path) -> None:
    sources = [
        RowSource(str(files), "validation"),
        RowSource(str(files / "train.jsonl"), "", only_out_of_scope=True),
    ]
    found = read_labelled_rows(sources, LABELS)
    assert [example.id for example in found] == ["1", "2", "4"]
    assert content_digest(found) == content_digest(found[::-1])
    assert content_digest(found) != content_digest(found[:2])


def refused(files: Path, rows: list[dict[str, Any]], match: str, **options: bool) -> None:
    path = write_jsonl(files / "more.jsonl", rows)
    sources = [RowSource(str(files), "validation"), RowSource(str(path), "")]
    with pytest.raises(DataError, match=match):
        read_labelled_rows(sources, LABELS, **options)


def test_an_id_may_be_used_once(files: Path) -> None:
    refused(files, [row("2", "new", "a")], r"row id '2' is in .* and in .*more\.jsonl")


def test_a_question_may_be_asked_once(files: Path) -> None:
    refused(files, [row("7", "x", "b")], "rows '1' .* and '7' .* ask the same question; 1 rows")


def test_an_unknown_label_is_named(files: Path) -> None:
    refused(
        files,
        [row("7", "q", "odd")],
        "more.jsonl, row '7': field label: 'odd' is none of the adapter's 2 labels nor its "
        r"out-of-scope label 'oos' \(1 such rows\)",
    )


def test_a_missing_label_is_named_unless_that_is_allowed(files: Path) -> None:
    path = write_jsonl(files / "one.jsonl", [row("1", "x", "a")])
    source = [RowSource(str(path), "")]
    with pytest.raises(DataError, match="1 of the adapter's 2 labels have no calibration row: b"):
        read_labelled_rows(source, LABELS)
    assert len(read_labelled_rows(source, LABELS, allow_missing_labels=True)) == 1


def test_out_of_scope_rows_need_a_label_and_rows(files: Path) -> None:
    wanted = [RowSource(str(files), "validation", only_out_of_scope=True)]
    with pytest.raises(DataError, match="has no row with the label 'oos'"):
        read_labelled_rows(wanted, LABELS)
    without = LABELS.model_copy(update={"out_of_scope_label": None})
    with pytest.raises(ConfigError, match=r"trained without data\.out_of_scope_label"):
        read_labelled_rows(wanted, without)


@pytest.mark.parametrize("mass", [None, torch.rand(3)])
def test_stored_answers_come_back(tmp_path: Path, mass: torch.Tensor | None) -> None:
    prediction = Prediction(torch.randn(2, 3, 4).log_softmax(-1), mass)
    path = tmp_path / "deep" / "answers"
    write_scores(path, prediction, {"rows": "r", "dtype": "float32"})
    found = read_scores(path, {"rows": "r", "dtype": "float32"})
    assert torch.equal(found.log_probs, prediction.log_probs)
    assert (found.label_mass is None) == (mass is None)
    assert mass is None or torch.equal(found.label_mass, mass)  # type: ignore[arg-type]
    assert [p.name for p in path.parent.iterdir()] == ["answers"]
    with pytest.raises(ConfigError, match="made with dtype float32, now it is bfloat16"):
        read_scores(path, {"rows": "r", "dtype": "bfloat16"})


def test_a_file_of_something_else_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "answers"
    path.write_bytes(b"no tensors")
    with pytest.raises(ConfigError, match="answers cannot be read"):
        read_scores(path, {})
    with pytest.raises(ConfigError, match="cannot be read"):
        read_scores(tmp_path, {})
