"""dalorra_core.data.tasks and task_registry: which rows a task has, and that none leaks."""

from functools import cache
from pathlib import Path
from typing import Any

import pytest

from dalorra_core.config import DataConfig
from dalorra_core.data.examples import TextExample, gold_label
from dalorra_core.data.prompts import prompt_template, render
from dalorra_core.data.readers import read_source
from dalorra_core.data.tasks import (
    TASKS,
    TaskData,
    evaluation_examples,
    find_task,
    load_task,
    task_labels,
    task_of,
    task_prompt,
    training_examples,
)
from dalorra_core.errors import ConfigError, DataError
from tests.support.tiny_data_sets import SHARED_DATA, needs_shared_data, tiny_data_root
from tests.support.tiny_models import write_jsonl


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_data_root(tmp_path_factory.mktemp("data"))


@cache
def published(name: str) -> TaskData:
    """Return a task of the shared data; some take many seconds to read."""
    return load_task(name, SHARED_DATA)


def ids(rows: Any) -> set[str]:
    return {row.id for row in rows}


# --- rows -----------------------------------------------------------------------------------


def test_rows_are_held_out_of_the_training_rows_where_no_split_is_there_for_it(root: Path) -> None:
    data = load_task("openbookqa", root, held_out_share=0.3)
    everything = ids(read_source(root / "openbookqa", "train"))
    assert ids(data.train) | ids(data.held_out) == everything
    assert not ids(data.train) & ids(data.held_out)
    assert data.held_out
    assert ids(data.evaluation) == ids(read_source(root / "openbookqa", "validation"))
    assert not load_task("openbookqa", root, held_out_share=0).held_out


def test_a_split_that_is_not_reported_is_what_to_tune_on(root: Path) -> None:
    data = load_task("sst2", root, train_rows=12)
    assert ids(data.held_out) == ids(read_source(root / "sst2", "validation"))
    assert ids(data.evaluation) == ids(read_source(root / "sst2", "test"))
    assert len(data.train) == 12
    assert [gold_label(row) for row in data.train].count("positive") == 6


def test_a_subset_is_taken_from_what_is_not_held_out(root: Path) -> None:
    whole = load_task("trec", root, train_rows="all", held_out_share=0.3)
    for changes in ({"train_rows": 10}, {"per_class": 5}):
        part = load_task("trec", root, held_out_share=0.3, **changes)
        assert part.held_out == whole.held_out
        assert len(part.train) == 10
        assert ids(part.train) < ids(whole.train)
    other = load_task("trec", root, held_out_share=0.3, train_rows=10, subset_seed=1)
    assert other.held_out == whole.held_out
    assert ids(other.train) != ids(load_task("trec", root, held_out_share=0.3, train_rows=10).train)


def test_a_domain_has_its_own_labels_and_no_other_rows(root: Path) -> None:
    data = load_task("clinc150_banking", root, per_class=3)
    assert data.labels == ("balance", "transfer")
    for rows in (data.train, data.held_out, data.evaluation):
        assert {gold_label(row) for row in rows} == {"balance", "transfer"}
    assert len(data.train) == 6
    assert load_task("clinc150", root, per_class=2).labels == (
        "balance",
        "balance_abroad",
        "flight",
        "transfer",
    )


def test_the_out_of_scope_rows_are_a_task_to_evaluate_on_only(root: Path) -> None:
    data = load_task("clinc150_oos", root)
    assert (data.train, data.held_out) == ([], [])
    assert {gold_label(row) for row in data.evaluation} == {"oos"}


def test_rows_of_several_data_sets_say_where_they_come_from(root: Path) -> None:
    for folder in ("arc_easy",):
        for split in ("train", "validation"):
            rows = read_source(root / "arc_challenge", split)
            write_jsonl(root / folder / f"{split}.jsonl", [_row(example) for example in rows])
    data = load_task("aao", root, held_out_share=0)
    assert len(data.train) == len(ids(data.train)) == 20 + 20 + 40
    assert len(data.evaluation) == len(ids(data.evaluation)) == 9 + 9 + 11
    assert {row.id.partition("/")[0] for row in data.train} == {
        "arc_easy",
        "arc_challenge",
        "openbookqa",
    }
    part = load_task("aao", root, held_out_share=0.3)
    of_easy = {i.partition("/")[2] for i in ids(part.held_out) if i.startswith("arc_easy/")}
    of_challenge = {i.partition("/")[2] for i in ids(part.held_out) if "arc_challenge/" in i}
    assert of_easy == of_challenge  # the same questions: held out in both or in neither


def _row(example: Any) -> dict[str, Any]:
    choices = [{"label": c.label, "text": c.text} for c in example.choices]
    return {
        "id": example.id,
        "question": example.question,
        "choices": choices,
        "answer": example.answer,
    }


