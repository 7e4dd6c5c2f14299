"""The body of ``POST /v1/classify``. Unknown fields are errors; nothing is silently ignored."""

import string
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import (
    BaseModel,
    BeforeValidator,
    Discriminator,
    Field,
    FiniteFloat,
    StrictBool,
    StrictInt,
    Tag,
    model_validator,
)
from pydantic_core import PydanticCustomError, PydanticKnownError

from server.ports import ChoiceOption, ChoiceQuestion, Design, Estimator, Question, TextQuestion
from server.schemas.fields import LIST_TAG, STRING_TAG, Clean, Name, NumSamples, Strict, Text
from server.schemas.policies import FORM_TAGS, PolicyForm
from server.schemas.vllm import VllmFields

__all__ = [
    "ClassifyRequest",
    "QuestionItem",
    "TextItem",
    "field_names",
    "is_union_tag",
]

MAX_CHOICES = len(string.ascii_uppercase)
_STRING, _LIST = STRING_TAG, LIST_TAG
_TEXT, _QUESTION, _LABELLED = "<text>", "<question>", "<obj>"


class TextItem(Strict):
    """A text with the client's own id, which is sent back."""

    id: Name | None = None
    text: Text


class ChoiceItem(Strict):
    """One possible answer with its own label."""

    label: Name
    text: Text


def _choice_kind(value: object) -> str:
    return _LABELLED if isinstance(value, dict | ChoiceItem) else _STRING


Choice = Annotated[
    Annotated[Text, Tag(_STRING)] | Annotated[ChoiceItem, Tag(_LABELLED)],
    Discriminator(_choice_kind),
]


class QuestionItem(Strict):
    """A question with 2 to 26 answers; answers given as strings get the letters A, B, C ..."""

    id: Name | None = None
    question: Text
    choices: Annotated[list[Choice], Field(min_length=2, max_length=MAX_CHOICES)]
    context: Text | None = None

    @model_validator(mode="after")
    def _check_choices(self) -> Self:
        labels = [choice.label for choice in self.choices if isinstance(choice, ChoiceItem)]
        if labels and len(labels) != len(self.choices):
            raise PydanticCustomError(
                "mixed_forms", "choices must be all strings or all objects with label and text"
            )
        if len(set(labels)) != len(labels):
            raise PydanticCustomError("duplicate_label", "two choices have the same label")
        return self

    def options(self) -> tuple[ChoiceOption, ...]:
        """Return the choices with their labels, in the client's order."""
        return tuple(
            ChoiceOption(choice.label, choice.text)
            if isinstance(choice, ChoiceItem)
            else ChoiceOption(letter, choice)
            for letter, choice in zip(string.ascii_uppercase, self.choices, strict=False)
        )


def _item_kind(value: object) -> str:
    if isinstance(value, QuestionItem):
        return _QUESTION
    if isinstance(value, dict):
        return _QUESTION if "question" in value or "choices" in value else _TEXT
    return _TEXT if isinstance(value, TextItem) else _STRING


def _input_kind(value: object) -> str:
    return _LIST if isinstance(value, list) else _item_kind(value)


Item = Annotated[
    Annotated[Text, Tag(_STRING)]
    | Annotated[TextItem, Tag(_TEXT)]
    | Annotated[QuestionItem, Tag(_QUESTION)],
    Discriminator(_item_kind),
]
Input = Annotated[
    Annotated[Text, Tag(_STRING)]
    | Annotated[TextItem, Tag(_TEXT)]
    | Annotated[QuestionItem, Tag(_QUESTION)]
    | Annotated[list[Item], Field(min_length=1), Tag(_LIST)],
    Discriminator(_input_kind),
]
_MAX_METADATA = 16


def _check_number(value: object) -> object:
    """Refuse too many entries before each of them is checked against every form of a value."""
    if isinstance(value, dict) and len(value) > _MAX_METADATA:
        counts = {"max_length": _MAX_METADATA, "actual_length": len(value)}
        raise PydanticKnownError("too_long", {"field_type": "Dictionary", **counts})
    return value


MetadataValue = (
    Annotated[Clean, Field(max_length=512)] | StrictBool | StrictInt | FiniteFloat | None
)
Metadata = Annotated[
    dict[Annotated[Clean, Field(min_length=1, max_length=64)], MetadataValue],
    Field(max_length=_MAX_METADATA),
    BeforeValidator(_check_number),
]


