"""Encoding and batching: limits hold, nothing but the body is cut, padding changes no row."""

from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dalorra_core.data.collate import EncodedExample, collate, length_buckets
from dalorra_core.data.encode import encode
from dalorra_core.data.examples import TextExample
from dalorra_core.data.labels import LabelSet, resolve_label_tokens
from dalorra_core.data.prompts import PromptTemplate, render
from dalorra_core.errors import InputError, InputTooLongError
from tests.support.tiny_tokenizer import tiny_tokenizer

TOKENIZER = tiny_tokenizer()
LABELS = LabelSet(("a", "b"), (5, 6))
TEMPLATE = PromptTemplate("text", "custom", "Read: {text}\nIntent:")
TEXTS = st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=60
).filter(lambda text: bool(text.strip()))


def encoded(text: str, max_tokens: int, side: Literal["none", "start", "end"]) -> EncodedExample:
    return encode(
        TextExample("1", text),
        tokenizer=TOKENIZER,
        template=TEMPLATE,
        label_set=LABELS,
        max_tokens=max_tokens,
        truncate=side,
    )


@given(TEXTS, st.integers(1, 80))
def test_without_truncation_a_prompt_is_whole_or_refused(text: str, limit: int) -> None:
    whole = TOKENIZER(f"Read: {text}\nIntent:")["input_ids"]
    if len(whole) > limit:
        with pytest.raises(
            InputTooLongError, match=f"has {len(whole)} tokens; the limit is {limit}"
        ):
            encoded(text, limit, "none")
        return
    row = encoded(text, limit, "none")
    assert list(row.token_ids) == whole
    assert not row.truncated


@given(TEXTS, st.integers(1, 80), st.sampled_from(["start", "end"]))
def test_truncation_fits_and_loses_only_one_side_of_the_body(
    text: str, limit: int, side: Literal["start", "end"]
) -> None:
    bare = len(TOKENIZER("Read: \nIntent:")["input_ids"])
    if limit < bare and limit < len(TOKENIZER(f"Read: {text}\nIntent:")["input_ids"]):
        with pytest.raises(InputError, match="without any of the text that may be cut"):
            encoded(text, limit, side)
        return
    row = encoded(text, limit, side)
    assert len(row.token_ids) <= limit
    prompt = str(TOKENIZER.decode(list(row.token_ids)))
    assert prompt.startswith("Read: ")
    assert prompt.endswith("\nIntent:")
    body = prompt[len("Read: ") : -len("\nIntent:")]
    assert text.startswith(body) if side == "end" else text.endswith(body)
    assert row.truncated == (body != text)


@given(TEXTS, TEXTS, TEXTS)
def test_any_text_can_stand_in_a_prompt_or_be_one(before: str, text: str, after: str) -> None:
    def escaped(part: str) -> str:
        return part.replace("{", "{{").replace("}", "}}")

    template = PromptTemplate("text", "custom", f"{escaped(before)}{{text}}{escaped(after)}")
    prompt = render(TextExample("1", text), template)
    assert (prompt.head, prompt.body, prompt.tail) == (before, text, after)
    assert prompt.text == before + text + after


NAMES = st.lists(TEXTS, min_size=1, max_size=40, unique=True)


@given(NAMES)
def test_every_label_gets_a_token_of_its_own(labels: list[str]) -> None:
    found = resolve_label_tokens(labels, TOKENIZER)
    assert found.labels == tuple(labels)
    assert len(set(found.token_ids)) == len(labels)
    assert not set(found.token_ids) & set(TOKENIZER.all_special_ids)
    assert found == resolve_label_tokens(labels, tiny_tokenizer())


@given(NAMES, st.data())
def test_a_later_label_never_changes_an_earlier_token(
    labels: list[str], data: st.DataObject
) -> None:
    size = data.draw(st.integers(1, len(labels)))
    whole = resolve_label_tokens(labels, TOKENIZER)
    assert resolve_label_tokens(labels[:size], TOKENIZER).token_ids == whole.token_ids[:size]


ROWS = st.lists(st.lists(st.integers(0, 999), min_size=1, max_size=9), min_size=1, max_size=6)


@given(ROWS, st.integers(0, 999))
def test_every_row_can_be_read_back_from_its_batch(rows: list[list[int]], pad_id: int) -> None:
    examples = [EncodedExample(str(i), tuple(ids), -1, None, False) for i, ids in enumerate(rows)]
    batch = collate(examples, num_labels=1, pad_id=pad_id)
    for b, ids in enumerate(rows):
        assert batch.input_ids[b, : int(batch.last_index[b]) + 1].tolist() == ids
        assert set(batch.input_ids[b, len(ids) :].tolist()) <= {pad_id}
    assert batch.num_tokens == sum(map(len, rows))
    assert batch.padded_tokens == len(rows) * max(map(len, rows))


@given(
    st.lists(st.integers(1, 99), max_size=80),
    st.integers(1, 9),
    st.integers(0, 2**64 - 1),
    st.integers(0, 2**64 - 1),
    st.integers(1, 5),
)
def test_an_epoch_visits_every_row_once(
    lengths: list[int], batch_size: int, seed: int, epoch: int, window: int
) -> None:
    batches = length_buckets(lengths, batch_size=batch_size, seed=seed, epoch=epoch, window=window)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    short = [len(batch) for batch in batches if len(batch) != batch_size]
    assert short == ([len(lengths) % batch_size] if len(lengths) % batch_size else [])
    again = length_buckets(lengths, batch_size=batch_size, seed=seed, epoch=epoch, window=window)
    assert again == batches
