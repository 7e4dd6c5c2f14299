"""dalorra_core.data.readers and rows: strict reading, errors that name file, line and field."""

import json
from pathlib import Path

import pytest

from dalorra_core.data.examples import Choice, ChoiceExample, TextExample
from dalorra_core.data.readers import read_jsonl, read_source
from dalorra_core.errors import ConfigError, DataError

TEXT_ROW = {"id": "t1", "text": "what is my balance", "label": "balance"}
CHOICE_ROW = {
    "id": "c1",
    "question": "which is hot?",
    "context": None,
    "choices": [{"label": "A", "text": "the sun"}, {"label": "B", "text": "ice"}],
    "answer": "A",
}


def write(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_reads_texts_in_file_order(tmp_path: Path) -> None:
    second = {**TEXT_ROW, "id": "t2", "label_fine": "not read"}
    assert read_jsonl(write(tmp_path / "a.jsonl", TEXT_ROW, second)) == [
        TextExample("t1", "what is my balance", "balance"),
        TextExample("t2", "what is my balance", "balance"),
    ]


def test_reads_questions_with_and_without_context(tmp_path: Path) -> None:
    with_context = {**CHOICE_ROW, "id": "c2", "context": "The sun is hot."}
    first, second = read_jsonl(write(tmp_path / "a.jsonl", CHOICE_ROW, with_context))
    choices = (Choice("A", "the sun"), Choice("B", "ice"))
    assert first == ChoiceExample("c1", "which is hot?", None, choices, "A")
    assert isinstance(second, ChoiceExample)
    assert second.context == "The sun is hot."


@pytest.mark.parametrize("row", [TEXT_ROW, CHOICE_ROW])
def test_labels_may_be_missing_or_null_when_not_required(
    tmp_path: Path, row: dict[str, object]
) -> None:
    field = "label" if "label" in row else "answer"
    null = {**row, field: None}
    missing = {name: value for name, value in row.items() if name != field} | {"id": "2"}
    examples = read_jsonl(write(tmp_path / "a.jsonl", null, missing), require_labels=False)
    assert [getattr(example, field) for example in examples] == [None, None]


def test_a_byte_order_mark_blank_lines_and_crlf_are_accepted(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(TEXT_ROW).encode() + b"\r\n\r\n  \n")
    assert [example.id for example in read_jsonl(path)] == ["t1"]


def test_a_line_separator_inside_a_string_does_not_end_the_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    row = {**TEXT_ROW, "text": "one\u2028two\x85three"}
    path.write_text(json.dumps(row, ensure_ascii=False), encoding="utf-8")
    (example,) = read_jsonl(path)
    assert isinstance(example, TextExample)
    assert example.text == row["text"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"text": ""}, "field 'text' must hold more than white space"),
        ({"text": " \n\t"}, "field 'text' must hold more than white space"),
        ({"text": 5}, "field 'text' must be a string, got 5 (int)"),
        ({"text": None}, "field 'text' must be a string, got None (NoneType)"),
        ({"text": ["x" * 99]}, "x... (list)"),
        ({"text": "a\0b"}, "field 'text' must not hold the character NUL"),
        ({"text": "a\ud800b"}, "field 'text' must be valid Unicode; U+D800"),
        ({"label": None}, "field 'label' must be a string"),
        ({"label": ""}, "field 'label' must hold more than white space"),
        ({"id": 7}, "field 'id' must be a string, got 7 (int)"),
        ({"id": ""}, "field 'id' must hold more than white space"),
        ({"choices": []}, "either a text ('text') or a question"),
    ],
)
def test_a_faulty_text_row_is_named(tmp_path: Path, changes: dict[str, object], said: str) -> None:
    path = write(tmp_path / "a.jsonl", TEXT_ROW, {**TEXT_ROW, "id": "t2", **changes})
    with pytest.raises(DataError) as caught:
        read_jsonl(path)
    assert f"{path}, line 2: " in str(caught.value)
    assert said in str(caught.value)