@pytest.mark.parametrize(("k", "kept"), [(None, 11), (1, 11), (4, 8), (5, 10), (11, 11)])
def test_the_last_incomplete_batch_can_be_left_out(root: Path, k: int | None, kept: int) -> None:
    whole = evaluation_examples(find_task("openbookqa"), root)
    assert evaluation_examples(find_task("openbookqa"), root, drop_last=k) == whole[:kept]


def test_leaving_out_everything_is_refused(root: Path) -> None:
    with pytest.raises(ConfigError, match=r"eval_drop_last must be at most 11.*'openbookqa'.*12"):
        load_task("openbookqa", root, eval_drop_last=12)


# --- what a task is told --------------------------------------------------------------------


def test_an_unknown_task_names_the_known_ones_and_the_closest() -> None:
    with pytest.raises(ConfigError, match=r"one of winogrande_s,.*got 'arc_chalenge'.*closest"):
        find_task("arc_chalenge")
    with pytest.raises(ConfigError, match=r"ag_news, got 'x'$"):
        find_task("x")


def test_a_missing_root_folder_or_split_is_named(root: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.root.*'sst2' needs the folder.*/nowhere'"):
        load_task("sst2", tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=r"task 'boolq' needs the folder 'boolq'"):
        load_task("boolq", tmp_path)
    write_jsonl(tmp_path / "boolq" / "train.jsonl", [])
    with pytest.raises(DataError, match="must hold at least one row"):
        load_task("boolq", tmp_path)
    with pytest.raises(ConfigError, match=r"split must be one of.*\(train\), got 'validation'"):
        evaluation_examples(find_task("boolq"), tmp_path)
    with pytest.raises(ConfigError, match=r"data\.root"):
        load_task("winogrande_s", root)


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"labels": 3}', '{"labels": ["a"], "domains": []}']
)
def test_a_label_list_that_says_nothing_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "clinc150").mkdir()
    (tmp_path / "clinc150" / "labels.json").write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=r"labels\.json must list the labels of task"):
        task_labels(find_task("clinc150_home"), tmp_path)


def test_two_sizes_at_once_are_refused(root: Path) -> None:
    with pytest.raises(ConfigError, match=r"give one, got 10 and 5"):
        load_task("trec", root, train_rows=10, per_class=5)


def test_a_task_that_is_only_evaluated_has_no_training_rows(root: Path) -> None:
    with pytest.raises(ConfigError, match=r"'clinc150_oos' has no training rows"):
        training_examples(
            find_task("clinc150_oos"),
            root,
            train_rows=None,
            per_class=None,
            subset_seed=0,
            held_out_share=0.1,
        )


def config_of(**values: Any) -> DataConfig:
    return DataConfig.model_validate({"source": "task:trec", **values})


def test_the_source_names_a_task() -> None:
    assert task_of(config_of()) is TASKS["trec"]
    assert task_of(config_of(train_rows="all", subset_seed=3)) is TASKS["trec"]
    assert task_of(config_of(source="rows", out_of_scope_label="oos")) is None
    with pytest.raises(ConfigError, match="got 'tree'"):
        task_of(config_of(source="task:tree"))


@pytest.mark.parametrize(
    ("setting", "value"),
    [("train_split", "test"), ("validation_split", None), ("out_of_scope_label", "oos")],
)
def test_what_a_task_decides_cannot_be_set(setting: str, value: str | None) -> None:
    with pytest.raises(ConfigError, match=rf"data\.{setting} is for no task, got {value!r}"):
        task_of(config_of(**{setting: value}))


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("train_rows", 5),
        ("per_class", 2),
        ("subset_seed", 1),
        ("held_out_share", 0.2),
        ("eval_drop_last", 4),
    ],
)
def test_what_only_a_task_has_cannot_be_set_for_a_directory(setting: str, value: float) -> None:
    with pytest.raises(ConfigError, match=rf"data\.{setting} is only for a task.*'rows'"):
        task_of(config_of(source="rows", **{setting: value}))


# --- the registry ---------------------------------------------------------------------------


def test_every_task_is_told_apart_by_its_name_and_its_labels_are_sound() -> None:
    for name, task in TASKS.items():
        assert task.name == name
        assert task.kind in {"text", "choice"}
        labels = (*(task.labels or ()), *task.reserved)
        assert len(set(labels)) == len(labels)
        assert task.train_rows is None or task.per_class is None
        for source in task.sources:
            assert source.evaluation_split not in {source.train_split, source.held_out_split}
        prompt_template(task.kind, task_prompt(task, None))
        if task.kind == "choice":
            prompt_template("choice", task_prompt(task, "rl_compat"))


# --- the public data sets -------------------------------------------------------------------

