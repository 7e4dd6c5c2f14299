"""Labels and the one token that stands for each; no prompts, no tensors.

The model answers with a single token, so each label needs its own. A token of the label's own words
is preferred (the base model then has an opinion from the start), but any will do: training teaches
it. The ids are stored with the adapter and never resolved again when serving.
"""

import difflib
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from transformers import PreTrainedTokenizerBase

from dalorra_core.data.examples import ChoiceExample, Example
from dalorra_core.data.tokenization import special_token_ids, text_token_ids
from dalorra_core.errors import DataError

__all__ = [
    "LabelSet",
    "collect_labels",
    "last_bare_tokens",
    "resolve_label_tokens",
    "with_swapped_tokens",
]


@dataclass(frozen=True)
class LabelSet:
    """The labels of one adapter, in the order of its probabilities.

    Attributes:
        labels: C different labels.
        token_ids: C different token ids; entry c stands for label c.

    Raises:
        DataError: The two differ in length, are empty or repeat an entry.
    """

    labels: tuple[str, ...]
    token_ids: tuple[int, ...]

    def __post_init__(self) -> None:
        """Refuse what would make two labels one."""
        if not self.labels or len(self.labels) != len(self.token_ids):
            raise DataError(
                "a label set must have one token id for each label, got "
                f"{len(self.labels)} labels and {len(self.token_ids)} token ids"
            )
        for name, entries in (("labels", self.labels), ("token ids", self.token_ids)):
            if len(set(entries)) < len(entries):
                raise DataError(f"a label set must have different {name}, got {list(entries)}")

    def __len__(self) -> int:
        """Return C, the number of labels."""
        return len(self.labels)

    def __contains__(self, label: object) -> bool:
        """Return whether ``label`` is one of the labels."""
        return label in self._positions

    @cached_property
    def _positions(self) -> dict[str, int]:
        return {label: position for position, label in enumerate(self.labels)}

    def index(self, label: str) -> int:
        """Return the position of a label, in 0..C-1.

        Raises:
            DataError: The label is unknown; names the closest known ones.

        Example:
            >>> LabelSet(("ham", "spam"), (10, 11)).index("spam")
            1
        """
        position = self._positions.get(label)
        if position is None:
            close = difflib.get_close_matches(label, self.labels, n=3)
            shown = ", ".join(repr(name) for name in close or self.labels[:3])
            what = "the closest are" if close else "the first are"
            raise DataError(
                f"label must be one of the {len(self.labels)} known labels, got {label!r}; "
                f"{what} {shown}"
            )
        return position


def collect_labels(
    examples: Iterable[Example], *, exclude: Collection[str] = ()
) -> tuple[str, ...]:
    """Return the labels that occur in ``examples``.

    Args:
        examples: Examples of either form; those without a label count for nothing. A question
            contributes all its choices, not only the right one.
        exclude: Labels to leave out, such as the one that marks out-of-scope rows.

    Returns:
        Labels of texts in alphabetical order. Labels of choices in the order A, B, C ... when all
        are single letters, in order of first appearance otherwise (True, False).

    Raises:
        DataError: No label remains.

    Example:
        >>> from dalorra_core.data.examples import TextExample
        >>> collect_labels([TextExample("1", "x", "spam"), TextExample("2", "y", "ham")])
        ('ham', 'spam')
    """
    of_texts: dict[str, None] = {}
    of_choices: dict[str, None] = {}
    for example in examples:
        if isinstance(example, ChoiceExample):
            of_choices.update(dict.fromkeys(choice.label for choice in example.choices))
        elif example.label is not None:
            of_texts[example.label] = None
    if all(len(label) == 1 for label in of_choices):
        of_choices = dict.fromkeys(sorted(of_choices))
    labels = dict.fromkeys((*sorted(of_texts), *of_choices))
    kept = tuple(label for label in labels if label not in exclude)
    if not kept:
        raise DataError(f"the examples must have labels besides {sorted(exclude)}, got none")
    return kept


