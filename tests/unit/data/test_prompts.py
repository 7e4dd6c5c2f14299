"""dalorra_core.data.prompts and choice_layout: the wording is compared letter by letter."""

import json

import pytest

from dalorra_core.data.choice_layout import CHOICE_LAYOUTS, ChoiceLayout
from dalorra_core.data.examples import Choice, ChoiceExample, Example, TextExample
from dalorra_core.data.prompts import (
    CHOICE_TEMPLATES,
    DEFAULT_CHOICE_TEMPLATE,
    DEFAULT_TEXT_TEMPLATE,
    PromptTemplate,
    prompt_template,
    render,
)
from dalorra_core.errors import ConfigError

SCIENCE = ChoiceExample("1", "Which is hot?", None, (Choice("A", "sun"), Choice("B", "ice")), "A")
TRUE_FALSE = (Choice("True", "True"), Choice("False", "False"))
BOOLEAN = ChoiceExample("2", "is ice hot", "Ice is cold.", TRUE_FALSE, "False")
ABSTRACT = ChoiceExample(
    "3", "Does it?", "It may.", tuple(Choice(w, w) for w in ("yes", "no", "maybe")), None
)
HEADER = "Return the label of the correct answer for the question below.\n\n"
TELL = "Answer the question with the words "
SELECT = "Select one of the choices that answers the following question: "
READ = "Read the passage below and answer the question with the words "


@pytest.mark.parametrize(
    ("name", "example", "expected"),
    [
        (
            "rl_fixed",
            SCIENCE,
            HEADER + "Question: Which is hot?\nChoices:\nA) sun\nB) ice\nAnswer:",
        ),
        (
            "rl_compat",
            SCIENCE,
            HEADER + "Question: Which is hot?\nChoices:\nsun) A\nice) B\nAnswer:",
        ),
        (
            "rl_compat_obqa",
            SCIENCE,
            HEADER + "Question: Which is hot?\nChioces:\nsun) A\nice) B\nAnswer:",
        ),
        (
            "rl_compat_plain",
            SCIENCE,
            HEADER + "Question: Which is hot?\nChoices:\nA) sun\nB) ice\nAnswer:",
        ),
        (
            "so",
            SCIENCE,
            SELECT + "Which is hot? Choices: A. sun. B. ice. Answer:",
        ),
        (
            "rl_fixed",
            BOOLEAN,
            READ + "'True' or 'False'.\n\nPassage: Ice is cold.\nQuestion: is ice hot\n"
            "Answer (True or False):",
        ),
        (
            "rl_compat",
            BOOLEAN,
            READ + "'true' or 'false'.\n\nPassage: Ice is cold.\nQuestion: is ice hot\n"
            "Answer (true or false):",
        ),
        (
            "so",
            BOOLEAN,
            "Answer the question with only True or False: is ice hot Context: Ice is cold.",
        ),
        (
            "rl_fixed",
            ABSTRACT,
            READ + "'yes', 'no' or 'maybe'.\n\nPassage: It may.\nQuestion: Does it?\n"
            "Answer (yes, no or maybe):",
        ),
        (
            "rl_fixed",
            ChoiceExample("4", "is ice hot", None, TRUE_FALSE, None),
            TELL + "'True' or 'False'.\n\nQuestion: is ice hot\nAnswer (True or False):",
        ),
        (
            "rl_fixed",
            ChoiceExample("5", "Which is hot?", "Look up.", SCIENCE.choices, None),
            HEADER + "Passage: Look up.\nQuestion: Which is hot?\nChoices:\nA) sun\nB) ice\n"
            "Answer:",
        ),
    ],
)
def test_questions_are_worded_as_published(
    name: str, example: ChoiceExample, expected: str
) -> None:
    assert render(example, CHOICE_TEMPLATES[name]).text == expected


@pytest.mark.parametrize(
    ("example", "body"), [(SCIENCE, "Which is hot?"), (BOOLEAN, "Ice is cold.")]
)
@pytest.mark.parametrize("name", CHOICE_TEMPLATES)
def test_the_body_is_the_context_or_else_the_question(
    name: str, example: ChoiceExample, body: str
) -> None:
    assert render(example, CHOICE_TEMPLATES[name]).body == body


