"""dalorra_core.data.subsets: rows held out and subsets, the same ones whatever else is chosen."""

from collections import Counter
from collections.abc import Callable

import pytest

from dalorra_core.data.examples import Choice, ChoiceExample, Example, TextExample
from dalorra_core.data.subsets import split_held_out, take_per_class, take_rows
from dalorra_core.errors import ConfigError

Take = Callable[..., list[Example]]
SIZES = {"a": 300, "b": 120, "c": 60, "d": 20}


def texts() -> list[Example]:
    return [
        TextExample(f"{label}{i}", f"text {label} {i}", label)
        for label, size in SIZES.items()
        for i in range(size)
    ]


def ids(rows: list[Example]) -> list[str]:
    return [row.id for row in rows]


def counts(rows: list[Example]) -> Counter[str]:
    return Counter(row.id[0] for row in rows)


@pytest.mark.parametrize("count", [1, 7, 25, 100, 333, 499, 500])
def test_every_class_is_there_in_its_share(count: int) -> None:
    found = counts(take_rows(texts(), count, seed=0))
    assert sum(found.values()) == count
    for label, size in SIZES.items():
        expected = count * size / 500
        assert abs(found[label] - expected) <= 0.5 + len(SIZES) / 2 * size / 500 + 1e-9


def test_every_class_has_its_number() -> None:
    assert counts(take_per_class(texts(), 13, seed=0)) == dict.fromkeys(SIZES, 13)


@pytest.mark.parametrize("take", [take_rows, take_per_class])
def test_a_larger_subset_contains_the_smaller_one(take: Take) -> None:
    previous: set[str] = set()
    for count in range(1, 21):
        found = set(ids(take(texts(), count, seed=3)))
        assert previous < found
        previous = found


@pytest.mark.parametrize("take", [take_rows, take_per_class])
def test_the_order_of_the_file_does_not_matter_but_is_kept(take: Take) -> None:
    rows = texts()
    found = ids(take(rows, 15, seed=0))
    backwards = ids(take(rows[::-1], 15, seed=0))
    assert backwards == found[::-1]
    assert found == [i for i in ids(rows) if i in set(found)]


def test_rows_are_spread_over_the_file_and_change_with_the_seed() -> None:
    places = [int(i[1:]) for i in ids(take_per_class(texts(), 20, seed=0)) if i[0] == "a"]
    assert abs(sum(places) / 20 - 149.5) < 4 * 86.6 / 20**0.5  # a uniform draw, four s.e.
    assert ids(take_rows(texts(), 50, seed=0)) != ids(take_rows(texts(), 50, seed=1))


def test_the_rows_of_a_seed_never_change() -> None:
    """Recorded: another release must draw the same rows."""
    assert ids(take_rows(texts(), 6, seed=0)) == ["a21", "a243", "a253", "a295", "b2", "c0"]


def test_no_more_rows_than_there_are() -> None:
    with pytest.raises(ConfigError, match=r"data\.train_rows must lie in 1\.\.500.*got 501"):
        take_rows(texts(), 501, seed=0)
    with pytest.raises(ConfigError, match=r"data\.per_class must lie in 1\.\.20.*'d', got 21"):
        take_per_class(texts(), 21, seed=0)


def test_held_out_rows_and_the_others_are_all_rows() -> None:
    rows = texts()
    train, aside = split_held_out(rows, 0.1)
    assert sorted(ids(train) + ids(aside)) == sorted(ids(rows))
    assert abs(len(aside) - 50) < 4 * (500 * 0.1 * 0.9) ** 0.5
    assert split_held_out(rows, 0) == (rows, [])
    assert set(ids(aside)) < set(ids(split_held_out(rows, 0.2)[1]))
    again = split_held_out(rows[::-2], 0.1)[1]
    assert set(ids(again)) == {row.id for row in aside if row in rows[::-2]}


def test_equal_texts_are_on_the_same_side_whatever_their_ids() -> None:
    copies: list[Example] = [
        TextExample(f"copy{row.id}", row.text.upper().replace(" ", "  "), "z")
        for row in texts()
        if isinstance(row, TextExample)
    ]
    aside = ids(split_held_out(texts(), 0.3)[1])
    assert ids(split_held_out(copies, 0.3)[1]) == [f"copy{i}" for i in aside]


def test_questions_are_held_out_by_what_they_ask() -> None:
    choices = (Choice("A", "x"), Choice("B", "y"))
    asked: list[Example] = [
        ChoiceExample(f"q{i}", row.text, None, choices, "A")
        for i, row in enumerate(texts())
        if isinstance(row, TextExample)
    ]
    aside = split_held_out(asked, 0.3)[1]
    assert [row.question for row in aside if isinstance(row, ChoiceExample)] == [
        row.text for row in split_held_out(texts(), 0.3)[1] if isinstance(row, TextExample)
    ]


@pytest.mark.parametrize("share", [-0.1, 1.0])
def test_a_share_outside_its_domain_is_refused(share: float) -> None:
    with pytest.raises(ConfigError, match=r"data\.held_out_share must be at least 0"):
        split_held_out(texts(), share)
