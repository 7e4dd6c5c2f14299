"""From a client's question to the tokens and labels of a row, the same for every engine."""

from collections.abc import Callable
from dataclasses import dataclass

from dalorra_core.data.encode import EncodedExample, Truncation
from dalorra_core.data.examples import Choice, ChoiceExample, Example, TextExample
from dalorra_core.errors import DataError, InputError, InputTooLongError
from server.ports import ChoiceQuestion, Question, RowRejectedError, RowTooLongError, TextQuestion

__all__ = ["EncodedQuestion", "encode_question"]

Encode = Callable[[Example, Truncation], EncodedExample]

_ROW_ID = "request"  # the core names rows in its errors; a client knows its own by their pointer


@dataclass(frozen=True, slots=True)
class EncodedQuestion:
    """A question as tokens.

    Attributes:
        example: Its tokens.
        labels: Its labels, in the order of the answer.
        columns: Their places in the adapter's label set.
    """

    example: EncodedExample
    labels: tuple[str, ...]
    columns: tuple[int, ...]


def encode_question(
    question: Question, truncate: Truncation, encode: Encode, names: tuple[str, ...]
) -> EncodedQuestion:
    """Return a question as tokens, with the labels that its answer has.

    Args:
        question: As it was asked.
        truncate: What to do when it is too long.
        encode: The adapter's own encoding.
        names: The adapter's labels.

    Raises:
        RowTooLongError: More tokens than the adapter takes, and nothing may be cut.
        RowRejectedError: A choice's label is unknown, or the form is unsound.
    """
    try:
        example = encode(_example(question), truncate)
    except InputTooLongError as error:
        raise RowTooLongError(error.num_tokens, error.max_tokens) from None
    except (InputError, DataError) as error:
        raise RowRejectedError(str(error)) from None
    own = (
        tuple(choice.label for choice in question.choices)
        if isinstance(question, ChoiceQuestion)
        else ()
    )
    scored = names if example.allowed is None else [names[i] for i in example.allowed]
    labels = (*own, *(label for label in scored if label not in own))
    return EncodedQuestion(example, labels, tuple(names.index(label) for label in labels))


def _example(question: Question) -> Example:
    if isinstance(question, TextQuestion):
        return TextExample(_ROW_ID, question.text)
    choices = tuple(Choice(option.label, option.text) for option in question.choices)
    return ChoiceExample(_ROW_ID, question.question, question.context, choices)
