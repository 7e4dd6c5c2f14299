"""dalorra_core.data.hub: rows of hub data sets in our own form; the hub itself is never asked."""

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from dalorra_core.data.examples import Choice, ChoiceExample, TextExample
from dalorra_core.data.hub import hub_row, read_hub
from dalorra_core.data.readers import read_source
from dalorra_core.data.rows import parse_row
from dalorra_core.errors import ConfigError, DataError


class Rows(list[dict[str, Any]]):
    """Rows as the package ``datasets`` gives them: a sequence with features."""

    @property
    def features(self) -> dict[str, Any]:
        return {"label": SimpleNamespace(names=["negative", "positive"])}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Stand in for the optional package, which asks the network."""
    module: Any = ModuleType("datasets")
    module.calls = []
    module.answer = Rows()

    def load_dataset(*arguments: object, **options: object) -> Rows:
        module.calls.append((arguments, options))
        if isinstance(module.answer, Exception):
            raise module.answer
        return module.answer

    module.load_dataset = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", module)
    return module


def test_class_numbers_become_names(hub: Any) -> None:
    hub.answer = Rows([{"sentence": "fine", "label": 1}, {"sentence": "dull", "label": 0}])
    assert read_source("hub:sst2", "validation") == [
        TextExample("validation-0", "fine", "positive"),
        TextExample("validation-1", "dull", "negative"),
    ]
    assert hub.calls == [(("sst2", None), {"split": "validation"})]


def test_a_configuration_follows_the_name(hub: Any) -> None:
    hub.answer = Rows([{"text": "fine", "label": "good", "id": 7}])
    assert read_hub("hub:owner/set:small", "train") == [TextExample("7", "fine", "good")]
    assert hub.calls == [(("owner/set", "small"), {"split": "train"})]


def test_a_hidden_label_is_none_and_refused_where_one_is_needed(hub: Any) -> None:
    hub.answer = Rows([{"sentence": "fine", "label": -1}])
    assert read_hub("hub:sst2", "test", require_labels=False)[0] == TextExample("test-0", "fine")
    with pytest.raises(DataError, match="hub:sst2, split 'test', row 0: field 'label'"):
        read_hub("hub:sst2", "test")


@pytest.mark.usefixtures("hub")
def test_an_empty_split_is_refused() -> None:
    with pytest.raises(DataError, match="must hold at least one row"):
        read_hub("hub:sst2", "train")


@pytest.mark.parametrize("failure", [ConnectionError("no route"), ValueError("no such split")])
def test_an_unreachable_hub_says_what_to_do(hub: Any, failure: Exception) -> None:
    hub.answer = failure
    with pytest.raises(ConfigError, match=r"check name and network.*: no "):
        read_hub("hub:sst2", "train")


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ConfigError, match="needs the package 'datasets'"):
        read_hub("hub:sst2", "train")


def test_a_name_is_needed() -> None:
    with pytest.raises(ConfigError, match="got 'hub:'"):
        read_hub("hub:", "train")


def test_parallel_lists_with_digits_become_lettered_choices() -> None:
    row = hub_row(
        {
            "id": "q",
            "question": "which?",
            "choices": {"text": ["one", "two", "three"], "label": ["1", "2", "3"]},
            "answerKey": "2",
        },
        row_id="unused",
    )
    choices = (Choice("A", "one"), Choice("B", "two"), Choice("C", "three"))
    assert parse_row(row) == ChoiceExample("q", "which?", None, choices, "B")


@pytest.mark.parametrize(("answer", "expected"), [(1, "B"), ("", None), (None, None)])
def test_a_list_of_strings_gets_letters(answer: object, expected: str | None) -> None:
    row = hub_row({"question": "which?", "choices": ["x", "y"], "answer": answer}, row_id="test-3")
    example = parse_row(row, require_labels=False)
    assert isinstance(example, ChoiceExample)
    assert (example.id, example.answer) == ("test-3", expected)


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ({"body": "x"}, "must have a column of"),
        ({"text": "x", "label": 2}, r"column 'label' must lie in 0\.\.1, got 2"),
        ({"question": "q", "choices": ["x", "y"], "answer": 2}, r"'answer' must lie in 0\.\.1"),
    ],
)
def test_columns_that_fit_no_form_are_named(columns: dict[str, object], said: str) -> None:
    with pytest.raises(DataError, match=said):
        hub_row(columns, row_id="r", class_names=["negative", "positive"])
