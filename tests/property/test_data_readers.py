"""Reading: what is written is read back, and no bytes get past it as anything but a DataError."""

import json
from pathlib import Path
from tempfile import TemporaryDirectory

from hypothesis import given
from hypothesis import strategies as st

from dalorra_core.data.examples import Choice, ChoiceExample, Example, TextExample, example_fault
from dalorra_core.data.readers import read_jsonl
from dalorra_core.errors import DataError

TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1)
USABLE = TEXT.filter(lambda text: bool(text.strip()))


CHOICES = st.lists(st.tuples(USABLE, USABLE), min_size=2, max_size=26, unique_by=lambda c: c[0])


def as_row(example: Example) -> dict[str, object]:
    if isinstance(example, TextExample):
        return {"id": example.id, "text": example.text, "label": example.label}
    choices = [{"label": choice.label, "text": choice.text} for choice in example.choices]
    return {
        "id": example.id,
        "question": example.question,
        "context": example.context,
        "choices": choices,
        "answer": example.answer,
    }


def read(content: bytes) -> list[Example]:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "data.jsonl"
        path.write_bytes(content)
        return read_jsonl(path)


@given(st.lists(st.tuples(USABLE, USABLE), min_size=1, max_size=5), st.booleans())
def test_texts_survive_the_file(pairs: list[tuple[str, str]], is_ascii: bool) -> None:
    examples = [TextExample(str(i), text, label) for i, (text, label) in enumerate(pairs)]
    lines = [json.dumps(as_row(example), ensure_ascii=is_ascii) for example in examples]
    assert read("\n".join(lines).encode()) == examples


@given(USABLE, st.none() | USABLE, CHOICES, st.integers(0, 25))
def test_questions_survive_the_file(
    question: str, context: str | None, pairs: list[tuple[str, str]], right: int
) -> None:
    choices = tuple(Choice(label, text) for label, text in pairs)
    answer = choices[right % len(choices)].label
    example = ChoiceExample("q", question, context, choices, answer)
    assert read(json.dumps(as_row(example)).encode()) == [example]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)
FIELDS = st.sampled_from(["id", "text", "label", "question", "choices", "context", "answer"])


@given(st.dictionaries(FIELDS, JSON) | JSON)
def test_any_json_is_an_example_or_a_data_error(row: object) -> None:
    examples, message = read_or_message(json.dumps(row).encode())
    assert [example_fault(example) for example in examples] == [None] * (message == "")
    assert message == "" or "line 1: " in message


@given(st.binary(max_size=60))
def test_any_bytes_are_examples_or_a_data_error(content: bytes) -> None:
    examples, message = read_or_message(content)
    assert examples or "data.jsonl" in message


def read_or_message(content: bytes) -> tuple[list[Example], str]:
    try:
        return read(content), ""
    except DataError as error:
        return [], str(error)
