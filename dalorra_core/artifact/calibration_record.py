"""What calibration writes into a manifest: policies, certificates, prediction sets, reference.

Values only; ``dalorra_core.calibration`` makes them and the server obeys them.
"""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from dalorra_core.config import Design, Estimator

__all__ = [
    "HIGHER_IS_SURER",
    "AbstainGuarantee",
    "Calibration",
    "CalibrationRows",
    "ChosenOn",
    "CombinedScore",
    "Guarantee",
    "Limit",
    "MeasuredWith",
    "PlanCandidate",
    "PlanEvidence",
    "Policy",
    "PredictionSets",
    "ReferenceProfile",
    "ScoreName",
    "ScoreReference",
    "TemperatureFit",
    "Uncertified",
]

ScoreName = Literal[
    "confidence", "predictive_entropy", "mutual_information", "label_mass", "combined"
]

HIGHER_IS_SURER: dict[ScoreName, bool] = {
    "confidence": True,
    "predictive_entropy": False,
    "mutual_information": False,
    "label_mass": True,
    "combined": True,
}
"""Direction of each score; a limit is passed by values at least as sure as its threshold."""


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Limit(_Part):
    """A score and the least sure value of it that still passes (equality passes)."""

    score: ScoreName
    threshold: float


class ChosenOn(_Part):
    """The held-out rows and the predictive a policy's thresholds were chosen with."""

    split: str
    n: int
    n_out_of_scope: int
    num_samples: int
    seed: int
    estimator: Estimator
    dtype: str
    date: str
    selective_risk: float | None
    coverage: float


class MeasuredWith(_Part):
    """Everything that a change of makes a certificate void."""

    adapter_sha256: str
    num_samples: int
    design: str
    seed: int
    estimator: Estimator
    temperature: float
    dtype: str
    engine: str = "local"


class AbstainGuarantee(_Part):
    """At most this share of in-scope questions is abstained from, with confidence 1 - delta."""

    max_in_scope_share: float
    delta: float
    n: int


class Guarantee(_Part):
    """With confidence 1 - delta, errors among accepted answers are at most ``target_risk``.

    Holds for questions like the calibration rows of which at most ``out_of_scope_share`` are out
    of scope (an accepted out-of-scope question is an error). ``n`` and ``n_out_of_scope`` are the
    rows of the certify part, ``n_accepted`` the in-scope ones among them that were accepted.
    With ``per_label`` the statement is about each predicted label by itself. What is promised is
    ``target_risk``; ``risk_upper_bound`` is the test's number at the threshold it picked.
    """

    kind: Literal["ltt"] = "ltt"
    procedure: Literal["fixed_sequence", "bonferroni"]
    target_risk: float
    delta: float
    out_of_scope_share: float
    n: int
    n_out_of_scope: int
    n_accepted: int
    n_out_of_scope_accepted: int
    risk_upper_bound: float
    in_scope_coverage: float
    per_label: bool = False
    calibrated_at: str
    measured_with: MeasuredWith


class Policy(_Part):
    """Limits that turn scores into accept, review or abstain.

    abstain: the abstain limit is not passed; accept: the accept limit is passed; review: everything
    between. ``accept`` is null when nothing may be accepted, ``abstain`` when nothing is refused.
    ``accept_by_label`` replaces the accept limit's threshold for each predicted label (null: never
    accepted); labels it does not list use the limit's own. ``target_selective_risk`` was met
    empirically on ``chosen_on``; only ``guarantee`` promises anything.
    """

    name: str
    accept: Limit | None
    abstain: Limit | None = None
    accept_by_label: dict[str, float | None] | None = None
    target_selective_risk: float | None = None
    chosen_on: ChosenOn
    guarantee: Guarantee | None = None
    abstain_guarantee: AbstainGuarantee | None = None


class Uncertified(_Part):
    """A target that no threshold could be certified for, and what it would take."""

    target_risk: float
    label: str | None = None
    reason: str
    more_labels: int | None = Field(
        description="In-scope and out-of-scope rows to add, in the proportion of the present ones, "
        "estimated by repeating the present errors; null when no number of rows would do."
    )


class TemperatureFit(_Part):
    """Softmax temperature applied to every sample's label logits; 1.0 when it did not help.

    Fitted on the fit part by the NLL of the averaged predictive; kept when the NLL of the select
    part improves. In nats per in-scope row.
    """

    value: float
    fitted: float
    kept: bool
    nll_before: float
    nll_after: float
    n_fit: int
    n_held_out: int


class CombinedScore(_Part):
    """Estimated probability that an answer is right and in scope: sigmoid(bias + sum of w x).

    ``weights`` are per feature, in the features' own units; the features are those of
    ``dalorra_core.calibration.combined.FEATURES``.
    """

    bias: float
    weights: dict[str, float]
    n: int


