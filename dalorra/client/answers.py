"""Answers as values: frozen, and at ease with fields that a newer server adds."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from dalorra.client.questions import Item

__all__ = [
    "Answer",
    "Decision",
    "Feedback",
    "Guarantee",
    "Model",
    "ModelList",
    "Policy",
    "Row",
    "Sampling",
    "TopLabel",
    "Uncertainty",
    "Usage",
]

Decision = Literal["accept", "review", "abstain"]


class _Value(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore", populate_by_name=True)


class Uncertainty(_Value):
    """How unsure an answer is, in nats where a unit applies; higher is less sure.

    Attributes:
        predictive_entropy: H[E p]: all uncertainty.
        expected_entropy: E[H p]; None where nothing was sampled.
        mutual_information: The difference of the two; None likewise.
        normalized_entropy: ``predictive_entropy`` / ln C, 0 to 1.
        variation_ratio: Share of samples with another label, 0 to 1.
        confidence_std: Standard deviation of the answer's probability; None likewise.
    """

    predictive_entropy: float
    normalized_entropy: float
    variation_ratio: float
    expected_entropy: float | None = None
    mutual_information: float | None = None
    confidence_std: float | None = None


class TopLabel(_Value):
    """A label and its probability."""

    label: str
    prob: float


class Row(_Value):
    """The answer to one question.

    Attributes:
        index: Place of the question, from 0.
        id: The question's own id.
        input: The question as it was asked; not in ``repr``.
        prediction_id: What feedback about this answer needs.
        label: The most probable label, whatever the decision.
        labels: All labels.
        probs: Probability of each of them.
        confidence: Probability of ``label``.
        decision: ``accept`` the label, let a person ``review`` it, or ``abstain``.
        reasons: Why not ``accept``; empty exactly when accepted.
        uncertainty: How unsure the answer is.
        final_label: What to act on: ``label`` when accepted, else what a hook gave; None when
            nobody has decided.
        settled_by: Who gave ``final_label``: ``model``, ``on_review`` or ``on_abstain``.
    """

    index: int
    id: str | None = None
    input: Item | None = Field(default=None, repr=False)
    prediction_id: str
    label: str
    labels: tuple[str, ...]
    probs: tuple[float, ...]
    confidence: float
    decision: Decision
    reasons: tuple[str, ...] = ()
    uncertainty: Uncertainty
    calibrated: bool = False
    truncated: bool = False
    label_mass: float | None = None
    combined_score: float | None = None
    prediction_set: tuple[str, ...] | None = None
    top: tuple[TopLabel, ...] | None = None
    samples: tuple[tuple[float, ...], ...] | None = None
    final_label: str | None = None
    settled_by: Literal["model", "on_review", "on_abstain"] | None = None


class Guarantee(_Value):
    """With confidence 1 - delta, accepted answers are wrong at most with ``target_risk``."""

    kind: str
    target_risk: float
    delta: float
    n: int
    out_of_scope_share: float | None = None
    risk_upper_bound: float | None = None
    calibrated_at: str | None = None


class Policy(_Value):
    """The rule that decided, and what it promises; no guarantee, no promise."""

    name: str
    target_selective_risk: float | None = None
    guarantee: Guarantee | None = None
    void: str | None = None
    combined_with: str | None = None


class Sampling(_Value):
    """What was sampled; the same values give the same answer."""

    num_samples: int
    seed: int | None = None
    mask_set: str | None = None
    estimator: str
    design: str


class Usage(_Value):
    """Tokens of the prompts."""

    prompt_tokens: int
    total_tokens: int


class Answer(_Value):
    """The answers to all questions of one call.

    Attributes:
        id: Of this answer.
        created: Seconds since 1970.
        model: Adapter and revision that answered.
        rows: One for each question, in their order.
        policy: The rule that decided; None when the adapter has none.
        sampling: What was sampled.
        usage: What it took.
        timings: Seconds per stage, if asked for.
        metadata: As it was sent.
        request_id: By which the server's logs know the request.
    """

    id: str
    created: int
    model: str
    rows: tuple[Row, ...] = Field(alias="data")
    policy: Policy | None = None
    sampling: Sampling
    usage: Usage
    timings: dict[str, float] | None = None
    metadata: dict[str, Any] | None = None
    request_id: str | None = None


class Feedback(_Value):
    """A label that is stored; ``stored`` is false when it was there before."""

    prediction_id: str
    outcome: Literal["correct", "wrong"]
    stored: bool


class Model(_Value):
    """An adapter that can be asked."""

    id: str
    revision: str
    kind: Literal["text", "choice"]
    method: str
    parent: str
    labels: tuple[str, ...]
    sampling: Sampling
    out_of_scope_label: str | None = None
    policies: tuple[Policy, ...] = ()
    locked_policy: str | None = None
    limits: dict[str, int] = {}


class ModelList(_Value):
    """All adapters that can be asked."""

    data: tuple[Model, ...]
