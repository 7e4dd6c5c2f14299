"""One example -> token ids and label positions; decides what truncation may cut.

This is the one place where a prompt becomes tokens, in training and in serving alike. Nothing is
cut unless the caller asks for it, and then only the body: the instruction and the final "Answer:"
stay.
"""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

from transformers import PreTrainedTokenizerBase

from dalorra_core.data.examples import ChoiceExample, Example, example_fault, gold_label
from dalorra_core.data.labels import LabelSet
from dalorra_core.data.prompts import PromptTemplate, RenderedPrompt, render
from dalorra_core.data.tokenization import body_offsets, end_token_id, prompt_token_ids
from dalorra_core.errors import ConfigError, DataError, InputError, InputTooLongError

__all__ = ["EncodedExample", "Truncation", "UnknownLabel", "encode"]

Truncation = Literal["none", "start", "end"]
UnknownLabel = Literal["error", "ignore"]


@dataclass(frozen=True)
class EncodedExample:
    """One example, ready to be put in a batch.

    Attributes:
        id: Name of the row.
        token_ids: Tokens of the whole prompt, at least one.
        label: Position of the right label in the label set; -1 for none or one outside the set.
        allowed: Positions of the labels the question is scored over, ascending; None for all.
        truncated: Whether part of the input was cut off.
    """

    id: str
    token_ids: tuple[int, ...]
    label: int
    allowed: tuple[int, ...] | None
    truncated: bool


def encode(  # noqa: PLR0913  one call says all that decides the tokens
    example: Example,
    *,
    tokenizer: PreTrainedTokenizerBase,
    template: PromptTemplate,
    label_set: LabelSet,
    max_tokens: int,
    truncate: Truncation = "none",
    unknown_label: UnknownLabel = "error",
    union: Collection[str] = (),
    append_eos: bool = False,
) -> EncodedExample:
    """Return an example as token ids.

    Args:
        example: A text or a question, with or without its label.
        tokenizer: Tokenizer of the base model; a fast one if ``truncate`` is not ``none``.
        template: Prompt of the adapter, of the example's kind.
        label_set: Labels of the adapter.
        max_tokens: Most tokens of a prompt, those the tokenizer adds itself included; >= 1.
        truncate: What to do with a longer prompt: ``none`` refuses it, ``start`` drops the
            beginning of the body, ``end`` its end. Head and tail of the prompt are never cut.
        unknown_label: A right label outside ``label_set``, such as ``oos``, is an ``error`` or
            becomes -1 (``ignore``).
        union: Labels that a question is scored over besides its own choices; in ``label_set``.
        append_eos: Whether the end-of-text token ends the prompt.

    Raises:
        ConfigError: ``max_tokens`` is below 1, the template is for the other form, or a tokenizer
            that cannot tell where its tokens lie was to truncate, or one without an end-of-text
            token was to append it.
        InputError: The example is empty or unsound, or too long even with an empty body.
        InputTooLongError: The prompt is too long and ``truncate`` is ``none``.
        DataError: The right label, or a choice's label, is not in ``label_set``.
    """
    if max_tokens < 1:
        raise ConfigError(f"max_tokens must be at least 1, got {max_tokens}")
    fault = example_fault(example)
    if fault is not None:
        raise InputError(f"{fault[0]} {fault[1]}")
    label = _gold_position(example, label_set, unknown_label)
    allowed = _allowed_positions(example, label_set, union)
    prompt = render(example, template)
    token_ids = prompt_token_ids(tokenizer, prompt.text)
    end = (end_token_id(tokenizer),) if append_eos else ()
    limit = max_tokens - len(end)
    is_cut = len(token_ids) > limit
    if is_cut:
        if truncate == "none":
            raise InputTooLongError(len(token_ids) + len(end), max_tokens)
        token_ids = _cut(prompt, len(token_ids), tokenizer, limit, truncate)
    return EncodedExample(
        id=example.id,
        token_ids=(*token_ids, *end),
        label=label,
        allowed=allowed,
        truncated=is_cut or prompt.shortened,
    )


def _gold_position(example: Example, label_set: LabelSet, unknown_label: UnknownLabel) -> int:
    """Return the position of the right label, -1 for none."""
    gold = gold_label(example)
    if gold is None or (unknown_label == "ignore" and gold not in label_set):
        return -1
    try:
        return label_set.index(gold)
    except DataError as error:
        raise DataError(f"row {example.id!r}: {error}") from error


def _allowed_positions(
    example: Example, label_set: LabelSet, union: Collection[str]
) -> tuple[int, ...] | None:
    """Return the positions of a question's own choices and of ``union``; None for all labels."""
    if not isinstance(example, ChoiceExample):
        return None
    own = {label_set.index(choice.label) for choice in example.choices}
    together = own | {label_set.index(label) for label in union}
    return None if union and len(together) == len(label_set) else tuple(sorted(together))


def _cut(
    prompt: RenderedPrompt,
    num_tokens: int,
    tokenizer: PreTrainedTokenizerBase,
    max_tokens: int,
    truncate: Truncation,
) -> list[int]:
    """Return the tokens of the prompt with as much of its body as fits.

    The body is cut between two of its tokens and the whole prompt tokenised again, so the result is
    what the shorter text would have given. Merges across the cut can add a token or two: then more
    is dropped until it fits.
    """
    if not tokenizer.is_fast:
        raise ConfigError(
            f"truncate={truncate!r} needs a fast tokenizer, got {type(tokenizer).__name__}"
        )
    offsets = body_offsets(tokenizer, prompt.body)
    kept = len(offsets) - (num_tokens - max_tokens)
    while kept > 0:
        start = offsets[-kept][0] if truncate == "start" else 0
        end = len(prompt.body) if truncate == "start" else offsets[kept - 1][1]
        text = prompt.head + prompt.body[start:end] + prompt.tail
        token_ids = prompt_token_ids(tokenizer, text)
        if len(token_ids) <= max_tokens:
            return token_ids
        kept -= len(token_ids) - max_tokens
    token_ids = prompt_token_ids(tokenizer, prompt.head + prompt.tail)
    if len(token_ids) > max_tokens:
        raise InputError(
            f"the prompt has {len(token_ids)} tokens without any of the text that may be cut; "
            f"the limit is {max_tokens}"
        )
    return token_ids