class PredictionSets(_Part):
    """Split-conformal sets: they hold the right label of an in-scope question with 1 - alpha.

    lac: every label with probability >= 1 - ``quantile``. aps: labels from the most probable down
    until their sum exceeds ``quantile`` (the label that crosses it is in). The quantile is taken on
    the certify part; ``empirical_coverage`` and ``mean_size`` are measured on the select part.
    """

    kind: Literal["lac", "aps"]
    alpha: float
    quantile: float
    n: int
    empirical_coverage: float
    mean_size: float


class ScoreReference(_Part):
    """Distribution of one score over the calibration rows.

    ``cdf[i]`` is the share of rows with a value <= ``edges[i]``; the server's histogram has the
    same edges. ``deciles`` are the 10 %, ..., 90 % quantiles.
    """

    edges: tuple[float, ...]
    cdf: tuple[float, ...]
    deciles: tuple[float, ...]


class ReferenceProfile(_Part):
    """What traffic looked like when the adapter was calibrated: drift is measured against it.

    Scores: ``confidence``, ``label_mass`` as they are, ``predictive_entropy`` and
    ``mutual_information`` divided by ln C. ``confidence_bin_edges`` are k - 1 ascending inner
    edges of k bins (a value belongs to the bin of the number of edges <= it), the deciles of the
    confidence with bins below a 2 % share merged; ``confidence_bin_shares`` has k shares.
    ``decisions`` are those of the first policy.
    """

    n: int
    n_out_of_scope: int
    scores: dict[str, ScoreReference]
    confidence_bin_edges: tuple[float, ...]
    confidence_bin_shares: tuple[float, ...]
    labels: dict[str, float]
    decisions: dict[str, float]


class CalibrationRows(_Part):
    """Which rows calibrated the adapter; ``digest`` is over their ids and contents."""

    source: str
    digest: str
    n: int
    n_out_of_scope: int
    n_fit: int
    n_select: int
    n_certify: int


class PlanCandidate(_Part):
    """How far one estimator's answers are from the reference, mean over rows and packs.

    ``mean_error`` is the squared distance of the mean probabilities, summed over the labels;
    ``information_error`` that of the mutual information in nats squared, null for ``mean_mask``,
    which has none. The reference's own error is taken off, so a value may fall below zero. The
    excesses are one-sided upper bounds on the error above that of the peer. ``good_enough`` says
    whether both bounds and the AUROC allow the candidate to be chosen.
    """

    estimator: Estimator = "monte_carlo"
    design: Design
    num_samples: int
    mean_error: float
    mean_error_se: float
    information_error: float | None = None
    information_error_se: float | None = None
    mean_excess: float | None = None
    information_excess: float | None = None
    out_of_scope_auroc: float | None = None
    good_enough: bool = False


class PlanEvidence(_Part):
    """Why an adapter is served with its estimator, M and design; see docs/method.md, section 6.

    ``packs`` independent sets were drawn for every candidate and ``reference`` samples for the
    reference; ``level`` is that of each bound. ``peer`` is the candidate that the chosen one must
    not be worse than. Answers are those without temperature. ``digest`` is over the rows' ids and
    contents. The AUROC of the mutual information, out of scope against in scope, is null where
    there were too few rows of either kind.
    """

    date: str
    dalorra: str
    estimator: Literal["monte_carlo", "linearised"] = "monte_carlo"
    design: Design
    num_samples: int
    digest: str
    n: int
    n_out_of_scope: int
    reference: int
    packs: int
    level: float
    peer_num_samples: int
    reference_auroc: float | None
    dtype: str
    candidates: tuple[PlanCandidate, ...]

    @property
    def chosen(self) -> PlanCandidate:
        """The candidate that the adapter is served with."""
        return self._candidate(self.estimator, self.design, self.num_samples)

    @property
    def peer(self) -> PlanCandidate:
        """The candidate whose errors were the limit."""
        return self._candidate("monte_carlo", "iid", self.peer_num_samples)

    def _candidate(self, estimator: Estimator, design: Design, num_samples: int) -> PlanCandidate:
        asked = (estimator, design, num_samples)
        return next(c for c in self.candidates if (c.estimator, c.design, c.num_samples) == asked)


class Calibration(_Part):
    """Everything ``dalorra calibrate`` found out; ``scores_file`` holds the rows' scores.

    ``plan`` is the evidence for the default predictive; null where none was asked for.
    """

    date: str
    dalorra: str
    rows: CalibrationRows
    measured_with: MeasuredWith
    temperature: TemperatureFit
    combined: CombinedScore | None
    prediction_sets: tuple[PredictionSets, ...]
    uncertified: tuple[Uncertified, ...]
    reference: ReferenceProfile
    scores_file: str
    plan: PlanEvidence | None = None
