"""What stands behind a decision: policies, certificates, calibration, and what-if answers."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from server.ports import ScoreName

__all__ = [
    "AbstainGuaranteeCard",
    "Body",
    "ByLabelCard",
    "CalibrationSection",
    "EvaluationResponse",
    "GuaranteeCard",
    "LimitCard",
    "PlanSection",
    "PolicyCard",
    "PredictionSetsCard",
    "RiskCoverageResponse",
    "RiskPoint",
    "Side",
    "StoredPolicyCard",
    "Thresholds",
    "UncertifiedCard",
]

Side = Literal["at_least", "at_most"]
_SHARE_NOTE = "Assumed share of out-of-scope questions; an accepted one counts as an error."
_VOID_NOTE = "Why no stored promise holds here; null when nothing was taken away."


class Body(BaseModel):
    """A response's object."""

    model_config = ConfigDict(frozen=True)


class LimitCard(Body):
    """A score and the least sure value of it that still passes."""

    score: ScoreName
    threshold: float = Field(description="In the score's unit; a value equal to it passes.")
    passes: Side = Field(description="On which side values pass.")


class ByLabelCard(Body):
    """A policy with a threshold of its own for each predicted label, in short."""

    num_labels: int = Field(description="Labels with a threshold of their own.")
    num_never_accepted: int = Field(description="Those of them that are never accepted.")
    lowest: float | None = Field(description="Lowest threshold; null when none accepts.")
    highest: float | None = Field(description="Highest threshold; null likewise.")


class Thresholds(Body):
    """The numbers of a policy."""

    accept: list[LimitCard] | None = Field(
        description="Accept what passes all of these. Null: nothing is accepted."
    )
    abstain: list[LimitCard] = Field(description="Abstain from what fails any of these.")
    by_label: ByLabelCard | None = Field(
        description="In place of the first accept threshold, by predicted label; null: none."
    )


class GuaranteeCard(Body):
    """With confidence 1 - delta, accepted answers are wrong at most with ``target_risk``.

    True for questions like those of the calibration, of which at most ``out_of_scope_share`` are
    out of scope; an accepted out-of-scope question counts as wrong.
    """

    kind: str = Field(description="How it was made; `ltt` is Learn then Test.")
    procedure: str
    target_risk: float
    delta: float
    out_of_scope_share: float
    n: int = Field(description="Rows it was certified on, in scope and out.")
    n_out_of_scope: int
    risk_upper_bound: float = Field(description="Bound that the certified threshold reached.")
    in_scope_coverage: float = Field(description="Accepted share of the in-scope rows among them.")
    per_label: bool = Field(description="Whether it holds for each predicted label by itself.")
    calibrated_at: str


class AbstainGuaranteeCard(Body):
    """With confidence 1 - delta, at most this share of in-scope questions is abstained from."""

    max_in_scope_share: float
    delta: float
    n: int


class PolicyCard(Body):
    """The rule that decided, the data it was chosen on, and what it promises."""

    name: str = Field(description="`inline` for limits written in the request.")
    thresholds: Thresholds
    target_selective_risk: float | None = Field(
        description="Error rate among accepted answers that the thresholds aim at."
    )
    chosen_on: dict[str, object] = Field(description="Split, sizes, sampling and date.")
    guarantee: GuaranteeCard | None = Field(
        description="The certificate; null: no error rate is promised for this answer."
    )
    abstain_guarantee: AbstainGuaranteeCard | None
    void: str | None = Field(description=_VOID_NOTE)
    combined_with: str | None = Field(
        default=None,
        description="The locked policy that was applied as well: the stricter decision holds.",
    )


class StoredPolicyCard(PolicyCard):
    """A policy of an adapter, complete."""

    accept_by_label: dict[str, float | None] | None = Field(
        description="Accept threshold by predicted label; null for one that is never accepted."
    )