PUBLISHED = {  # methods.md 1.1: training rows, evaluation rows, labels
    "winogrande_s": (640, 1267, 2),
    "winogrande_m": (2558, 1267, 2),
    "arc_challenge": (1119, 299, 5),
    "arc_easy": (2251, 570, 5),
    "openbookqa": (4957, 500, 4),
    "boolq": (9427, 3270, 2),
    "aao": (8327, 1369, 5),
    "wb": (11985, 4537, 4),
    "combined": (20952, 7173, 7),
    "mmlu_college_chemistry": (0, 100, 4),
    "mmlu_college_physics": (0, 102, 4),
}
LOW_DATA = {  # training rows, evaluation rows, held-out rows (None: a share), labels
    "sst2": (640, 1821, 872, 2),
    "trec": (640, 500, None, 6),
    "sms_spam": (640, 1133, None, 2),
    "banking77": (770, 3080, None, 77),
    "clinc150": (1500, 4500, 3000, 150),
    "clinc150_banking": (150, 450, 300, 15),
    "clinc150_small_talk": (150, 450, 300, 15),
    "clinc150_oos": (0, 1000, 0, 1),
    "ag_news": (0, 7600, 0, 4),
}


@needs_shared_data
@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_task_has_the_published_rows(name: str) -> None:
    data = published(name)
    train = [*data.train, *data.held_out]
    assert (len(train), len(data.evaluation), len(data.labels)) == PUBLISHED[name]
    assert {gold_label(row) for row in train} <= set(data.labels)
    assert {gold_label(row) for row in data.evaluation} <= set(data.labels)


@needs_shared_data
@pytest.mark.parametrize("name", LOW_DATA)
def test_a_low_data_task_has_few_training_rows(name: str) -> None:
    data = published(name)
    train, evaluation, held_out, labels = LOW_DATA[name]
    assert (len(data.train), len(data.evaluation), len(data.labels)) == (train, evaluation, labels)
    assert held_out is None or len(data.held_out) == held_out
    if train:
        assert {gold_label(row) for row in data.train} == set(data.labels)
        assert {gold_label(row) for row in data.held_out} == set(data.labels)


@needs_shared_data
@pytest.mark.parametrize("name", [name for name in TASKS if not TASKS[name].selects])
def test_no_row_is_on_two_sides(name: str) -> None:
    data = published(name)
    assert not ids(data.train) & ids(data.held_out)
    assert not ids(data.evaluation) & (ids(data.train) | ids(data.held_out))
    assert len(ids(data.train)) == len(data.train)
    source = TASKS[name].sources[0]
    if data.train and source.held_out_split is None:  # equal questions do not straddle
        assert not questions(data.train) & questions(data.held_out)


def questions(rows: Any) -> set[str]:
    asked = [row.text if isinstance(row, TextExample) else row.question for row in rows]
    return {" ".join(text.casefold().split()) for text in asked}


@needs_shared_data
def test_winogrande_s_is_part_of_winogrande_m_and_held_out_with_it() -> None:
    small, medium = (published(f"winogrande_{size}") for size in "sm")
    assert ids(small.train) <= ids(medium.train)
    assert ids(small.held_out) <= ids(medium.held_out)
    assert small.evaluation == medium.evaluation
    combined = published("combined")
    inside = {i.partition("/")[2] for i in ids(combined.train) if i.startswith("winogrande")}
    assert not inside & (ids(small.held_out) | ids(medium.held_out))


@needs_shared_data
@pytest.mark.parametrize(
    ("name", "k", "kept"),
    [
        ("arc_challenge", 8, 296),
        ("arc_easy", 8, 568),
        ("mmlu_college_chemistry", 32, 96),
        ("mmlu_college_physics", 32, 96),
        ("openbookqa", 8, 496),
        ("openbookqa", 4, 500),
        ("arc_challenge", 32, 288),
        ("arc_easy", 32, 544),
    ],
)
def test_published_denominators(name: str, k: int, kept: int) -> None:
    """methods.md 1.7: published accuracies are multiples of one over these."""
    assert len(load_task(name, SHARED_DATA, eval_drop_last=k).evaluation) == kept


@needs_shared_data
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("winogrande_s", "\nChoices:\nA) Ian\nB) Dennis\nAnswer:"),
        ("arc_challenge", "\nChoices:\ndry palms) A\nwet palms) B\n"),
        ("openbookqa", "\nChioces:\npuppies learning new tricks) A\n"),
        ("boolq", "\nAnswer (true or false):"),
    ],
)
def test_the_published_prompts_differ_between_data_sets(name: str, expected: str) -> None:
    task = find_task(name)
    rows = load_task(task, SHARED_DATA, held_out_share=0).train
    template = prompt_template("choice", task_prompt(task, "rl_compat"))
    assert expected in render(rows[0], template).text
    repaired = prompt_template("choice", task_prompt(task, None))
    assert repaired.name == "rl_fixed"