class ClassifyRequest(VllmFields):
    """One or more texts to classify, or questions to answer, with one adapter."""

    model: Name | None = Field(
        default=None,
        description="Adapter, as `name` or `name:revision`. May be left out when one is loaded.",
    )
    input: Input = Field(
        description=(
            "For a text adapter: a string, a list of strings, or a list of `{id, text}`. For a "
            "multiple-choice adapter: `{question, choices, context}` or a list of them; choices "
            "are strings (labelled A, B, ...) or `{label, text}`. A list holds one form only."
        )
    )
    num_samples: NumSamples = Field(
        default=None,
        description=(
            "M, the posterior samples that are averaged; `auto`, or left out: the adapter's own "
            "number, that of its sampling plan where it has one. "
            "Only 1 with `mean_mask` and for methods that do not sample; only the number of "
            "functions where that is fixed, as for an ensemble."
        ),
    )
    estimator: Estimator | None = Field(
        default=None,
        description=(
            "`monte_carlo` averages M sampled functions. `mean_mask` is one deterministic pass: "
            "cheaper, and without epistemic scores. `linearised` averages draws of the network "
            "linearised in its gates, for a forward pass and a backward one for each label: for "
            "method `dalorra` and few labels. If left out: `monte_carlo` where `num_samples` or "
            "`design` is given, else the adapter's own."
        ),
    )
    seed: Annotated[StrictInt, Field(ge=0, lt=2**63)] | None = Field(
        default=None,
        description="Picks the set of posterior samples. Same seed and revision, same answer.",
    )
    design: Design | None = Field(
        default=None,
        description=(
            "How the M samples are drawn together; the adapter's own if left out. `iid`: each by "
            "itself. `stratified`: every gate is on in the same number of them, to within one, for "
            "less error at a small M. `antithetic`: pairs of opposites. Not every method has all."
        ),
    )
    policy: PolicyForm | None = Field(
        default=None,
        description=(
            "Decision rule, in one of three forms: a policy of the adapter by `name`; `max_risk`, "
            "which takes the certified policy with the largest target risk up to it; or limits of "
            "your own, which carry no guarantee. If left out: the server's locked policy, else the "
            "adapter's first. Where a policy is locked, another can only be stricter."
        ),
    )
    top_k: Annotated[StrictInt, Field(ge=1)] | None = Field(
        default=None,
        description=(
            "Add `top`: the so many most probable labels, best first (all of them when there are "
            "fewer). `labels` and `probs` stay complete."
        ),
    )
    include: list[Literal["samples", "timings"]] = Field(
        default=[],
        max_length=2,
        description="`samples`: the M distributions of each row. `timings`: seconds per stage.",
    )
    truncate: Literal["none", "start", "end"] = Field(
        default="none",
        description=(
            "What to do with a text that is too long: refuse it (422), or cut its start or its "
            "end. A row that was cut says so and is never accepted."
        ),
    )
    metadata: Metadata | None = Field(
        default=None, description="Up to 16 plain values of the client's own, sent back as given."
    )

    @model_validator(mode="after")
    def _check_forms(self) -> Self:
        if len({type(item) for item in self.items}) > 1:
            raise PydanticCustomError("mixed_forms", "input must not mix different forms")
        return self

    @property
    def items(self) -> list[str | TextItem | QuestionItem]:
        """The rows, one or more."""
        return list(self.input) if isinstance(self.input, list) else [self.input]

    def questions(self) -> list[Question]:
        """Return the rows as the engine's values."""
        return [_question(item) for item in self.items]

    def ids(self) -> list[str | None]:
        """Return the client's id of each row; None where it gave none."""
        return [None if isinstance(item, str) else item.id for item in self.items]

    def pointer(self, index: int) -> str:
        """Return the JSON pointer to a row."""
        return f"#/input/{index}" if isinstance(self.input, list) else "#/input"


def _question(item: str | TextItem | QuestionItem) -> Question:
    if isinstance(item, QuestionItem):
        return ChoiceQuestion(item.question, item.options(), item.context)
    return TextQuestion(item.text if isinstance(item, TextItem) else item)


def is_union_tag(part: object) -> bool:
    """Whether a part of a validation error's location names a branch and no field."""
    return isinstance(part, str) and part.startswith("<") and part in _TAGS


def field_names(location: tuple[Any, ...], root: type[BaseModel]) -> list[str]:
    """Return the fields allowed beside the one at this location (for close names)."""
    model = root
    for part in location[:-1]:
        if part in _FIELDS_AT:
            model = _FIELDS_AT[part]
        elif part in model.model_fields:
            model = _object_in(model.model_fields[str(part)].annotation) or model
    # our own first: who misspells a field hardly meant one of vLLM's
    return sorted(model.model_fields, key=lambda name: name in VllmFields.model_fields)


def _object_in(annotation: Any) -> type[BaseModel] | None:
    """Return the one kind of object that a field holds, perhaps in a list; None when none is."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    found = {_object_in(argument) for argument in get_args(annotation)} - {None}
    return found.pop() if len(found) == 1 else None


_FIELDS_AT: dict[object, type[BaseModel]] = {
    _TEXT: TextItem,
    _QUESTION: QuestionItem,
    _LABELLED: ChoiceItem,
    **FORM_TAGS,
}
_TAGS = {_STRING, _LIST, *_FIELDS_AT}
