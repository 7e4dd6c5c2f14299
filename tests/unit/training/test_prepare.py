"""dalorra_core.training.prepare: every row is checked, by file, line and field, before training."""

from pathlib import Path
from typing import Any

import pytest

from dalorra_core.config import DataConfig
from dalorra_core.data.labels import LabelSet
from dalorra_core.errors import ConfigError, DataError
from dalorra_core.training.prepare import evaluation_rows, prepare_training_data
from dalorra_core.training.sources import place_of
from tests.support.tiny_data_sets import tiny_data_root
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
    assert place_of(config, "train", "7") == "hub:name split train, row '7'"
    path = write_jsonl(tmp_path / "rows.jsonl", ROWS)
    assert place_of(config_of(path), "train", "none") == f"{path}, row 'none'"


# --- tasks ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_data_root(tmp_path_factory.mktemp("data"))


def task_config(root: Path, task: str, **changes: Any) -> DataConfig:
    return DataConfig.model_validate({"source": f"task:{task}", "root": str(root), **changes})


def shown(row: Any) -> str:
    return str(tiny_tokenizer().decode(list(row.token_ids)))


def test_a_task_is_trained_on_and_tuned_on_rows_that_are_not_reported(root: Path) -> None:
    config = task_config(root, "sst2", train_rows=10)
    data = prepare_training_data(config, tiny_tokenizer())
    assert data.label_set.labels == ("negative", "positive")
    assert len(data.train) == 10
    assert (len(data.validation), data.validation_name) == (8, "held-out")
    assert shown(data.train[0]).endswith("\nSentiment:")
    reported = evaluation_rows(config, tiny_tokenizer(), data.label_set)
    assert len(reported) == 10
    assert all(row.label >= 0 for row in reported)
    used = {row.token_ids for row in (*data.train, *data.validation)}
    assert not used & {row.token_ids for row in reported}


def test_texts_of_another_task_are_never_right(root: Path) -> None:
    """All of clinc150 has the labels of the domain too: of another task they still say nothing."""
    config = task_config(root, "clinc150_banking", per_class=3)
    labels = prepare_training_data(config, tiny_tokenizer()).label_set
    own = evaluation_rows(config, tiny_tokenizer(), labels)
    assert {row.label for row in own} == {0, 1}
    for other, size in (("clinc150", 8), ("clinc150_oos", 2), ("trec", 10)):
        rows = evaluation_rows(config, tiny_tokenizer(), labels, of=other)
        assert [row.label for row in rows] == [-1] * size
        assert all(shown(row).endswith("\nIntent:") for row in rows)


@pytest.mark.parametrize("softmax", ["own_choices", "union"])
def test_an_openbookqa_adapter_answers_arc_over_five_letters(root: Path, softmax: str) -> None:
    config = task_config(root, "openbookqa", softmax=softmax)
    data = prepare_training_data(config, tiny_tokenizer())
    assert data.label_set.labels == ("A", "B", "C", "D", "E")
    assert data.union == (() if softmax == "own_choices" else ("A", "B", "C", "D"))
    for row in (*data.train, *data.validation):
        assert row.allowed == (0, 1, 2, 3)  # E is never trained
    arc = evaluation_rows(config, tiny_tokenizer(), data.label_set, of="arc_challenge")
    if softmax == "union":
        assert {row.allowed for row in arc} == {None}
    else:
        assert [row.allowed for row in arc[:3]] == [(0, 1, 2, 3), (0, 1, 2), (0, 1, 2, 3, 4)]
    assert {row.label for row in arc} == {0, 1, 2, 3}


def test_the_union_is_that_of_the_rows_of_a_directory(tmp_path: Path) -> None:
    rows = [
        {
            "id": str(i),
            "question": f"which {i}",
            "choices": [{"label": c, "text": "x"} for c in letters],
            "answer": "A",
        }
        for i, letters in enumerate(("AB", "ABC", "AC"))
    ]
    write(tmp_path, rows, rows)
    data = prepare_training_data(config_of(tmp_path, softmax="union"), tiny_tokenizer())
    assert data.union == ("A", "B", "C")
    assert [row.allowed for row in data.train] == [None, None, None]
    alone = prepare_training_data(config_of(tmp_path), tiny_tokenizer())
    assert [row.allowed for row in alone.train] == [(0, 1), (0, 1, 2), (0, 2)]
    assert alone.union == ()


def test_texts_have_all_labels_in_any_case(tmp_path: Path) -> None:
    config = config_of(write(tmp_path, ROWS, ROWS), softmax="union")
    assert prepare_training_data(config, tiny_tokenizer()).union == ()


def test_the_tokens_of_true_and_false_can_be_those_of_published_code(root: Path) -> None:
    def tokens(**changes: Any) -> list[str]:
        config = task_config(root, "boolq", **changes)
        label_set = prepare_training_data(config, tiny_tokenizer()).label_set
        assert label_set.labels == ("True", "False")
        return [str(tiny_tokenizer().decode([i])) for i in label_set.token_ids]

    assert tokens() == [" True", " False"]
    assert tokens(label_tokens="bare") == ["rue", "alse"]  # the last ones
    assert tokens(boolq_label_inverted=True) == [" False", " True"]
    assert tokens(label_tokens="bare", boolq_label_inverted=True) == ["alse", "rue"]


def test_labels_without_true_and_false_cannot_be_inverted(root: Path) -> None:
    config = task_config(root, "openbookqa", boolq_label_inverted=True)
    with pytest.raises(ConfigError, match=r"boolq_label_inverted.*for the labels A, B, C, D, E"):
        prepare_training_data(config, tiny_tokenizer())


def test_a_long_passage_loses_its_beginning_and_the_question_stays(root: Path) -> None:
    config = task_config(root, "boolq", max_tokens=90, append_eos=True)
    data = prepare_training_data(config, tiny_tokenizer())
    for row in (*data.train, *data.validation):
        assert row.truncated
        assert len(row.token_ids) <= 90
        assert shown(row).endswith("Answer (True or False):<|end|>")
        assert "Question: train which is word" in shown(row)
    refused = task_config(root, "boolq", max_tokens=90, truncate="none")
    with pytest.raises(DataError, match=r"task:boolq split train, row 'boolq-train-0': field text"):
        prepare_training_data(refused, tiny_tokenizer())


def test_every_question_is_asked_in_the_words_of_its_own_data_set(root: Path) -> None:
    config = task_config(root, "openbookqa", prompt="rl_compat")
    data = prepare_training_data(config, tiny_tokenizer())
    assert "\nChioces:\nthe a" in shown(data.train[0])
    arc = evaluation_rows(config, tiny_tokenizer(), data.label_set, of="arc_challenge")
    assert "\nChoices:\nthe a" in shown(arc[0])


def test_what_cannot_be_evaluated_says_why(root: Path) -> None:
    labels = LabelSet(("A", "B"), (5, 6))
    with pytest.raises(ConfigError, match=r"must name a task.*got 'rows'"):
        evaluation_rows(DataConfig(source="rows"), tiny_tokenizer(), labels)
    with pytest.raises(ConfigError, match=r"'openbookqa' \(choice\).*got 'sst2' \(text\)"):
        evaluation_rows(task_config(root, "openbookqa"), tiny_tokenizer(), labels, of="sst2")
    with pytest.raises(DataError, match=r"task:boolq split evaluation, row 'openbookqa-vali"):
        evaluation_rows(task_config(root, "boolq"), tiny_tokenizer(), labels, of="openbookqa")
