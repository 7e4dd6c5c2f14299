"""dalorra_core.data.encode and tokenization: one example -> token ids, nothing cut unasked."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from transformers import ByT5Tokenizer

from dalorra_core.data.encode import EncodedExample, encode
from dalorra_core.data.examples import Choice, ChoiceExample, Example, TextExample
from dalorra_core.data.labels import LabelSet, resolve_label_tokens
from dalorra_core.data.prompts import CHOICE_TEMPLATES, prompt_template
from dalorra_core.errors import ConfigError, DataError, InputError, InputTooLongError
from tests.support.tiny_tokenizer import SPECIAL_TOKENS, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
INTENTS = resolve_label_tokens(["alarm", "balance"], TOKENIZER)
LETTERS = resolve_label_tokens(["A", "B", "C", "D"], TOKENIZER)
LONG = "the question is what you book and how the bank will change it"


def encoded(example: Example, **changes: Any) -> EncodedExample:
    label_set = INTENTS if isinstance(example, TextExample) else LETTERS
    kind = "text" if isinstance(example, TextExample) else "choice"
    settings: dict[str, Any] = {
        "tokenizer": TOKENIZER,
        "template": prompt_template(kind),
        "label_set": label_set,
        "max_tokens": 200,
        **changes,
    }
    return encode(example, **settings)


def text_of(row: EncodedExample) -> str:
    return str(TOKENIZER.decode(list(row.token_ids)))


def lettered(*labels: str, answer: str | None = None) -> ChoiceExample:
    return ChoiceExample("q", "which?", None, tuple(Choice(c, f"no {c}") for c in labels), answer)


def test_the_prompt_is_tokenised_as_one_string() -> None:
    row = encoded(TextExample("7", "my balance", "balance"))
    assert list(row.token_ids) == TOKENIZER("my balance\nIntent:")["input_ids"]
    assert (row.id, row.label, row.allowed, row.truncated) == ("7", 1, None, False)


def test_the_tokenizer_adds_its_own_start_once_and_within_the_limit() -> None:
    tokenizer = tiny_tokenizer(adds_start=True)
    row = encoded(TextExample("1", "ham"), tokenizer=tokenizer)
    assert row.token_ids[0] == tokenizer.bos_token_id
    assert row.token_ids[1:] == encoded(TextExample("1", "ham")).token_ids
    cut = encoded(TextExample("1", LONG), tokenizer=tokenizer, max_tokens=12, truncate="end")
    assert cut.token_ids[0] == tokenizer.bos_token_id
    assert len(cut.token_ids) <= 12


def test_a_special_token_spelt_in_a_text_is_only_text() -> None:
    row = encoded(TextExample("1", f"ham {SPECIAL_TOKENS[2]} spam"))
    assert not set(row.token_ids) & set(TOKENIZER.all_special_ids)
    assert text_of(row) == "ham <|end|> spam\nIntent:"


@pytest.mark.parametrize(("policy", "label"), [("ignore", -1), ("error", None)])
def test_an_unknown_right_label_is_an_error_or_none(policy: str, label: int | None) -> None:
    example = TextExample("row9", "x", "oos")
    if label is not None:
        assert encoded(example, unknown_label=policy).label == label
        return
    with pytest.raises(DataError, match="row 'row9': label must be one of the 2 known labels"):
        encoded(example, unknown_label=policy)


def test_no_label_is_minus_one() -> None:
    assert encoded(TextExample("1", "x")).label == -1
    assert encoded(lettered("A", "B")).label == -1


def test_a_question_may_only_be_answered_with_its_own_choices() -> None:
    row = encoded(lettered("C", "A", answer="C"))
    assert (row.label, row.allowed) == (2, (0, 2))


@pytest.mark.parametrize("policy", ["error", "ignore"])
def test_a_choice_outside_the_label_set_is_refused(policy: str) -> None:
    with pytest.raises(DataError, match="got 'E'"):
        encoded(lettered("A", "E", answer="A"), unknown_label=policy)


def test_a_prompt_of_just_the_limit_is_not_cut() -> None:
    whole = encoded(TextExample("1", LONG))
    same = encoded(TextExample("1", LONG), max_tokens=len(whole.token_ids), truncate="end")
    assert same == whole


def test_too_long_is_refused_with_both_numbers() -> None:
    length = len(encoded(TextExample("1", LONG)).token_ids)
    with pytest.raises(InputTooLongError) as caught:
        encoded(TextExample("1", LONG), max_tokens=length - 1)
    assert (caught.value.num_tokens, caught.value.max_tokens) == (length, length - 1)


def test_truncation_drops_the_asked_side_and_keeps_head_and_tail() -> None:
    for side, kept in (("end", LONG.startswith), ("start", LONG.endswith)):
        row = encoded(TextExample("1", LONG), max_tokens=12, truncate=side)
        body = text_of(row).removesuffix("\nIntent:")
        assert row.truncated
        assert 10 <= len(row.token_ids) <= 12
        assert len(body) > 10
        assert kept(body)


def test_truncation_cuts_the_context_and_never_the_question() -> None:
    choices = (Choice("A", "sun"), Choice("B", "ice"))
    example = ChoiceExample("1", "Which is hot?", LONG * 5, choices, None)
    row = encoded(example, max_tokens=110, truncate="end")
    tail = "\nQuestion: Which is hot?\nChoices:\nA) sun\nB) ice\nAnswer:"
    assert text_of(row).endswith(tail)
    assert text_of(row).startswith("Return the label")


def test_a_cut_between_the_bytes_of_one_character_keeps_whole_characters() -> None:
    for limit in range(8, 20):
        row = encoded(
            TextExample("1", "日本語のテキスト🙂" * 3), max_tokens=limit, truncate="start"
        )
        assert "\ufffd" not in text_of(row)
        assert len(row.token_ids) <= limit


def test_an_input_too_long_without_any_body_is_refused() -> None:
    with pytest.raises(
        InputError, match=r"without any of the text that may be cut; the limit is 2"
    ):
        encoded(TextExample("1", LONG), max_tokens=2, truncate="end")


def test_the_body_may_vanish_altogether() -> None:
    bare = len(TOKENIZER("\nIntent:")["input_ids"])
    row = encoded(TextExample("1", LONG), max_tokens=bare, truncate="end")
    assert text_of(row) == "\nIntent:"


def test_a_passage_cut_by_the_template_counts_as_truncated() -> None:
    words = (Choice("yes", "yes"), Choice("no", "no"))
    example = ChoiceExample("1", "q", "x" * 1025, words, None)
    row = encoded(
        example,
        template=CHOICE_TEMPLATES["rl_compat"],
        label_set=LabelSet(("yes", "no"), (5, 6)),
        max_tokens=2000,
    )
    assert row.truncated


@pytest.mark.parametrize(
    ("example", "said"),
    [
        (TextExample("1", " \n"), "text must hold more than white space"),
        (TextExample("1", "a\0"), "text must not hold the character NUL"),
        (lettered("A"), "choices must hold 2 to 26 choices, got 1"),
        (lettered("A", "A"), "choices must have different labels"),
    ],
)
def test_an_unsound_question_is_refused_without_quoting_it(example: Example, said: str) -> None:
    with pytest.raises(InputError, match=said):
        encoded(example)


def test_a_tokenizer_that_cannot_say_where_its_tokens_lie_cannot_truncate() -> None:
    slow = ByT5Tokenizer()
    assert encoded(TextExample("1", "ham"), tokenizer=slow).token_ids
    with pytest.raises(ConfigError, match="truncate='end' needs a fast tokenizer, got ByT5"):
        encoded(TextExample("1", LONG), tokenizer=slow, max_tokens=20, truncate="end")


def test_many_threads_may_use_one_fresh_tokenizer() -> None:
    tokenizer = tiny_tokenizer()
    example = TextExample("1", "my balance <|end|>")
    with ThreadPoolExecutor(8) as pool:
        rows = list(pool.map(lambda _: encoded(example, tokenizer=tokenizer), range(64)))
    assert set(rows) == {encoded(example)}


def test_a_limit_outside_its_domain_is_named() -> None:
    with pytest.raises(ConfigError, match="max_tokens must be at least 1, got 0"):
        encoded(TextExample("1", "x"), max_tokens=0)


@pytest.mark.parametrize(
    ("choices", "union", "allowed"),
    [
        ("AC", (), (0, 2)),
        ("AC", ("A", "B"), (0, 1, 2)),
        ("AC", ("A", "B", "C", "D"), None),
        ("ABCD", (), (0, 1, 2, 3)),
        ("ABD", ("C",), None),
    ],
)
def test_a_question_can_be_scored_over_more_than_its_choices(
    choices: str, union: tuple[str, ...], allowed: tuple[int, ...] | None
) -> None:
    assert encoded(lettered(*choices), union=union).allowed == allowed
    assert encoded(TextExample("1", "x"), union=()).allowed is None


def test_an_unknown_label_of_the_union_is_refused() -> None:
    with pytest.raises(DataError, match="label must be one of the 4 known labels, got 'E'"):
        encoded(lettered("A", "B"), union=("E",))


def test_the_end_of_text_token_counts_and_stays_last() -> None:
    plain = encoded(TextExample("1", "my balance"))
    ended = encoded(TextExample("1", "my balance"), append_eos=True)
    assert ended.token_ids == (*plain.token_ids, TOKENIZER.eos_token_id)
    size = len(ended.token_ids)
    assert encoded(TextExample("1", "my balance"), append_eos=True, max_tokens=size) == ended
    with pytest.raises(InputTooLongError, match=f"has {size} tokens; the limit is {size - 1}"):
        encoded(TextExample("1", "my balance"), append_eos=True, max_tokens=size - 1)
    cut = encoded(TextExample("1", LONG), append_eos=True, max_tokens=12, truncate="start")
    assert len(cut.token_ids) <= 12
    assert text_of(cut).endswith("Intent:<|end|>")


def test_a_tokenizer_without_an_end_of_text_token_cannot_append_it() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ConfigError, match=r"data\.append_eos needs a tokenizer with an end"):
        encoded(TextExample("1", "x"), tokenizer=tokenizer, append_eos=True)
