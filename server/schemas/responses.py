"""The bodies of the answers. Every number's meaning, unit and range is in its description."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from server.decision import Decision, Reason
from server.ports import Estimator
from server.schemas.receipts import (
    Body,
    CalibrationSection,
    PolicyCard,
    PredictionSetsCard,
    StoredPolicyCard,
)

__all__ = [
    "ClassifyResponse",
    "HealthResponse",
    "Limits",
    "ModelCard",
    "ModelList",
    "OpenAIError",
    "Problem",
    "ProblemFault",
    "Row",
    "SamplingCard",
    "Timings",
    "TopLabel",
    "Uncertainty",
    "Usage",
    "VersionResponse",
]


class Uncertainty(Body):
    """How unsure the answer is, in nats where a unit applies. Higher is less sure."""

    predictive_entropy: float = Field(description="H[E p]: all uncertainty; 0 to ln num_classes.")
    expected_entropy: float | None = Field(
        description="E[H p]: the part every sample agrees on. Null when nothing was sampled."
    )
    mutual_information: float | None = Field(
        description=(
            "The difference of the two: disagreement between samples, an estimate of the epistemic "
            "part. Grows with num_samples, so compare at one M only. Null when nothing was sampled."
        )
    )
    normalized_entropy: float = Field(description="predictive_entropy / ln num_classes, 0 to 1.")
    variation_ratio: float = Field(
        description="Share of samples whose most probable label is not the answer's, 0 to 1."
    )
    confidence_std: float | None = Field(
        description="Standard deviation over samples of the answer's probability. Null likewise."
    )
    unit: Literal["nats"] = "nats"


class TopLabel(Body):
    """A label and its probability."""

    label: str
    prob: float


class Row(Body):
    """The answer to one row of the input."""

    index: int = Field(description="Place of the row in the input, from 0.")
    id: str | None = Field(description="The client's id of the row; null when it gave none.")
    prediction_id: str = Field(
        description="Signed id of this answer: send it to `/v1/feedback` with the true label."
    )
    label: str = Field(description="The most probable label.")
    labels: list[str] = Field(description="All labels, in label order (or the row's choices).")
    probs: list[float] = Field(description="Probability of each of `labels`; they sum to 1.")
    num_classes: int = Field(description="Number of `labels`.")
    confidence: float = Field(description="Probability of `label`.")
    label_mass: float | None = Field(
        description="Probability of all labels together under the whole vocabulary. A diagnostic."
    )
    combined_score: float | None = Field(
        description=(
            "Calibrated estimate that the label is right and the question in scope, 0 to 1. Null "
            "when the adapter stores no such score."
        )
    )
    uncertainty: Uncertainty
    prediction_set: list[str] | None = Field(
        description=(
            "Labels among which the right one is, most probable first; `prediction_sets` says how "
            "often. Null without such a rule, or when the sampling is not the calibrated one."
        )
    )
    decision: Decision = Field(
        description="`accept` the label, let a person `review` it, or `abstain` from answering."
    )
    reasons: list[Reason] = Field(description="Why not `accept`; empty exactly when accepted.")
    calibrated: bool = Field(
        description=(
            "Whether a policy of the adapter decided alone, with exactly the sampling and on the "
            "kind of server that it was chosen for."
        )
    )
    truncated: bool = Field(description="Whether a part of the text was cut away.")
    top: list[TopLabel] | None = Field(default=None, description="With `top_k`: the best labels.")
    samples: list[list[float]] | None = Field(
        default=None, description="With `include: samples`: the M distributions over `labels`."
    )


class SamplingCard(Body):
    """What was sampled. Send the same values again for the same answer."""

    num_samples: int
    seed: int | None = Field(description="Null when nothing was drawn.")
    mask_set: str | None = Field(description="Id of the sample set; null when nothing was sampled.")
    estimator: Estimator
    design: str


class Usage(Body):
    """Tokens of the prompts, padding and samples not counted."""

    prompt_tokens: int
    total_tokens: int


class Timings(Body):
    """Seconds per stage; a stage shared with other requests counts in full."""

    queue_s: float
    tokenize_s: float
    forward_s: float
    uq_s: float


class ClassifyResponse(Body):
    """The answers, in the order of the input."""

    id: str
    object: Literal["list"] = "list"
    created: int = Field(description="Seconds since 1970.")
    model: str = Field(description="Adapter and revision that answered.")
    data: list[Row]
    policy: PolicyCard | None = Field(description="Null when the adapter has no policy.")
    prediction_sets: PredictionSetsCard | None = Field(
        description="The rule behind each `prediction_set`; null when there is none."
    )
    sampling: SamplingCard
    usage: Usage
    timings: Timings | None = None
    metadata: dict[str, str | bool | int | float | None] | None = None


class Limits(Body):
    """The most one request may ask for."""

    max_rows: int
    max_text_chars: int
    max_tokens: int
    max_num_samples: int
    max_body_bytes: int


class ModelCard(Body):
    """One loaded adapter."""

    id: str
    object: Literal["model"] = "model"
    created: int = Field(description="When it was loaded, in seconds since 1970.")
    owned_by: Literal["dalorra"] = "dalorra"
    parent: str = Field(description="The base model.")
    parent_fingerprint: str
    revision: str
    kind: Literal["text", "choice"]
    method: str
    labels: list[str]
    num_classes: int
    prompt: str
    prompt_sha256: str
    sampling: SamplingCard = Field(description="What a request gets that does not say otherwise.")
    dtype: str = Field(description="Precision of the base model here.")
    out_of_scope_label: str | None = Field(
        description="Name under which feedback may say that none of the labels is right."
    )
    policies: list[StoredPolicyCard]
    locked_policy: str | None = Field(
        description="Policy that no request can loosen; null when none is locked."
    )
    calibration: CalibrationSection | None = Field(description="Null before `dalorra calibrate`.")
    limits: Limits
    selftest_max_abs_error: float | None = Field(
        description="Largest difference from the stored golden probabilities, at load."
    )


class ModelList(Body):
    """All loaded adapters."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class HealthResponse(Body):
    """A probe that passed."""

    status: Literal["ok"] = "ok"


class VersionResponse(Body):
    """What runs here."""

    version: str
    api: Literal["v1"] = "v1"
    git: str
    torch: str


class ProblemFault(BaseModel):
    """One fault of a request."""

    model_config = ConfigDict(extra="allow")

    pointer: str | None = Field(default=None, description="JSON pointer as a URI fragment.")
    code: str | None = None
    detail: str | None = None
    limit: float | None = None
    actual: float | None = None
    close_names: list[str] | None = None


class OpenAIError(Body):
    """The same error in the form OpenAI clients read."""

    message: str
    type: Literal["invalid_request_error", "rate_limit_error", "server_error"]
    param: str | None
    code: str


class Problem(Body):
    """Every error: RFC 9457, ``application/problem+json``."""

    type: str
    title: str
    status: int
    detail: str
    instance: str
    code: str
    request_id: str
    errors: list[ProblemFault]
    error: OpenAIError