TWO = CHOICE_ROW["choices"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"question": " "}, "field 'question' must hold more than white space"),
        ({"context": 3}, "field 'context' must be a string"),
        ({"context": " "}, "field 'context' must hold more than white space"),
        ({"answer": "C"}, "field 'answer' must be one of the labels ['A', 'B'], got 'C'"),
        ({"answer": None}, "field 'answer' must be a string"),
        ({"choices": "AB"}, "field 'choices' must be a list of objects"),
        ({"choices": ["the sun", "ice"]}, "field 'choices[0]' must be an object"),
        ({"choices": [{"label": "A", "text": "x"}]}, "must hold 2 to 26 choices, got 1"),
        (
            {"choices": [{"label": f"L{i}", "text": "x"} for i in range(27)], "answer": "L0"},
            "must hold 2 to 26 choices, got 27",
        ),
        (
            {"choices": [{"label": "A", "text": "x"}, {"label": "A", "text": "y"}]},
            "field 'choices' must have different labels, got 'A' more than once",
        ),
        ({"choices": [{"label": "A"}, {"label": "B"}]}, "field 'choices[0].text' is missing"),
        (
            {"choices": [{"label": "A", "text": "x"}, {"label": 2, "text": "y"}]},
            "field 'choices[1].label' must be a string, got 2 (int)",
        ),
        (
            {"choices": [{"label": "A", "text": "x"}, {"label": "B", "text": " "}]},
            "field 'choices[1].text' must hold more than white space",
        ),
    ],
)
def test_a_faulty_question_is_named(tmp_path: Path, changes: dict[str, object], said: str) -> None:
    path = write(tmp_path / "a.jsonl", {**CHOICE_ROW, **changes})
    with pytest.raises(DataError) as caught:
        read_jsonl(path)
    assert f"{path}, line 1: " in str(caught.value)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "must hold at least one row, got an empty file"),
        (b"\n \n", "must hold at least one row"),
        (b"{not json}", "line 1: a row must be one JSON object"),
        (b"[1, 2]", "line 1: a row must be a JSON object, got [1, 2] (list)"),
        (b"\xff\xfe", "line 1: a row must be UTF-8, got byte 0xff at column 1"),
        (b'{"id": "1", "label": "x"}', "field 'text' is missing; the fields found are: 'id'"),
        (b"{}", "field 'id' is missing; the fields found are: none"),
        (b'{"id": "1", "text": "a", "text": "b"}', "field 'text' must appear once, got it 2"),
        (b"[" * 100_000, "line 1: a row must be one JSON object"),
        (b'{"id": ' + b"9" * 5000 + b"}", "line 1: a row must be one JSON object"),
    ],
)
def test_a_faulty_file_is_named(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        read_jsonl(path)
    assert str(path) in str(caught.value)
    assert said in str(caught.value)


def test_a_repeated_id_names_both_lines(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", TEXT_ROW, {**TEXT_ROW, "id": "t2"}, TEXT_ROW)
    with pytest.raises(DataError, match=r"line 3: .*'t1' was already used on line 1"):
        read_jsonl(path)


def test_one_file_holds_one_form(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", TEXT_ROW, CHOICE_ROW)
    with pytest.raises(DataError, match="line 2: a file must hold only texts or only questions"):
        read_jsonl(path)


def test_a_source_is_a_directory_or_a_file(tmp_path: Path) -> None:
    path = write(tmp_path / "train.jsonl", TEXT_ROW)
    assert read_source(tmp_path, "train") == read_source(str(path), "ignored") == read_jsonl(path)


def test_a_missing_split_names_those_there_are(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", TEXT_ROW)
    with pytest.raises(ConfigError, match=r"\(train\), got 'test'"):
        read_source(tmp_path, "test")


def test_a_missing_source_is_a_setting_at_fault(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="which does not exist"):
        read_source(tmp_path / "absent", "train")


def test_an_unreadable_file_is_a_setting_at_fault(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        read_jsonl(tmp_path)
