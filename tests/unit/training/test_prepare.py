"""dalorra_core.training.prepare: every row is checked, by file, line and field, before training."""

from pathlib import Path
from typing import Any

import pytest

from dalorra_core.config import DataConfig
from dalorra_core.errors import DataError
from dalorra_core.training import prepare
from dalorra_core.training.prepare import prepare_training_data
from tests.support.tiny_models import write_jsonl
from tests.support.tiny_tokenizer import tiny_tokenizer

ROWS: list[dict[str, Any]] = [
    {"id": "1", "text": "transfer", "label": "money"},
    {"id": "2", "text": "flight", "label": "travel"},
    {"id": "3", "text": "weather", "label": "oos"},
]


def config_of(folder: Path, **changes: Any) -> DataConfig:
    values = {"source": str(folder), "out_of_scope_label": "oos", **changes}
    return DataConfig.model_validate(values)


def write(folder: Path, train: list[dict[str, Any]], validation: list[dict[str, Any]]) -> Path:
    write_jsonl(folder / "train.jsonl", train)
    write_jsonl(folder / "validation.jsonl", validation)
    return folder


def test_out_of_scope_rows_are_never_trained_on_and_test_rejection(tmp_path: Path) -> None:
    data = prepare_training_data(config_of(write(tmp_path, ROWS, ROWS)), tiny_tokenizer())
    assert data.label_set.labels == ("money", "travel")
    assert [(row.id, row.label) for row in data.train] == [("1", 0), ("2", 1)]
    assert [(row.id, row.label) for row in data.validation] == [("1", 0), ("2", 1), ("3", -1)]
    assert [example.id for example in data.examples] == ["1", "2"]
    assert tiny_tokenizer().decode(list(data.train[0].token_ids)) == "transfer\nIntent:"


def test_without_an_out_of_scope_label_it_is_a_label_like_any_other(tmp_path: Path) -> None:
    config = config_of(write(tmp_path, ROWS, ROWS), out_of_scope_label=None)
    data = prepare_training_data(config, tiny_tokenizer())
    assert data.label_set.labels == ("money", "oos", "travel")


def test_no_validation_split_is_no_validation(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train.jsonl", ROWS)
    config = config_of(tmp_path, validation_split=None, prompt="{text} =>")
    data = prepare_training_data(config, tiny_tokenizer())
    assert data.validation == []
    assert tiny_tokenizer().decode(list(data.train[0].token_ids)) == "transfer =>"


def test_a_file_can_be_the_source(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", ROWS)
    data = prepare_training_data(config_of(path, validation_split=None), tiny_tokenizer())
    assert len(data.train) == 2


def test_a_label_only_validation_knows_is_refused(tmp_path: Path) -> None:
    unknown = [*ROWS, {"id": "4", "text": "order", "label": "food"}]
    with pytest.raises(DataError, match=r"validation\.jsonl, line 4: field label:.*'food'"):
        prepare_training_data(config_of(write(tmp_path, ROWS, unknown)), tiny_tokenizer())


@pytest.mark.parametrize("split", ["train", "validation"])
def test_a_prompt_that_is_too_long_is_refused(tmp_path: Path, split: str) -> None:
    long = [*ROWS, {"id": "4", "text": "transfer " * 30, "label": "money"}]
    folder = write(tmp_path, *((long, ROWS) if split == "train" else (ROWS, long)))
    with pytest.raises(DataError, match=rf"{split}\.jsonl, line 4: field text: .*limit is 20"):
        prepare_training_data(config_of(folder, max_tokens=20), tiny_tokenizer())
    cut = prepare_training_data(
        config_of(folder, max_tokens=20, truncate="start"), tiny_tokenizer()
    )
    assert max(len(row.token_ids) for row in [*cut.train, *cut.validation]) == 20


def test_a_blank_line_or_a_byte_order_mark_does_not_move_the_line(tmp_path: Path) -> None:
    write(tmp_path, ROWS, [])
    text = (tmp_path / "train.jsonl").read_text("utf-8").splitlines()
    long = '{"id": "4", "text": "' + "transfer " * 30 + '", "label": "money"}'
    (tmp_path / "train.jsonl").write_text("\ufeff" + "\n\n".join([*text, long]), "utf-8")
    config = config_of(tmp_path, max_tokens=20, validation_split=None)
    with pytest.raises(DataError, match=r"train\.jsonl, line 7: field text"):
        prepare_training_data(config, tiny_tokenizer())


def test_only_out_of_scope_rows_are_nothing_to_train_on(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"train\.jsonl: no in-scope row to train on"):
        prepare_training_data(config_of(write(tmp_path, ROWS[2:], ROWS)), tiny_tokenizer())


def test_more_labels_than_tokens_are_refused_with_the_file(tmp_path: Path) -> None:
    rows = [{"id": str(i), "text": "x", "label": f"label {i}"} for i in range(500)]
    with pytest.raises(
        DataError, match=r"train\.jsonl: field label: label 'label \d+' has no token"
    ):
        prepare_training_data(config_of(write(tmp_path, rows, ROWS)), tiny_tokenizer())


def test_a_row_that_cannot_be_found_again_is_named_by_its_id(tmp_path: Path) -> None:
    """Rows of a hub dataset have no line."""
    config = config_of(tmp_path, source="hub:name")
    assert prepare._place(config, "train", "7") == "hub:name split train, row '7'"
    path = write_jsonl(tmp_path / "rows.jsonl", ROWS)
    assert prepare._place(config_of(path), "train", "none") == f"{path}, row 'none'"