class PredictionSetsCard(Body):
    """The rule behind ``prediction_set``.

    For questions like the calibration rows, the right label of an in-scope question is in its set
    with a chance of at least 1 - alpha, on average over questions and calibrations.
    """

    kind: Literal["lac", "aps"]
    alpha: float
    n: int = Field(description="Rows the sets were calibrated on.")
    empirical_coverage: float = Field(description="Share of right sets on held-out rows.")
    mean_size: float = Field(description="Labels per set on held-out rows.")


class UncertifiedCard(Body):
    """A target risk that no threshold could be certified for."""

    target_risk: float
    label: str | None = Field(description="The predicted label it is about; null: all of them.")
    reason: str
    more_labels: int | None = Field(
        description="Estimate of the labelled rows to add; null when no number of rows would do."
    )


class PlanSection(Body):
    """Why estimator, M and design are what they are: the fewest passes as good as the peer's.

    Squared errors are distances to the answers of infinitely many samples, as estimated; an
    estimate may fall below zero.
    """

    date: str
    estimator: Literal["monte_carlo", "linearised"]
    num_samples: int = Field(description="M, or the draws of the linearised network.")
    design: str
    peer_num_samples: int = Field(description="So many independent samples are the peer.")
    mean_error: float = Field(description="Of the probabilities, summed over the labels.")
    peer_mean_error: float
    information_error: float | None = Field(description="Of the mutual information, nats squared.")
    peer_information_error: float | None
    n: int = Field(description="Rows it was measured on.")
    reference: int = Field(description="Samples that stood for infinitely many.")


class CalibrationSection(Body):
    """What calibration found out about an adapter."""

    date: str
    n: int
    n_out_of_scope: int
    temperature: float = Field(description="Softmax temperature in use; 1 changes nothing.")
    prediction_sets: list[PredictionSetsCard] = Field(description="The first is the one in use.")
    uncertified: list[UncertifiedCard]
    void: str | None = Field(description=_VOID_NOTE)
    plan: PlanSection | None = Field(
        description="Null where M and the design were set and not measured."
    )


class RiskPoint(Body):
    """What accepting at or beyond one threshold does."""

    threshold: float
    coverage: float = Field(description="Accepted share of all questions.")
    in_scope_coverage: float
    selective_risk: float | None = Field(description="Null when nothing is accepted.")
    risk_upper_bound: float = Field(
        description="Holds for this one threshold with 1 - delta, not for the best of many."
    )
    n_accepted: int


class RiskCoverageResponse(Body):
    """The risk-coverage curve of a score on the stored calibration rows, surest first."""

    object: Literal["risk_coverage"] = "risk_coverage"
    model: str
    score: ScoreName
    passes: Side
    out_of_scope_share: float = Field(description=_SHARE_NOTE)
    delta: float
    points: list[RiskPoint]
    void: str | None = Field(description=_VOID_NOTE)


class EvaluationResponse(Body):
    """What a policy would do; shares are of all questions at the assumed share.

    The bound holds for a policy that was not picked by looking at such answers.
    """

    object: Literal["policy_evaluation"] = "policy_evaluation"
    model: str
    policy: PolicyCard
    out_of_scope_share: float = Field(description=_SHARE_NOTE)
    delta: float
    n: int = Field(description="Stored rows it was tried on, in scope and out.")
    n_out_of_scope: int
    accept: float
    review: float
    abstain: float
    in_scope_coverage: float = Field(description="Accepted share of the in-scope questions.")
    out_of_scope_accepted: float | None = Field(
        description="Accepted share of the out-of-scope questions; null when none are stored."
    )
    selective_risk: float | None = Field(
        description="Share of errors among accepted answers; null when nothing is accepted."
    )
    risk_upper_bound: float = Field(
        description=(
            "Upper bound of it, with confidence 1 - delta for a policy not picked on these same "
            "rows; for a stored or a tuned one it is a reading, and the certificate decides."
        )
    )
    void: str | None = Field(description=_VOID_NOTE)
