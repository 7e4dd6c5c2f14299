"""The body of ``POST /v1/feedback`` and its answer."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictStr

from server.schemas.fields import Name, Strict

__all__ = ["FeedbackRequest", "FeedbackResponse"]

_MAX_ID_CHARS = 4096


class FeedbackRequest(Strict):
    """The true label of an answer."""

    prediction_id: Annotated[StrictStr, Field(min_length=1, max_length=_MAX_ID_CHARS)] = Field(
        description="As it stood in the row of the answer."
    )
    label: Name | None = Field(
        description=(
            "The right label: one of the adapter's. Null, or the name of the adapter's "
            "out-of-scope label, when none of them is right. Required: leaving it out is not null."
        )
    )
    source: Annotated[StrictStr, Field(pattern=r"^[A-Za-z0-9._-]{1,64}$")] | None = Field(
        default=None,
        description="Who says so, such as `agent` or `audit-2026`: 1 to 64 of `A-Za-z0-9._-`.",
    )


class FeedbackResponse(BaseModel):
    """The label is on the disk."""

    model_config = ConfigDict(frozen=True)

    prediction_id: str
    outcome: Literal["correct", "wrong"] = Field(description="Whether the answer was right.")
    stored: bool = Field(description="False when the same label was stored before.")
