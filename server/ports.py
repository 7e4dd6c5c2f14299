"""The values that travel through the server, and the Engine protocol that answers questions.

Plain Python: neither torch nor pydantic nor FastAPI. An engine turns a ``Question`` into an
``EncodedRow`` (any thread), and a batch of rows that share adapter and sampling into ``RowScores``
(the one engine thread). Everything here is a frozen value, so that it may cross threads freely.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

__all__ = [
    "HIGHER_IS_SURER",
    "AbstainGuarantee",
    "AdapterCard",
    "BatchKey",
    "BatchScores",
    "CalibrationCard",
    "ChoiceOption",
    "ChoiceQuestion",
    "EncodedRow",
    "Engine",
    "EngineFatalError",
    "EngineStoppedError",
    "Estimator",
    "FeedbackRisk",
    "Guarantee",
    "Limit",
    "NotCalibratedError",
    "Policy",
    "PolicyEvaluation",
    "PredictionSetRule",
    "Question",
    "ReferenceProfile",
    "RiskCoveragePoint",
    "RowRejectedError",
    "RowScores",
    "RowTooLongError",
    "Sampling",
    "ScoreName",
    "ScoreReference",
    "TextQuestion",
    "Truncate",
    "UncertifiedTarget",
]

Estimator = Literal["monte_carlo", "mean_mask"]
Truncate = Literal["none", "start", "end"]
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


class RowRejectedError(Exception):
    """The engine cannot turn this question into tokens; the text is meant for the client."""


class RowTooLongError(RowRejectedError):
    """A question has more tokens than the limit and truncation was not allowed.

    Attributes:
        actual: Tokens of the whole prompt.
        limit: The most tokens one prompt may have.
    """

    def __init__(self, actual: int, limit: int) -> None:
        super().__init__(f"the prompt has {actual} tokens; the limit is {limit}")
        self.actual = actual
        self.limit = limit


class EngineFatalError(Exception):
    """The engine can never answer again (a lost device): the engine thread must end."""


class EngineStoppedError(Exception):
    """No engine thread runs any more, so the work will not be done."""


class NotCalibratedError(LookupError):
    """The adapter stores no calibration rows, or not the score that was asked for."""


@dataclass(frozen=True, slots=True)
class TextQuestion:
    """A text to be given one of the adapter's labels."""

    text: str


@dataclass(frozen=True, slots=True)
class ChoiceOption:
    """One possible answer and the label (such as ``A``) that stands for it."""

    label: str
    text: str


@dataclass(frozen=True, slots=True)
class ChoiceQuestion:
    """A question with its own answers, 2 to 26 of them, in the client's order."""

    question: str
    choices: tuple[ChoiceOption, ...]
    context: str | None = None


Question = TextQuestion | ChoiceQuestion


@dataclass(frozen=True, slots=True)
class Sampling:
    """What fixes the posterior samples of one answer.

    Attributes:
        num_samples: M, at least 1; always 1 for ``mean_mask``.
        seed: Seed of the mask set; without effect under ``mean_mask`` and for point methods.
        estimator: ``monte_carlo`` averages M sampled functions; ``mean_mask`` runs the one
            deterministic function with every mask at its mean.
        design: How the M samples are drawn together.
    """

    num_samples: int = 10
    seed: int = 0
    estimator: Estimator = "monte_carlo"
    design: str = "iid"

    @property
    def passes(self) -> int:
        """Forward passes per row: what a row costs is its tokens times this."""
        return self.num_samples if self.estimator == "monte_carlo" else 1


@dataclass(frozen=True, slots=True)
class BatchKey:
    """Rows with equal keys may run in one batch."""

    adapter: str
    sampling: Sampling


@dataclass(frozen=True, slots=True)
class EncodedRow:
    """One question as tokens; ``payload`` belongs to the engine that made it.

    Attributes:
        num_tokens: Tokens of the prompt, at least 1.
        truncated: Whether a part of the text was cut away to fit.
        payload: The engine's own representation, never looked into by the server.
    """

    num_tokens: int
    truncated: bool
    payload: object


