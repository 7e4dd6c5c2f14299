"""Kinds of fields that several requests share."""

import re
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StrictStr
from pydantic_core import PydanticCustomError

__all__ = ["Clean", "Name", "NonNegative", "Share", "Strict", "StrictShare", "Text"]

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
# strict: neither "0.5" nor true is a number, but 1 is
Share = Annotated[float, Field(strict=True, allow_inf_nan=False, ge=0, le=1)]
StrictShare = Annotated[float, Field(strict=True, allow_inf_nan=False, gt=0, lt=1)]
NonNegative = Annotated[float, Field(strict=True, allow_inf_nan=False, ge=0)]


class Strict(BaseModel):
    """A request's object: unknown fields are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)
