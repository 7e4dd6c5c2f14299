"""What is known about a loaded adapter and its calibration."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from server.ports.policies import Policy
from server.ports.rows import BatchKey, Design, Estimator, Sampling

__all__ = [
    "AdapterCard",
    "CalibrationCard",
    "PlanCard",
    "PredictionSetRule",
    "ReferenceProfile",
    "ScoreReference",
    "SelfTest",
    "StoredAdapter",
    "UncertifiedTarget",
]


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
class PlanCard:
    """Why an adapter is served with its M and design: squared errors beside those of its peer.

    Attributes:
        date: When it was measured, ISO 8601.
        estimator: Samples, or draws of the linearised network.
        num_samples: M, or the number of draws.
        design: How the M samples are drawn together.
        peer_num_samples: M of the independent samples that it is as good as.
        mean_error: Of the mean probabilities, summed over the labels.
        peer_mean_error: The peer's.
        information_error: Of the mutual information, nats squared.
        peer_information_error: The peer's.
        n: Rows it was measured on.
        reference: Samples that stood for infinitely many.
    """

    date: str
    estimator: Estimator
    num_samples: int
    design: Design
    peer_num_samples: int
    mean_error: float
    peer_mean_error: float
    information_error: float | None
    peer_information_error: float | None
    n: int
    reference: int


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
        plan: Why it has its M and design; None when nobody measured it.
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
    plan: PlanCard | None = None


@dataclass(frozen=True, slots=True)
class AdapterCard:
    """What the server and its clients may know about one loaded adapter: no host paths.

    Attributes:
        name: Name by which requests address it.
        revision: First 12 hex digits of the sha256 of its tensors.
        kind: Whether it answers texts or multiple-choice questions.
        labels: All labels, in label order.
        method: How uncertainty enters it, such as ``dalorra`` or ``mle``.
        point_method: True when there is one answer only, so no epistemic scores.
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
        rank: r of its low-rank factors.
        signed_by: Id of the trusted key that signed it; None when no key was asked for.
        memory_bytes: What keeping it in memory costs, in bytes, with the sample sets it may keep.
        manifest_sha256: Digest of its manifest, in hex: which calibration and policies these are;
            empty when the engine does not say.
        deterministic: Whether rows are run alone, so that answers are equal bit for bit.
        threads: Threads of one forward pass on a CPU, which its last digits depend on; 0 when the
            engine does not say.
        load_id: Tells two loads of the same tensors apart; the engine sets it.
        fixed_functions: How many functions there are, such as the members of an ensemble; None when
            any number of them may be sampled, and for point methods.
        max_num_samples: The most samples whose memory the engine grants; None when they take none.
        designs: How its samples may be drawn together.
        linearised_draws: Draws that a linearised answer averages; None where the adapter has none.
        sampled: How samples are drawn for who asks for them, where ``defaults`` takes none; None
            where they are ``defaults``.
        fixed_sampling: Why no other sampling than ``defaults`` can be asked for; None when it can.
        shared_depth: Share of a pass that the samples of one answer have in common and that is
            computed once for all of them, in [0, 1).
        unpadded: Whether its rows of unlike length can share a pass without padding.
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
    rank: int = 0
    signed_by: str | None = None
    memory_bytes: int = 0
    manifest_sha256: str = ""
    deterministic: bool = False
    threads: int = 0
    load_id: str = ""
    fixed_functions: int | None = None
    max_num_samples: int | None = None
    designs: tuple[Design, ...] = ("iid",)
    linearised_draws: int | None = None
    sampled: Sampling | None = None
    fixed_sampling: str | None = None
    shared_depth: float = 0.0
    unpadded: bool = False

    def batch_key(self, sampling: Sampling) -> BatchKey:
        """Return how the rows that it answers under ``sampling`` are known to a batch."""
        unpadded = self.unpadded and sampling.estimator != "linearised"  # its gradients need it
        return BatchKey(self.key, sampling, self.shared_depth, unpadded)

    @property
    def key(self) -> str:
        """How the engine knows this load of the adapter."""
        return self.load_id or self.name


@dataclass(frozen=True, slots=True)
class StoredAdapter:
    """An adapter on disk, as its manifest describes it; nothing of it has been verified.

    Attributes:
        name: Name in its manifest; the directory's when it cannot be read.
        revision: First 12 hex digits of the sha256 of its tensors; None when it cannot be read.
        method: How uncertainty enters it; None when it cannot be read.
        num_labels: C; 0 when it cannot be read.
        num_bytes: Size of its files, in bytes.
        signed: Whether a signature lies beside it.
        calibrated: Whether it holds a calibration.
        problem: Why it cannot be read; None when it can. Names no host path.
    """

    name: str
    revision: str | None
    method: str | None
    num_labels: int
    num_bytes: int
    signed: bool
    calibrated: bool
    problem: str | None = None


@dataclass(frozen=True, slots=True)
class SelfTest:
    """How far an adapter is from the probabilities that are stored with it.

    Attributes:
        max_abs_error: Largest absolute difference of a probability; 0 when none are stored.
        limit: The largest that is accepted in this precision.
    """

    max_abs_error: float
    limit: float

    @property
    def passed(self) -> bool:
        """Whether the difference is within the limit (NaN is not)."""
        return self.max_abs_error <= self.limit