@dataclass(frozen=True, slots=True)
class RowScores:
    """The answer to one row, before any decision.

    Attributes:
        labels: The row's labels: the adapter's, or the row's own choices in the client's order.
        probs: Mean over samples of the probability of each label; they sum to 1.
        confidence: Largest of ``probs``, in [0, 1].
        label_mass: Probability of all label tokens under the full vocabulary, in [0, 1].
        predictive_entropy: H[E p], nats, in [0, ln C].
        normalized_entropy: ``predictive_entropy`` / ln C, in [0, 1].
        variation_ratio: Share of samples whose most probable label is not the answer's.
        expected_entropy: E[H p], nats; None where there is one function only.
        mutual_information: Their difference, nats; None where there is one function only.
        confidence_std: Standard deviation over samples of the answer's probability; None where
            there is one function only.
        samples: The M distributions behind the mean, (M, C).
        combined: Calibrated estimate that the answer is right and in scope, in [0, 1]; None when
            the adapter stores no such score.
        prediction_set: Labels of the adapter's first prediction-set rule, most probable first;
            None when it stores none.
    """

    labels: tuple[str, ...]
    probs: tuple[float, ...]
    confidence: float
    label_mass: float | None
    predictive_entropy: float
    normalized_entropy: float
    variation_ratio: float
    expected_entropy: float | None
    mutual_information: float | None
    confidence_std: float | None
    samples: tuple[tuple[float, ...], ...]
    combined: float | None = None
    prediction_set: tuple[str, ...] | None = None

    @property
    def label(self) -> str:
        """The most probable label (the first of equals)."""
        return self.labels[self.probs.index(max(self.probs))]


@dataclass(frozen=True, slots=True)
class BatchScores:
    """What the engine returns for one batch: one ``RowScores`` per row, and where the time went."""

    rows: tuple[RowScores, ...]
    forward_s: float
    uq_s: float


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
class UncertifiedTarget:
    """A target risk that calibration could not certify, why, and how many more rows might do."""

    target_risk: float
    label: str | None
    reason: str
    more_labels: int | None


@dataclass(frozen=True, slots=True)
class PredictionSetRule:
    """A conformal rule: its sets hold the right label of in-scope questions with 1 - alpha."""

    kind: Literal["lac", "aps"]
    alpha: float
    n: int
    empirical_coverage: float
    mean_size: float


