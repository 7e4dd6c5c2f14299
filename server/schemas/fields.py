"""Kinds of fields that several requests share."""

import re
from typing import Annotated

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    StrictInt,
    StrictStr,
    Tag,
    WithJsonSchema,
)
from pydantic_core import PydanticCustomError

__all__ = [
    "LIST_TAG",
    "STRING_TAG",
    "Clean",
    "Name",
    "NonNegative",
    "NumSamples",
    "Share",
    "Strict",
    "StrictShare",
    "Text",
    "WrappedText",
    "string_or_list",
    "unwrapped",
]

# Tags name the branches of a union; "<" cannot begin a field name, so pointers can leave them out
STRING_TAG, LIST_TAG = "<string>", "<list>"
_SURROGATE = re.compile("[\ud800-\udfff]")


def _clean(text: str) -> str:
    if "\x00" in text:
        raise PydanticCustomError("nul_character", "must not contain a NUL character")
    if _SURROGATE.search(text):
        raise PydanticCustomError("lone_surrogate", "must not contain a lone surrogate")
    return text


def _not_blank(text: str) -> str:
    if not text.strip():
        raise PydanticCustomError("empty_text", "must not be empty or only white space")
    return _clean(text)


Clean = Annotated[StrictStr, AfterValidator(_clean)]
Text = Annotated[StrictStr, AfterValidator(_not_blank)]
Name = Annotated[StrictStr, AfterValidator(_not_blank), Field(max_length=128)]


def _own_number(value: object) -> object:
    if isinstance(value, str) and value != "auto":
        raise PydanticCustomError("whole_number_or_auto", 'must be a whole number or "auto"')
    return None if value == "auto" else value


NumSamples = Annotated[
    Annotated[StrictInt, Field(ge=1)] | None,
    BeforeValidator(_own_number),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "integer", "minimum": 1},
                {"type": "string", "const": "auto"},
                {"type": "null"},
            ]
        }
    ),
]
"""M; None, or in a body ``"auto"``, for the adapter's own number."""


def string_or_list(value: object) -> str:
    """Return the tag of a value that is to be a string or a list."""
    return LIST_TAG if isinstance(value, list) else STRING_TAG


def _alone(texts: list[str]) -> list[str]:
    if len(texts) > 1:
        raise PydanticCustomError(
            "pair_of_texts", "must be one text: no adapter here answers a pair of texts"
        )
    return texts


WrappedText = Annotated[
    Annotated[Text, Tag(STRING_TAG)]
    | Annotated[
        list[Text],
        Field(min_length=1),
        AfterValidator(_alone),
        WithJsonSchema(
            {"type": "array", "items": {"type": "string"}, "minItems": 1, "maxItems": 1}
        ),
        Tag(LIST_TAG),
    ],
    Discriminator(string_or_list),
]
"""A text, or a list that holds only it."""


def unwrapped(entry: str | list[str]) -> str:
    """Return the text itself."""
    return entry if isinstance(entry, str) else entry[0]


# strict: neither "0.5" nor true is a number, but 1 is
Share = Annotated[float, Field(strict=True, allow_inf_nan=False, ge=0, le=1)]
StrictShare = Annotated[float, Field(strict=True, allow_inf_nan=False, gt=0, lt=1)]
NonNegative = Annotated[float, Field(strict=True, allow_inf_nan=False, ge=0)]


class Strict(BaseModel):
    """A request's object: unknown fields are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)
