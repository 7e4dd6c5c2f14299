"""The values a question is made of; no files, no tokens, no model.

Two forms exist: a text to be given one of the adapter's labels, and a question that brings its
own choices. What makes an example usable is said once, in :func:`example_fault`: the reader turns
it into a `DataError` that names file and line, the encoder into an `InputError`.
"""

from dataclasses import dataclass

__all__ = [
    "MAX_CHOICES",
    "MIN_CHOICES",
    "Choice",
    "ChoiceExample",
    "Example",
    "TextExample",
    "example_fault",
    "gold_label",
    "text_fault",
]

MIN_CHOICES = 2
MAX_CHOICES = 26  # one capital letter each


@dataclass(frozen=True)
class TextExample:
    """One text to classify.

    Attributes:
        id: Name of the row, unique in its file.
        text: What is classified; not only white space.
        label: The right label, or None where it is not known (prediction).
    """

    id: str
    text: str
    label: str | None = None


@dataclass(frozen=True)
class Choice:
    """One possible answer of a question.

    Attributes:
        label: What is scored, such as ``A`` or ``True``; unique among the choices.
        text: What the label stands for.
    """

    label: str
    text: str


@dataclass(frozen=True)
class ChoiceExample:
    """One question with its own choices.

    Attributes:
        id: Name of the row, unique in its file.
        question: What is asked; not only white space.
        context: Passage the question is about, or None.
        choices: 2 to 26 choices with different labels, in the order they are shown.
        answer: Label of the right choice, or None where it is not known (prediction).
    """

    id: str
    question: str
    context: str | None
    choices: tuple[Choice, ...]
    answer: str | None = None


Example = TextExample | ChoiceExample


def gold_label(example: Example) -> str | None:
    """Return the right label of an example of either form, None where it is not known.

    Example:
        >>> gold_label(TextExample("1", "hello", "greeting"))
        'greeting'
    """
    return example.label if isinstance(example, TextExample) else example.answer


def text_fault(text: str) -> str | None:
    """Return why a string cannot be tokenised, None when it can.

    NUL and lone surrogates are refused because tokenizers and UTF-8 writers treat them each in
    their own way: the same row would not be the same question everywhere.

    Example:
        >>> text_fault("  ")
        'must hold more than white space'
    """
    if not text.strip():
        return "must hold more than white space"
    if "\0" in text:
        return "must not hold the character NUL (U+0000)"
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        found = f"U+{ord(text[error.start]):04X}"
        return f"must be valid Unicode; {found} is half of a surrogate pair"
    return None


def example_fault(example: Example) -> tuple[str, str] | None:
    """Return the first field that makes an example unusable and why, None when it is sound.

    Args:
        example: An example of either form.

    Returns:
        The field's name as it is spelt in a data file, such as ``choices[1].text``, and the
        reason as half a sentence ("must ...").

    Example:
        >>> example_fault(TextExample("1", "", "spam"))
        ('text', 'must hold more than white space')
    """
    if isinstance(example, TextExample):
        strings = {"id": example.id, "text": example.text, "label": example.label}
        return _string_fault(strings)
    strings = {"id": example.id, "question": example.question, "context": example.context}
    for i, choice in enumerate(example.choices):
        strings[f"choices[{i}].label"] = choice.label
        strings[f"choices[{i}].text"] = choice.text
    return _string_fault(strings) or _choices_fault(example)


def _string_fault(strings: dict[str, str | None]) -> tuple[str, str] | None:
    for field, value in strings.items():
        reason = None if value is None else text_fault(value)
        if reason is not None:
            return field, reason
    return None


def _choices_fault(example: ChoiceExample) -> tuple[str, str] | None:
    labels = [choice.label for choice in example.choices]
    if not MIN_CHOICES <= len(labels) <= MAX_CHOICES:
        return "choices", f"must hold {MIN_CHOICES} to {MAX_CHOICES} choices, got {len(labels)}"
    repeated = sorted({label for label in labels if labels.count(label) > 1})
    if repeated:
        return "choices", f"must have different labels, got {repeated[0]!r} more than once"
    if example.answer is not None and example.answer not in labels:
        return "answer", f"must be one of the labels {labels}, got {example.answer!r}"
    return None