@dataclass(frozen=True, slots=True)
class ScoreReference:
    """Share of calibration rows at or below each edge; the edges are the server's buckets."""

    edges: tuple[float, ...]
    cdf: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class ReferenceProfile:
    """The traffic that an adapter was calibrated on.

    Attributes:
        n: Calibration rows.
        scores: ``confidence``, ``label_mass``, and ``predictive_entropy`` and
            ``mutual_information`` divided by ln C.
        confidence_bin_edges: Ascending inner edges of the drift bins; a confidence is in the bin
            whose number is the count of edges at or below it.
        confidence_bin_shares: Share of the calibration rows in each bin, one more than edges.
        labels: Share of each predicted label.
        decisions: Share of each decision under the first policy.
    """

    n: int
    scores: Mapping[str, ScoreReference]
    confidence_bin_edges: tuple[float, ...]
    confidence_bin_shares: tuple[float, ...]
    labels: Mapping[str, float]
    decisions: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class CalibrationCard:
    """What calibration found out about an adapter.

    Attributes:
        date: When, ISO 8601.
        n: Calibration rows.
        n_out_of_scope: Those of them that are out of scope.
        temperature: Softmax temperature in use; 1 leaves the probabilities alone.
        prediction_sets: Stored rules; the first gives ``RowScores.prediction_set``.
        uncertified: Targets without a certificate.
        reference: What drift is measured against.
        has_combined: Whether it stores the weights behind ``RowScores.combined``.
        void: Why its promises do not hold on this server; None when they do.
    """

    date: str
    n: int
    n_out_of_scope: int
    temperature: float
    prediction_sets: tuple[PredictionSetRule, ...]
    uncertified: tuple[UncertifiedTarget, ...]
    reference: ReferenceProfile
    has_combined: bool = False
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
class AdapterCard:
    """What the server and its clients may know about one loaded adapter: no host paths.

    Attributes:
        name: Name by which requests address it.
        revision: First 12 hex digits of the sha256 of its tensors.
        kind: Whether it answers texts or multiple-choice questions.
        labels: All labels, in label order.
        method: How uncertainty enters it, such as ``dalorra`` or ``mle``.
        point_method: True when there is one function only, so no epistemic scores.
        base: Public name of the base model.
        base_fingerprint: sha256 over the base model's tensors.
        max_tokens: The most tokens one prompt may have.
        defaults: Sampling of a request that does not say otherwise; calibration holds for it.
        policies: Decision rules; the first is used when a request names none.
        prompt: Name of the prompt template.
        prompt_sha256: Hash of that template.
        mask_set: Id of the default sample set; None for point methods.
        selftest_max_abs_error: Largest difference from the stored golden probabilities; None when
            the adapter stores none.
        out_of_scope_label: Name under which feedback may say "none of the labels"; None: no name.
        dtype: Precision of the base model here, such as ``float32``.
        calibration: What calibration found out; None before it.
    """

    name: str
    revision: str
    kind: Literal["text", "choice"]
    labels: tuple[str, ...]
    method: str
    point_method: bool
    base: str
    base_fingerprint: str
    max_tokens: int
    defaults: Sampling
    policies: tuple[Policy, ...] = ()
    prompt: str = ""
    prompt_sha256: str = ""
    mask_set: str | None = None
    selftest_max_abs_error: float | None = None
    out_of_scope_label: str | None = None
    dtype: str = "float32"
    calibration: CalibrationCard | None = None


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


class Engine(Protocol):
    """Answers questions. ``load`` comes first; ``run_batch`` is called from one thread only."""

    @property
    def preferred_batch_tokens(self) -> int:
        """Padded tokens times passes at which this hardware is well used; read after ``load``."""
        ...

    def load(self) -> tuple[AdapterCard, ...]:
        """Load, check and warm every adapter; slow. Raises when one cannot be served."""
        ...

    def encode(self, adapter: str, question: Question, truncate: Truncate) -> EncodedRow:
        """Turn a question into tokens; called from several threads at once.

        Raises:
            RowTooLongError: Too many tokens and ``truncate`` is ``none``.
            RowRejectedError: The question cannot be asked of this adapter.
        """
        ...

    def run_batch(self, key: BatchKey, rows: Sequence[EncodedRow]) -> BatchScores:
        """Answer rows that share adapter and sampling.

        Raises:
            EngineFatalError: The engine is lost; nothing will ever be answered again.
            Exception: This batch failed; the next one may succeed.
        """
        ...

    def mask_set(self, key: BatchKey) -> str | None:
        """Return the id of the sample set of this sampling; None where nothing is sampled."""
        ...

    def risk_coverage(
        self, adapter: str, score: ScoreName, *, out_of_scope_share: float, delta: float
    ) -> tuple[RiskCoveragePoint, ...]:
        """Return the risk-coverage curve of a score on the stored certify rows, surest first.

        At most some hundred points; may be called from any thread.

        Raises:
            NotCalibratedError: The adapter stores no calibration rows or not this score.
            ValueError: The share asks for out-of-scope rows and none are stored.
        """
        ...

    def evaluate_policy(
        self, adapter: str, policy: Policy, *, out_of_scope_share: float, delta: float
    ) -> PolicyEvaluation:
        """Return what a policy would do on the stored certify rows; from any thread.

        Raises:
            NotCalibratedError: It stores no calibration rows, or not a score the policy limits.
            ValueError: The share asks for out-of-scope rows and none are stored.
        """
        ...

    def close(self) -> None:
        """Let go of the model; called once, after the engine thread has ended."""
        ...
