"""What vLLM's ``/classify`` takes besides ``model`` and ``input``: honoured, or refused by name.

A field is honoured where the asked value is what happens here, and refused with the reason where it
is not. None is ignored.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, StrictBool, StrictInt, WithJsonSchema, model_validator
from pydantic_core import PydanticCustomError

from server.ports import Priority
from server.schemas.fields import Strict

__all__ = ["INSTEAD", "VllmFields"]

INSTEAD: Mapping[str, str] = {
    "cache_salt": "nothing is cached between requests, so there is nothing to salt",
    "messages": "chats are not classified; send the text as input",
    "mm_processor_kwargs": "only text is classified",
    "padding": "padding never changes an answer here, so there is nothing to choose",
    "request_id": "send the header X-Request-Id",
    "user": "send it in metadata, which is sent back as given",
}
"""What to do instead of sending one of vLLM's fields that have no meaning here."""


def _only_true(reason: str) -> AfterValidator:
    def check(value: bool) -> bool:  # noqa: FBT001 - pydantic calls it
        if not value:
            raise PydanticCustomError("not_supported", "can only be true: {why}", {"why": reason})
        return value

    return AfterValidator(check)


def _whole_room(tokens: int) -> int:
    if tokens != -1:
        raise PydanticCustomError(
            "not_supported",
            "can only be -1, all the room that the adapter has: its prompt has a fixed part, so a "
            "number of tokens would not say how much of the text is kept",
        )
    return tokens


_TRUE = WithJsonSchema({"type": "boolean", "const": True})
Probabilities = Annotated[
    StrictBool,
    _only_true("answers are means of probabilities over samples, and have no raw scores"),
    _TRUE,
]
SpecialTokens = Annotated[
    StrictBool, _only_true("an adapter's prompt has the tokens it was trained with"), _TRUE
]
WholeRoom = Annotated[
    StrictInt, AfterValidator(_whole_room), WithJsonSchema({"type": "integer", "const": -1})
]


class VllmFields(Strict):
    """Fields for clients of vLLM; ``truncate`` and ``X-Priority`` are their names here."""

    priority: Annotated[StrictInt, Field(ge=0, lt=2**63)] | None = Field(
        default=None,
        description=(
            "vLLM's: 0 is as usual, and anything later goes with the header `X-Priority: batch`. "
            "Nothing is earlier than usual."
        ),
    )
    truncate_prompt_tokens: WholeRoom | None = Field(
        default=None,
        description="vLLM's: -1 is `truncate`, at the end or where `truncation_side` says.",
    )
    truncation_side: Literal["left", "right"] | None = Field(
        default=None,
        description="vLLM's: `left` cuts the start, `right` the end. Only with the field above.",
    )
    use_activation: Probabilities | None = Field(
        default=None, description="vLLM's: only true, as `probs` are probabilities."
    )
    activation: Probabilities | None = Field(
        default=None, description="vLLM's older name of `use_activation`."
    )
    softmax: Probabilities | None = Field(
        default=None, description="vLLM's oldest name of `use_activation`."
    )
    add_special_tokens: SpecialTokens | None = Field(
        default=None, description="vLLM's: only true, as the adapter's prompt has them."
    )

    @model_validator(mode="before")
    @classmethod
    def _read_truncation(cls, document: Any) -> Any:
        """Turn vLLM's two fields into ``truncate``."""
        if not isinstance(document, dict):
            return document
        side = document.get("truncation_side")
        if document.get("truncate_prompt_tokens") is None:
            if side is not None:
                raise PydanticCustomError(
                    "no_effect", "truncation_side has no effect without truncate_prompt_tokens"
                )
            return document
        if "truncate" in document:
            raise PydanticCustomError(
                "two_names", "truncate and truncate_prompt_tokens say the same: send one of them"
            )
        return {**document, "truncate": "start" if side == "left" else "end"}

    @property
    def asked_priority(self) -> Priority:
        """Who goes first, as far as the body says."""
        return "batch" if self.priority else "interactive"
