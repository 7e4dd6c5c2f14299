"""Bodies of ``POST /predict``, as text-embeddings-inference has them."""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Discriminator, Field, StrictBool, Tag, WithJsonSchema
from pydantic_core import PydanticCustomError

from server.schemas.fields import (
    LIST_TAG,
    STRING_TAG,
    Name,
    Strict,
    Text,
    WrappedText,
    string_or_list,
    unwrapped,
)
from server.schemas.receipts import Body

__all__ = ["PredictRequest", "Prediction"]


def _no_raw_scores(value: bool) -> bool:  # noqa: FBT001 - pydantic calls it
    if value:
        raise PydanticCustomError(
            "not_supported",
            "can only be false: scores are means of probabilities over posterior samples, and no "
            "logits stand behind such a mean",
        )
    return value


Inputs = Annotated[
    Annotated[Text, Tag(STRING_TAG)]
    | Annotated[list[WrappedText], Field(min_length=1), Tag(LIST_TAG)],
    Discriminator(string_or_list),
]
Probabilities = Annotated[
    StrictBool,
    AfterValidator(_no_raw_scores),
    WithJsonSchema({"type": "boolean", "const": False, "default": False}),
]


class PredictRequest(Strict):
    """One text, or a list of them."""

    inputs: Inputs = Field(
        description=(
            "A text, or a list of texts (each may stand in a list of its own, as "
            "text-embeddings-inference wants it). Pairs of texts are refused."
        )
    )
    truncate: StrictBool | None = Field(
        default=False, description="Cut a text that is too long; else it is refused (422)."
    )
    truncation_direction: Literal["Left", "Right", "left", "right"] = Field(
        default="Right", description="`Left` cuts the start, `Right` the end; with `truncate`."
    )
    raw_scores: Probabilities = Field(
        default=False, description="Only false: there are no raw scores behind a mean over samples."
    )
    model: Name | None = Field(
        default=None,
        description="Adapter, as for `/v1/classify`. May be left out when one is loaded, and be in "
        "the query instead.",
    )

    def texts(self) -> str | list[str]:
        """Return the text, or the texts in their order."""
        if isinstance(self.inputs, str):
            return self.inputs
        return [unwrapped(entry) for entry in self.inputs]

    def as_classify(self, model: str | None) -> dict[str, Any]:
        """Return the same request in the words of ``ClassifyRequest``."""
        side = "start" if self.truncation_direction.lower() == "left" else "end"
        return {
            "model": model,
            "input": self.texts(),
            "truncate": side if self.truncate else "none",
        }


class Prediction(Body):
    """A label and its probability."""

    score: float = Field(description="Mean probability over the posterior samples, 0 to 1.")
    label: str
