"""Decision rules, what stands behind them, and answers to questions about them."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

__all__ = [
    "HIGHER_IS_SURER",
    "AbstainGuarantee",
    "FeedbackRisk",
    "Guarantee",
    "Limit",
    "Policy",
    "PolicyEvaluation",
    "RiskCoveragePoint",
    "ScoreName",
]

ScoreName = Literal[
    "confidence", "predictive_entropy", "mutual_information", "label_mass", "combined"
]

HIGHER_IS_SURER: Mapping[ScoreName, bool] = {
    "confidence": True,
    "predictive_entropy": False,
    "mutual_information": False,
    "label_mass": True,
    "combined": True,
}


@dataclass(frozen=True, slots=True)
class Limit:
    """A score and the least sure value of it that still passes; equality passes."""

    score: ScoreName
    threshold: float


@dataclass(frozen=True, slots=True)
class Guarantee:
    """A certificate: with confidence 1 - delta, accepted answers are wrong at most so often.

    Attributes:
        kind: How it was made; ``ltt`` is Learn then Test.
        procedure: ``fixed_sequence`` or ``bonferroni``.
        target_risk: Largest share of errors among accepted answers.
        delta: Chance that the certificate is wrong, over draws of calibration rows.
        out_of_scope_share: It holds while at most this share of the questions is out of scope.
        n: In-scope and out-of-scope rows it was certified on.
        n_out_of_scope: Those of them that are out of scope.
        risk_upper_bound: The bound that the certified threshold reached.
        in_scope_coverage: Accepted share of the in-scope rows it was certified on.
        per_label: The statement holds for each predicted label by itself.
        calibrated_at: Date and time, ISO 8601.
    """

    kind: str
    procedure: str
    target_risk: float
    delta: float
    out_of_scope_share: float
    n: int
    n_out_of_scope: int
    risk_upper_bound: float
    in_scope_coverage: float
    per_label: bool
    calibrated_at: str


@dataclass(frozen=True, slots=True)
class AbstainGuarantee:
    """With confidence 1 - delta, at most this share of in-scope questions is abstained from."""

    max_in_scope_share: float
    delta: float
    n: int


@dataclass(frozen=True, slots=True)
class Policy:
    """When to accept an answer, when to abstain, and what stands behind it.

    Attributes:
        name: Name by which a request may ask for it; ``inline`` for one written in a request.
        accept: Accept when every one of these limits is passed; None: never accept.
        abstain: Abstain when any of these is not passed; empty: never abstain.
        accept_by_label: Threshold of the first accept limit by predicted label, in place of the
            limit's own; None as a threshold: never accept that label.
        target_selective_risk: Error rate among accepted answers the limits were chosen for.
        chosen_on: Split, sizes, sampling and date of that choice; shown to the client as it is.
        guarantee: The certificate; None: nothing is promised.
        abstain_guarantee: What is promised about abstaining; None: nothing.
        void: Why a stored certificate does not hold on this server; None when it does.
    """

    name: str
    accept: tuple[Limit, ...] | None
    abstain: tuple[Limit, ...] = ()
    accept_by_label: Mapping[str, float | None] | None = None
    target_selective_risk: float | None = None
    chosen_on: Mapping[str, object] = field(default_factory=dict)
    guarantee: Guarantee | None = None
    abstain_guarantee: AbstainGuarantee | None = None
    void: str | None = None


@dataclass(frozen=True, slots=True)
class RiskCoveragePoint:
    """What one accept threshold does on the stored certify rows.

    Attributes:
        threshold: In the score's own unit; values at least as sure are accepted.
        coverage: Accepted share of all questions at the asked out-of-scope share.
        in_scope_coverage: Accepted share of the in-scope questions.
        selective_risk: Share of errors among accepted; None when nothing is accepted.
        risk_upper_bound: Upper bound of it, valid at this one threshold with confidence 1 - delta.
        n_accepted: Rows accepted, in scope and out.
    """

    threshold: float
    coverage: float
    in_scope_coverage: float
    selective_risk: float | None
    risk_upper_bound: float
    n_accepted: int


@dataclass(frozen=True, slots=True)
class PolicyEvaluation:
    """What a policy would do on the stored certify rows, at an assumed out-of-scope share.

    Shares are of all questions at that share; ``risk_upper_bound`` holds for this one policy with
    confidence 1 - delta, if it was not picked by looking at the same rows.
    """

    n: int
    n_out_of_scope: int
    accept: float
    review: float
    abstain: float
    in_scope_coverage: float
    out_of_scope_accepted: float | None
    selective_risk: float | None
    risk_upper_bound: float


@dataclass(frozen=True, slots=True)
class FeedbackRisk:
    """What feedback says about the certificate of one policy.

    Attributes:
        adapter: Name of the adapter.
        revision: Its revision.
        policy: Name of the policy whose certificate held.
        target_risk: Largest share of errors among accepted answers that it promises.
        n: Accepted answers with a true label.
        wrong: Those of them that were wrong.
        risk_lower_bound: Lower confidence bound on their risk, valid however often it is looked at.
        violated: Whether the feedback contradicts the certificate.
    """

    adapter: str
    revision: str
    policy: str
    target_risk: float
    n: int
    wrong: int
    risk_lower_bound: float
    violated: bool

    @property
    def selective_risk(self) -> float:
        """Share of errors among the accepted answers with a true label."""
        return self.wrong / self.n
