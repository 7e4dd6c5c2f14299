"""Wording of multiple-choice prompts: the published families, as values; renders nothing.

The wording is a fact of other people's protocols (methods.md 1.2), typing errors included where a
family exists to be comparable. Three families:

* ``rl_fixed`` (default): what most published numbers ran, with its slips repaired: choice label
  before choice text, "Choices" spelt right, answer words spelt as the labels that are scored, and
  the passage never cut without a word.
* ``rl_compat``: the same with the slips, for comparison only. Its ARC form puts the choice text
  first; ``rl_compat_obqa`` also has the "Chioces" of OpenBookQA; ``rl_compat_plain`` is its
  WinoGrande and MMLU form.
* ``so``: what the BLoB and DALorRA papers print.
"""

import json
from dataclasses import asdict, dataclass, fields, replace
from functools import lru_cache

from dalorra_core.data.template_fields import check_fields
from dalorra_core.errors import ConfigError

__all__ = ["CHOICE_LAYOUTS", "ChoiceLayout"]


@dataclass(frozen=True)
class ChoiceLayout:
    """The wording of one family.

    A question whose choices only repeat their labels (True, False; yes, no, maybe) is laid out by
    ``words``, any other by ``lettered``; each has a second form for a question with a context.

    Attributes:
        lettered: With ``{question}`` and ``{choices}``.
        lettered_context: With ``{context}``, ``{question}`` and ``{choices}``.
        words: With ``{question}``; ``{words}`` is "yes, no or maybe", ``{quoted_words}`` the same
            in quotation marks.
        words_context: With ``{context}`` and ``{question}``; words as above.
        choice: One choice, with ``{label}`` and ``{text}``.
        joiner: What stands between two choices.
        lower_words: Whether the words are put in lower case.
        max_context_chars: Characters of the context that are kept; None for all.

    Raises:
        ConfigError: A layout lacks a field, repeats one or has an unknown one.
    """

    lettered: str
    lettered_context: str
    words: str
    words_context: str
    choice: str
    joiner: str
    lower_words: bool = False
    max_context_chars: int | None = None

    def __post_init__(self) -> None:
        """Refuse a layout that could not render."""
        spelt = ("words", "quoted_words")
        for name, once, optional in (
            ("lettered", ("question", "choices"), ()),
            ("lettered_context", ("context", "question", "choices"), ()),
            ("words", ("question",), spelt),
            ("words_context", ("context", "question"), spelt),
            ("choice", ("label", "text"), ()),
        ):
            setting = f"choice template field {name!r}"
            check_fields(getattr(self, name), once=once, optional=optional, setting=setting)
        if self.max_context_chars is not None and self.max_context_chars < 1:
            raise ConfigError(
                "choice template field 'max_context_chars' must be at least 1 or null, "
                f"got {self.max_context_chars}"
            )

    def to_json(self) -> str:
        """Return the layout as one line of JSON, keys sorted: equal layouts, equal text."""
        return json.dumps(asdict(self), sort_keys=True, ensure_ascii=False)

    @staticmethod
    @lru_cache(maxsize=64)
    def from_json(text: str) -> "ChoiceLayout":
        """Return the layout that a template's JSON text describes.

        Raises:
            ConfigError: The text is not a JSON object with exactly the layout's fields.
        """
        expected = "choice template must be the JSON object of a layout"
        try:
            found = json.loads(text)
        except ValueError as error:
            raise ConfigError(f"{expected}, got {text!r} ({error})") from error
        if not isinstance(found, dict):
            raise ConfigError(f"{expected}, got {text!r}")
        names = {field.name for field in fields(ChoiceLayout)}
        if set(found) != names:
            wrong = sorted(set(found) ^ names)
            raise ConfigError(f"{expected} with the fields {sorted(names)}; check {wrong}")
        for name, value in found.items():
            _check_type(name, value)
        return ChoiceLayout(**found)


def _check_type(name: str, value: object) -> None:
    if name == "lower_words":
        sound, allowed = isinstance(value, bool), "true or false"
    elif name == "max_context_chars":
        whole = isinstance(value, int) and not isinstance(value, bool)
        sound, allowed = value is None or whole, "a whole number or null"
    else:
        sound, allowed = isinstance(value, str), "a string"
    if not sound:
        raise ConfigError(f"choice template field {name!r} must be {allowed}, got {value!r}")


_ASK = "Return the label of the correct answer for the question below.\n\n"
_RL_COMPAT = ChoiceLayout(
    lettered=_ASK + "Question: {question}\nChoices:\n{choices}\nAnswer:",
    lettered_context=_ASK
    + "Passage: {context}\nQuestion: {question}\nChoices:\n{choices}\nAnswer:",
    words="Answer the question with the words {quoted_words}.\n\n"
    "Question: {question}\nAnswer ({words}):",
    words_context="Read the passage below and answer the question with the words "
    "{quoted_words}.\n\nPassage: {context}\nQuestion: {question}\nAnswer ({words}):",
    choice="{text}) {label}",
    joiner="\n",
    lower_words=True,
    max_context_chars=1024,
)
_SO_ASK = "Select one of the choices that answers the following question: {question} "
_SO_WORDS = "Answer the question with only {words}: {question}"

CHOICE_LAYOUTS: dict[str, ChoiceLayout] = {
    "rl_fixed": replace(
        _RL_COMPAT, choice="{label}) {text}", lower_words=False, max_context_chars=None
    ),
    "rl_compat": _RL_COMPAT,
    "rl_compat_obqa": replace(
        _RL_COMPAT, lettered=_RL_COMPAT.lettered.replace("Choices:", "Chioces:")
    ),
    "rl_compat_plain": replace(_RL_COMPAT, choice="{label}) {text}"),
    "so": ChoiceLayout(
        lettered=_SO_ASK + "Choices: {choices} Answer:",
        lettered_context=_SO_ASK + "Context: {context} Choices: {choices} Answer:",
        words=_SO_WORDS,
        words_context=_SO_WORDS + " Context: {context}",
        choice="{label}. {text}.",
        joiner=" ",
    ),
}
