"""dalorra_core.data.labels: which labels there are and the one token that stands for each."""

import string

import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from dalorra_core.data.examples import Choice, ChoiceExample, TextExample
from dalorra_core.data.labels import (
    LabelSet,
    collect_labels,
    last_bare_tokens,
    resolve_label_tokens,
    with_swapped_tokens,
)
from dalorra_core.errors import DataError
from tests.support.tiny_tokenizer import tiny_tokenizer

TOKENIZER = tiny_tokenizer()


def tokens_of(labels: list[str]) -> list[str]:
    label_set = resolve_label_tokens(labels, TOKENIZER)
    return [str(TOKENIZER.decode([token_id])) for token_id in label_set.token_ids]


def question(*labels: str) -> ChoiceExample:
    return ChoiceExample("q", "?", None, tuple(Choice(name, name) for name in labels), None)


def test_labels_of_texts_are_sorted_and_counted_once() -> None:
    texts = [TextExample(str(i), "x", label) for i, label in enumerate(["b", "a", None, "b"])]
    assert collect_labels(texts) == ("a", "b")


def test_a_question_contributes_all_its_choices_in_the_order_of_letters() -> None:
    assert collect_labels([question("B", "D"), question("A", "B", "C")]) == ("A", "B", "C", "D")


def test_words_keep_the_order_they_first_appear_in() -> None:
    assert collect_labels([question("True", "False"), question("no", "True")]) == (
        "True",
        "False",
        "no",
    )


def test_the_out_of_scope_label_can_be_left_out() -> None:
    texts = [TextExample("1", "x", "oos"), TextExample("2", "x", "alarm")]
    assert collect_labels(texts, exclude={"oos"}) == ("alarm",)
    with pytest.raises(DataError, match=r"besides \['alarm', 'oos'\], got none"):
        collect_labels(texts, exclude={"oos", "alarm"})


def test_letters_take_the_token_without_a_leading_space() -> None:
    assert tokens_of(list(string.ascii_uppercase)) == list(string.ascii_uppercase)


def test_words_take_the_natural_continuation() -> None:
    assert tokens_of(["True", "balance", "maybe"]) == [" True", " balance", " maybe"]


def test_underscores_count_as_spaces() -> None:
    assert tokens_of(["book_flight"]) == [" book"]


def test_labels_that_share_words_get_different_tokens_of_their_own_words() -> None:
    found = tokens_of(["change_accent", "change_name", "change", "change_speed"])
    assert found == [" change", " name", "change", " speed"]


def test_a_label_without_a_free_token_of_its_own_takes_the_lowest_free_one() -> None:
    label_set = resolve_label_tokens(["a", "a_a", "A", "a_A"], TOKENIZER)
    assert len(set(label_set.token_ids)) == 4
    assert TOKENIZER.decode([label_set.token_ids[3]]) == " A"
    many = ["x", "_x", "x_", "_x_", "__x"]
    assert len(set(resolve_label_tokens(many, TOKENIZER).token_ids)) == 5


def test_special_tokens_are_never_labels() -> None:
    specials = set(TOKENIZER.all_special_ids)
    for label in ("<|end|>", "<|start|>"):
        assert not specials & set(resolve_label_tokens([label], TOKENIZER).token_ids)


def test_150_labels_with_few_words_get_150_tokens() -> None:
    label_set = resolve_label_tokens([f"change_name_{i}" for i in range(150)], TOKENIZER)
    assert len(set(label_set.token_ids)) == len(label_set) == 150


def test_an_exhausted_vocabulary_is_named() -> None:
    tiny = Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1, "b": 2}, unk_token="[UNK]"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tiny, unk_token="[UNK]")
    assert resolve_label_tokens(["b", "a"], tokenizer).token_ids == (2, 1)
    with pytest.raises(DataError, match="label 'c' has no token left"):
        resolve_label_tokens(["a", "b", "c"], tokenizer)


@pytest.mark.parametrize("label", ["", "  "])
def test_an_empty_label_is_refused(label: str) -> None:
    with pytest.raises(DataError, match="more than white space"):
        resolve_label_tokens(["a", label], TOKENIZER)


def test_a_label_set_knows_its_positions() -> None:
    label_set = LabelSet(("ham", "spam"), (10, 11))
    assert [label_set.index(label) for label in label_set.labels] == [0, 1]
    assert "ham" in label_set
    assert "oos" not in label_set


def test_an_unknown_label_is_answered_with_the_closest() -> None:
    label_set = LabelSet(("ham", "spam", "eggs"), (10, 11, 12))
    with pytest.raises(DataError, match="got 'spamm'; the closest are 'spam'"):
        label_set.index("spamm")
    with pytest.raises(DataError, match="got 'qqqq'; the first are 'ham', 'spam', 'eggs'"):
        label_set.index("qqqq")


@pytest.mark.parametrize(
    ("labels", "token_ids"),
    [((), ()), (("a",), (1, 2)), (("a", "a"), (1, 2)), (("a", "b"), (1, 1))],
)
def test_a_label_set_that_would_mix_labels_up_is_refused(
    labels: tuple[str, ...], token_ids: tuple[int, ...]
) -> None:
    with pytest.raises(DataError, match="label set must have"):
        LabelSet(labels, token_ids)


def test_bare_tokens_are_the_last_of_the_label_itself() -> None:
    labels = ["A", "True", "False", "maybe"]
    found = last_bare_tokens(labels, TOKENIZER)
    assert found.labels == tuple(labels)
    assert list(found.token_ids) == [TOKENIZER(label)["input_ids"][-1] for label in labels]
    assert TOKENIZER.decode([found.token_ids[1]]) == "rue"  # of T and rue
    assert resolve_label_tokens(labels, TOKENIZER).token_ids[1] != found.token_ids[1]


def test_two_labels_with_the_same_last_bare_token_are_refused() -> None:
    with pytest.raises(DataError, match=r"label_tokens must be 'spaced'.*'my card' and 'a card'"):
        last_bare_tokens(["my card", "a card"], TOKENIZER)


def test_a_label_without_tokens_or_only_a_special_one_is_refused() -> None:
    with pytest.raises(DataError, match="'' has no token of its own"):
        last_bare_tokens([""], TOKENIZER)


def test_two_tokens_are_swapped_and_nothing_else() -> None:
    before = LabelSet(("True", "x", "False"), (7, 8, 9))
    after = with_swapped_tokens(before, "True", "False")
    assert (after.labels, after.token_ids) == (before.labels, (9, 8, 7))
    assert with_swapped_tokens(after, "False", "True") == before
    with pytest.raises(DataError, match="got 'False'"):
        with_swapped_tokens(LabelSet(("True",), (7,)), "True", "False")
