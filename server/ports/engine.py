"""The protocol that every engine keeps."""

from collections.abc import Sequence
from typing import Protocol

from server.ports.adapters import AdapterCard
from server.ports.policies import Policy, PolicyEvaluation, RiskCoveragePoint, ScoreName
from server.ports.rows import BatchKey, BatchScores, EncodedRow, Question, Truncate

__all__ = [
    "Engine",
]


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
