"""Examples -> prompt text; no tokens.

A template is one string, stored in the artifact with its hash: an adapter keeps the prompt it was
trained with even when the defaults here change. For texts it is the prompt with ``{text}``. For
questions it is a JSON object, the layout (see :mod:`dalorra_core.data.choice_layout`).
"""

import hashlib
from dataclasses import dataclass
from typing import Literal

from dalorra_core.data.choice_layout import CHOICE_LAYOUTS, ChoiceLayout
from dalorra_core.data.examples import ChoiceExample, Example, TextExample
from dalorra_core.data.template_fields import check_fields, fill, fill_around
from dalorra_core.errors import ConfigError

__all__ = [
    "CHOICE_TEMPLATES",
    "DEFAULT_CHOICE_TEMPLATE",
    "DEFAULT_TEXT_TEMPLATE",
    "TEXT_TEMPLATES",
    "PromptKind",
    "PromptTemplate",
    "RenderedPrompt",
    "prompt_template",
    "render",
]

PromptKind = Literal["text", "choice"]


@dataclass(frozen=True)
class PromptTemplate:
    r"""How an example of one form becomes a prompt.

    Attributes:
        kind: ``text`` or ``choice``: the form of example it renders.
        name: A name of this module, or ``custom``.
        template: For texts a string that holds ``{text}`` once (write ``{{`` for a brace); for
            questions the JSON text of a layout.

    Raises:
        ConfigError: The template is not of its kind's form.

    Example:
        >>> PromptTemplate("text", "a", "{text}:") == PromptTemplate("text", "b", "{text}:")
        False
    """

    kind: PromptKind
    name: str
    template: str

    def __post_init__(self) -> None:
        """Refuse a template that could not render."""
        if self.kind == "text":
            check_fields(self.template, once=("text",), setting="text template")
        else:
            ChoiceLayout.from_json(self.template)

    @property
    def sha256(self) -> str:
        """Hex digest over kind and template; the name does not count."""
        return hashlib.sha256(f"{self.kind}\0{self.template}".encode()).hexdigest()


@dataclass(frozen=True)
class RenderedPrompt:
    """A prompt in three parts, in order; the prompt is ``head + body + tail``.

    Attributes:
        head: What stands before the body; never shortened.
        body: The only part that truncation may shorten: the text; of a question its context, or
            the question itself where it has none.
        tail: What stands after the body; never shortened.
        shortened: Whether the template itself has cut the context (``rl_compat`` does).
    """

    head: str
    body: str
    tail: str
    shortened: bool = False

    @property
    def text(self) -> str:
        """The whole prompt."""
        return self.head + self.body + self.tail


TEXT_TEMPLATES: dict[str, PromptTemplate] = {
    "intent": PromptTemplate("text", "intent", "{text}\nIntent:"),
    "label": PromptTemplate("text", "label", "{text}\nLabel:"),
}
CHOICE_TEMPLATES: dict[str, PromptTemplate] = {
    name: PromptTemplate("choice", name, layout.to_json())
    for name, layout in CHOICE_LAYOUTS.items()
}
DEFAULT_TEXT_TEMPLATE = TEXT_TEMPLATES["intent"]
DEFAULT_CHOICE_TEMPLATE = CHOICE_TEMPLATES["rl_fixed"]


def prompt_template(kind: PromptKind, name_or_template: str | None = None) -> PromptTemplate:
    r"""Return a template by name, the default, or one the user wrote.

    Args:
        kind: ``text`` or ``choice``.
        name_or_template: None for the default of the kind, a name from `TEXT_TEMPLATES` or
            `CHOICE_TEMPLATES`, or a template (a string with a brace).

    Raises:
        ConfigError: The name is unknown or the template is not of its form.

    Example:
        >>> prompt_template("text", "Message: {text}\nSpam?").name
        'custom'
    """
    known = TEXT_TEMPLATES if kind == "text" else CHOICE_TEMPLATES
    if name_or_template is None:
        return DEFAULT_TEXT_TEMPLATE if kind == "text" else DEFAULT_CHOICE_TEMPLATE
    if name_or_template in known:
        return known[name_or_template]
    if "{" not in name_or_template:
        form = "a string with {text}" if kind == "text" else "the JSON text of a layout"
        raise ConfigError(
            f"{kind} template must be one of {', '.join(known)}, or {form}; "
            f"got {name_or_template!r}"
        )
    return PromptTemplate(kind, "custom", name_or_template)


def render(example: Example, template: PromptTemplate) -> RenderedPrompt:
    r"""Return the prompt of an example.

    Args:
        example: An example of the template's kind.
        template: How to lay it out.

    Raises:
        ConfigError: The template is for the other form of example.

    Source:
        methods.md 1.2 for the layouts of questions.

    Example:
        >>> render(TextExample("1", "hi"), DEFAULT_TEXT_TEMPLATE).text
        'hi\nIntent:'
    """
    found = "text" if isinstance(example, TextExample) else "choice"
    if found != template.kind:
        raise ConfigError(
            f"template {template.name!r} is for examples of kind {template.kind!r}, got one of "
            f"kind {found!r}"
        )
    if isinstance(example, ChoiceExample):
        return _render_choice(example, ChoiceLayout.from_json(template.template))
    head, tail = fill_around(template.template, {}, "text")
    return RenderedPrompt(head, example.text, tail)


def _render_choice(example: ChoiceExample, layout: ChoiceLayout) -> RenderedPrompt:
    labels = [choice.label for choice in example.choices]
    is_words = all(c.text.casefold() == c.label.casefold() for c in example.choices)
    words = [label.lower() for label in labels] if layout.lower_words else labels
    lines = [fill(layout.choice, {"label": c.label, "text": c.text}) for c in example.choices]
    values = {
        "question": example.question,
        "choices": layout.joiner.join(lines),
        "words": _listed(words),
        "quoted_words": _listed([f"'{word}'" for word in words]),
    }
    if example.context is None:
        head, tail = fill_around(layout.words if is_words else layout.lettered, values, "question")
        return RenderedPrompt(head, example.question, tail)
    with_context = layout.words_context if is_words else layout.lettered_context
    head, tail = fill_around(with_context, values, "context")
    body = example.context[: layout.max_context_chars]
    return RenderedPrompt(head, body, tail, shortened=body != example.context)


def _listed(words: list[str]) -> str:
    return " or ".join(filter(None, (", ".join(words[:-1]), words[-1])))
