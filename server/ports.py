"""The values that travel through the server, and the Engine protocol that answers questions.

Plain Python: neither torch nor pydantic nor FastAPI. An engine turns a ``Question`` into an
``EncodedRow`` (any thread), and a batch of rows that share adapter and sampling into ``RowScores``
(the one engine thread). Everything here is a frozen value, so that it may cross threads freely.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

__all__ = [
    "AbstainScore",
    "AdapterCard",
    "BatchKey",
    "BatchScores",
    "ChoiceOption",
    "ChoiceQuestion",
    "EncodedRow",
    "Engine",
    "EngineFatalError",
    "EngineStoppedError",
    "Estimator",
    "Policy",
    "Question",
    "RowRejectedError",
    "RowScores",
    "RowTooLongError",
    "Sampling",
    "TextQuestion",
    "Truncate",
]

Estimator = Literal["monte_carlo", "mean_mask"]
Truncate = Literal["none", "start", "end"]
AbstainScore = Literal["predictive_entropy", "confidence", "mutual_information", "label_mass"]


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
class Policy:
    """When to accept an answer, when to abstain, and on which data the two limits were chosen.

    Attributes:
        name: Name by which a request may ask for it.
        min_confidence: Accept when the confidence is at least this; above 1 means never.
        abstain_score: The score that recognises out-of-scope questions.
        abstain_threshold: Abstain when that score is past this value (in the score's own unit).
        abstain_above: True when large scores mean out of scope (entropy), False when small ones do.
        target_selective_risk: Error rate among accepted answers the threshold was chosen for.
        chosen_on: Split, sizes, sampling and date of that choice; shown to the client as it is.
    """

    name: str
    min_confidence: float
    abstain_score: AbstainScore
    abstain_threshold: float
    abstain_above: bool
    target_selective_risk: float | None = None
    chosen_on: Mapping[str, object] = field(default_factory=dict)


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

    def close(self) -> None:
        """Let go of the model; called once, after the engine thread has ended."""
        ...
