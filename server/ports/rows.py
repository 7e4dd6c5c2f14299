"""From a question to its scores: what goes into an engine and what comes out."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

__all__ = [
    "BatchKey",
    "BatchRow",
    "BatchScores",
    "ChoiceOption",
    "ChoiceQuestion",
    "Design",
    "EncodedRow",
    "Estimator",
    "Priority",
    "Question",
    "RowScores",
    "Sampling",
    "TextQuestion",
    "Truncate",
    "Wanted",
]

Estimator = Literal["monte_carlo", "mean_mask", "linearised"]

_LINEARISED_PASSES = 8
"""What a linearised answer counts as: a forward pass, and a backward one for each label."""

Design = Literal["iid", "stratified", "antithetic"]
"""How the M samples of an answer are drawn together."""

Truncate = Literal["none", "start", "end"]

Priority = Literal["interactive", "batch"]
"""Who goes first when not all can: somebody waits for an interactive answer."""

Wanted = Callable[[int], bool]
"""Whether somebody still waits for the answer of the row at this place of a batch."""


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
        num_samples: M, at least 1; always 1 for ``mean_mask``, and for ``linearised`` the number of
            draws.
        seed: Seed of the mask set; without effect under ``mean_mask`` and for point methods.
        estimator: ``monte_carlo`` averages M sampled functions; ``mean_mask`` runs the one
            deterministic function with every mask at its mean; ``linearised`` averages draws of
            the network linearised there.
        design: How the M samples are drawn together.
    """

    num_samples: int = 10
    seed: int = 0
    estimator: Estimator = "monte_carlo"
    design: Design = "iid"

    @property
    def num_functions(self) -> int:
        """How many answers are averaged."""
        return 1 if self.estimator == "mean_mask" else self.num_samples

    @property
    def passes(self) -> int:
        """Forward passes per row: what a row costs is its tokens times this."""
        if self.estimator == "linearised":
            return _LINEARISED_PASSES
        return self.num_functions


@dataclass(frozen=True, slots=True)
class BatchKey:
    """Who answers a row, and how it is sampled.

    Attributes:
        adapter: ``AdapterCard.key`` of a loaded adapter.
        sampling: What fixes the posterior samples.
        shared_depth: ``AdapterCard.shared_depth``.
        unpadded: Whether such rows share a pass without padding.
    """

    adapter: str
    sampling: Sampling
    shared_depth: float = 0.0
    unpadded: bool = False

    @property
    def work(self) -> float:
        """What its samples together compute for a row, in passes; from 1 to their number."""
        return self.shared_depth + (1 - self.shared_depth) * self.sampling.passes


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
class BatchRow:
    """One row of a batch. Rows of one batch have equal ``passes``; adapter and seed may differ."""

    key: BatchKey
    row: EncodedRow


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
    """What the engine returns for one batch, and where the time went.

    Attributes:
        rows: One per row of the batch, in its order; None where nobody waited any more and the
            engine left the row out.
        forward_s: Time of the forward passes.
        uq_s: Time of the uncertainty scores.
    """

    rows: tuple[RowScores | None, ...]
    forward_s: float
    uq_s: float