def test_texts_end_with_the_question_for_the_label() -> None:
    example = TextExample("1", "hello {text} {0} %s")
    assert render(example, DEFAULT_TEXT_TEMPLATE).text == "hello {text} {0} %s\nIntent:"
    assert render(example, prompt_template("text", "label")).tail == "\nLabel:"
    custom = render(example, prompt_template("text", "Message {{1}}: {text}?"))
    assert (custom.head, custom.tail) == ("Message {1}: ", "?")


def test_only_the_compatible_family_cuts_a_passage_and_says_so() -> None:
    long = ChoiceExample("1", "q", "x" * 1025, TRUE_FALSE, None)
    compatible = render(long, CHOICE_TEMPLATES["rl_compat"])
    assert compatible.body == "x" * 1024
    assert compatible.shortened
    fixed = render(long, CHOICE_TEMPLATES["rl_fixed"])
    assert fixed.body == long.context
    assert not fixed.shortened


def test_the_hash_depends_on_kind_and_template_only() -> None:
    first = PromptTemplate("text", "first", "{text}:")
    assert first.sha256 == PromptTemplate("text", "second", "{text}:").sha256
    assert first.sha256 != PromptTemplate("text", "first", "{text} :").sha256
    assert len({template.sha256 for template in CHOICE_TEMPLATES.values()}) == 5


def test_an_adapter_keeps_the_wording_it_was_trained_with() -> None:
    """The template's text alone decides: a template of another name renders the same."""
    stored = PromptTemplate("choice", "custom", CHOICE_TEMPLATES["so"].template)
    assert render(SCIENCE, stored) == render(SCIENCE, CHOICE_TEMPLATES["so"])


def test_defaults_and_names() -> None:
    assert prompt_template("text") is DEFAULT_TEXT_TEMPLATE
    assert prompt_template("choice") is DEFAULT_CHOICE_TEMPLATE
    assert prompt_template("choice", "so").name == "so"


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("", "exactly once, got 0 times"),
        ("no field", "exactly once, got 0 times"),
        ("{text}{text}", "exactly once, got 2 times"),
        ("{text} {label}", "no fields besides {text}, got {label}"),
        ("{text} {}", "no fields besides {text}, got {}"),
        ("{text!r}", "plain fields"),
        ("{text:>9}", "plain fields"),
        ("{text.__class__}", "exactly once, got 0 times"),
        ("{text} {", "not well formed"),
        ("{text} }", "write {{ and }}"),
    ],
)
def test_a_text_template_that_cannot_render_is_refused(template: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        PromptTemplate("text", "custom", template)
    assert said in str(caught.value)


SOUND = json.loads(CHOICE_LAYOUTS["rl_fixed"].to_json())


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("not json", "must be the JSON object of a layout, got 'not json'"),
        ("[1]", "must be the JSON object of a layout"),
        ("{}", "check ['choice', 'joiner'"),
        (json.dumps({**SOUND, "extra": 1}), "check ['extra']"),
        (json.dumps({**SOUND, "choice": "{label}"}), "field 'choice' must contain"),
        (json.dumps({**SOUND, "words": "{question} {who}"}), "got {who}"),
        (json.dumps({**SOUND, "lettered": 3}), "field 'lettered' must be a string, got 3"),
        (json.dumps({**SOUND, "lower_words": 1}), "'lower_words' must be true or false"),
        (json.dumps({**SOUND, "max_context_chars": 0}), "at least 1 or null, got 0"),
        (json.dumps({**SOUND, "max_context_chars": True}), "a whole number or null, got True"),
    ],
)
def test_a_choice_template_that_cannot_render_is_refused(template: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        PromptTemplate("choice", "custom", template)
    assert said in str(caught.value)


def test_a_layout_survives_its_json_text() -> None:
    for layout in CHOICE_LAYOUTS.values():
        assert ChoiceLayout.from_json(layout.to_json()) == layout


@pytest.mark.parametrize(
    ("example", "template"),
    [(SCIENCE, DEFAULT_TEXT_TEMPLATE), (TextExample("1", "x"), DEFAULT_CHOICE_TEMPLATE)],
)
def test_a_template_of_the_other_form_is_refused(
    example: Example, template: PromptTemplate
) -> None:
    with pytest.raises(ConfigError, match=f"is for examples of kind '{template.kind}'"):
        render(example, template)


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"must be one of intent, label, or a string with {text}"):
        prompt_template("text", "intents")
    with pytest.raises(ConfigError, match="rl_compat_plain, so, or the JSON text of a layout"):
        prompt_template("choice", "ba")