def resolve_label_tokens(labels: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> LabelSet:
    """Choose one token for each label, all different.

    Labels are served in their order. A single character takes the last token of the bare
    character, as the published protocol does for A, B, C ...; any other label takes the first free
    token of its words with a leading space (the natural continuation of a prompt), then of its
    words without one, then the free token with the lowest id. Special tokens and tokens of white
    space are never taken.

    Args:
        labels: C different labels; underscores count as spaces.
        tokenizer: Tokenizer of the base model.

    Returns:
        The labels in the same order, with their token ids. Equal input, equal output.

    Raises:
        DataError: A label is empty, repeated, or the vocabulary has no token left for it.

    Source:
        methods.md 1.3: never hard-code ids, assert that they are distinct, store them.
    """
    blocked = special_token_ids(tokenizer)
    spare = iter(sorted(set(tokenizer.get_vocab().values()) - blocked))
    taken: dict[int, str] = {}
    for label in labels:
        if not label.strip():
            raise DataError(f"a label must hold more than white space, got {label!r}")
        candidates = _own_tokens(label, tokenizer)
        token_id = next((i for i in candidates if i not in taken and i not in blocked), None)
        if token_id is None:
            token_id = _next_spare(spare, taken, tokenizer)
        if token_id is None:
            raise DataError(
                f"label {label!r} has no token left: the vocabulary has too few usable tokens for "
                f"{len(labels)} labels"
            )
        taken[token_id] = label
    return LabelSet(tuple(labels), tuple(taken))


def last_bare_tokens(labels: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> LabelSet:
    """Give each label the last token of its bare text: the rule of the published protocol.

    Args:
        labels: C different labels.
        tokenizer: Tokenizer of the base model.

    Raises:
        DataError: Two labels end in the same token, or one in a special token.

    Source:
        methods.md 1.3.
    """
    blocked = special_token_ids(tokenizer)
    taken: dict[int, str] = {}
    for label in labels:
        token_id = next(reversed(text_token_ids(tokenizer, label)), None)
        if token_id is None or token_id in blocked:
            raise DataError(f"label {label!r} has no token of its own without a leading space")
        if token_id in taken:
            raise DataError(
                f"data.label_tokens must be 'spaced' here, got 'bare': the labels "
                f"{taken[token_id]!r} and {label!r} end in the same token {token_id}"
            )
        taken[token_id] = label
    return LabelSet(tuple(labels), tuple(taken))


def with_swapped_tokens(label_set: LabelSet, one: str, other: str) -> LabelSet:
    """Return the label set with the tokens of two labels swapped.

    Raises:
        DataError: One of them is not in it.

    Example:
        >>> with_swapped_tokens(LabelSet(("no", "yes"), (10, 11)), "no", "yes").token_ids
        (11, 10)
    """
    places = list(range(len(label_set)))
    first, second = label_set.index(one), label_set.index(other)
    places[first], places[second] = second, first
    return LabelSet(label_set.labels, tuple(label_set.token_ids[i] for i in places))


def _own_tokens(label: str, tokenizer: PreTrainedTokenizerBase) -> Iterator[int]:
    words = label.replace("_", " ").strip() or label
    if len(label) == 1:
        yield from reversed(text_token_ids(tokenizer, label))
    for text in (f" {words}", words):
        for token_id in text_token_ids(tokenizer, text):
            if _says_something(token_id, tokenizer):
                yield token_id


def _next_spare(
    spare: Iterator[int], taken: dict[int, str], tokenizer: PreTrainedTokenizerBase
) -> int | None:
    return next((i for i in spare if i not in taken and _says_something(i, tokenizer)), None)


def _says_something(token_id: int, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether a token is more than white space (SentencePiece has a bare word start)."""
    return bool(str(tokenizer.decode([token_id])).strip())
