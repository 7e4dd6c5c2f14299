"""Bodies of the Open Inference Protocol (KServe v2), as far as it is spoken here."""

from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    ConfigDict,
    Field,
    StrictBool,
    StrictInt,
    StrictStr,
    WithJsonSchema,
    model_validator,
)
from pydantic_core import PydanticCustomError

from server.ports import Design, Priority
from server.schemas.fields import Name, NumSamples, Strict, WrappedText, unwrapped
from server.schemas.receipts import Body
from server.schemas.responses import ProblemFault

__all__ = [
    "InferRequest",
    "InferResponse",
    "ModelMetadata",
    "ModelReady",
    "OipProblem",
    "OutputName",
    "OutputTensor",
    "ServerMetadata",
    "TensorMetadata",
]

OutputName = Literal[
    "label", "probs", "confidence", "mutual_information", "decision", "prediction_id"
]


def _no_binary(value: bool) -> bool:  # noqa: FBT001 - pydantic calls it
    if value:
        raise PydanticCustomError(
            "binary_extension", "can only be false: tensors are sent as JSON here"
        )
    return value


AsJson = Annotated[
    StrictBool, AfterValidator(_no_binary), WithJsonSchema({"type": "boolean", "const": False})
]


class InferParameters(Strict):
    """What a request may choose; each means what it means for ``/v1/classify``."""

    num_samples: NumSamples = None
    seed: Annotated[StrictInt, Field(ge=0, lt=2**63)] | None = None
    design: Design | None = None
    policy: Name | None = Field(default=None, description="A policy of the adapter, by its name.")
    truncate: Literal["none", "start", "end"] = "none"
    priority: Priority | None = Field(
        default=None, description="`batch` is the same as the header `X-Priority: batch`."
    )
    binary_data_output: AsJson | None = None


class InputParameters(Strict):
    """What clients send along with a tensor of texts."""

    content_type: Literal["str"] | None = None


class InferInput(Strict):
    """The tensor ``text``: one text for each row."""

    name: Literal["text"]
    datatype: Literal["BYTES"]
    shape: Annotated[list[Annotated[StrictInt, Field(ge=1)]], Field(min_length=1, max_length=2)]
    parameters: InputParameters = InputParameters()
    data: Annotated[list[WrappedText], Field(min_length=1)] = Field(
        description="n texts for shape [n] or [n, 1]; for the latter each may be in a list."
    )

    @model_validator(mode="after")
    def _check_shape(self) -> Self:
        if self.shape[1:] not in ([], [1]):
            raise PydanticCustomError("shape", "shape must be [n] or [n, 1]")
        if self.shape[0] != len(self.data):
            raise PydanticCustomError(
                "shape",
                "shape says {said} texts, and data has {given}",
                {"said": self.shape[0], "given": len(self.data)},
            )
        if self.shape[1:] != [1] and any(isinstance(entry, list) for entry in self.data):
            raise PydanticCustomError("shape", "data is nested deeper than shape")
        return self

    def texts(self) -> list[str]:
        """Return the text of each row."""
        return [unwrapped(entry) for entry in self.data]


class OutputParameters(Strict):
    """How a tensor is sent back: as JSON."""

    binary_data: AsJson | None = None


class InferOutput(Strict):
    """A tensor that is asked for."""

    name: OutputName
    parameters: OutputParameters = OutputParameters()


class InferRequest(Strict):
    """Texts for one adapter."""

    id: Annotated[StrictStr, Field(max_length=128)] | None = Field(
        default=None, description="Sent back."
    )
    parameters: InferParameters = InferParameters()
    inputs: Annotated[list[InferInput], Field(min_length=1, max_length=1)]
    outputs: list[InferOutput] | None = Field(
        default=None, description="The tensors to send back; all of them if left out."
    )

    @model_validator(mode="after")
    def _check_outputs(self) -> Self:
        names = self.output_names() or []
        if len(set(names)) != len(names):
            raise PydanticCustomError("duplicate_output", "outputs has a name twice")
        return self

    def output_names(self) -> list[OutputName] | None:
        """Return the tensors that are asked for; None for all."""
        return [output.name for output in self.outputs] if self.outputs else None

    def as_classify(self, model: str) -> dict[str, Any]:
        """Return the same request in the words of ``ClassifyRequest``."""
        asked = self.parameters
        return {
            "model": model,
            "input": self.inputs[0].texts(),
            "num_samples": asked.num_samples,
            "seed": asked.seed,
            "design": asked.design,
            "policy": {"name": asked.policy} if asked.policy else None,
            "truncate": asked.truncate,
            "priority": 1 if asked.priority == "batch" else 0,
        }


class TensorMetadata(Body):
    """Name and form of a tensor; -1 is any number of rows."""

    name: str
    datatype: Literal["BYTES", "FP64"]
    shape: list[int]


class OutputTensor(TensorMetadata):
    """A tensor of the answer, row after row."""

    data: list[str] | list[float]


class InferResponse(Body):
    """The answer."""

    model_config = ConfigDict(protected_namespaces=())

    model_name: str
    model_version: str = Field(description="Revision of the adapter that answered.")
    id: str | None = Field(default=None, description="The request's, if it had one.")
    outputs: list[OutputTensor]


class ServerMetadata(Body):
    """What runs here."""

    name: Literal["dalorra"] = "dalorra"
    version: str
    extensions: list[str] = Field(default=[], description="None.")


class ModelMetadata(Body):
    """An adapter, its input and its outputs."""

    name: str
    versions: list[str] = Field(description="The revision; ask for it as `name:revision`.")
    platform: Literal["dalorra"] = "dalorra"
    inputs: list[TensorMetadata]
    outputs: list[TensorMetadata]
    labels: list[str] = Field(description="What the columns of `probs` stand for.")


class ModelReady(Body):
    """An adapter that can be asked now."""

    name: str
    ready: Literal[True] = True


class OipProblem(Body):
    """An error on ``/v2``: the protocol wants a string in ``error``; the rest is as elsewhere."""

    type: str
    title: str
    status: int
    detail: str
    instance: str
    code: str
    request_id: str
    errors: list[ProblemFault]
    error: str
