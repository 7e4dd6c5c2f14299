"""The protocol that every engine keeps."""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from server.ports.adapters import AdapterCard, SelfTest, StoredAdapter
from server.ports.policies import Policy, PolicyEvaluation, RiskCoveragePoint, ScoreName
from server.ports.rows import (
    BatchKey,
    BatchRow,
    BatchScores,
    EncodedRow,
    Question,
    Truncate,
    Wanted,
)

__all__ = [
    "Engine",
]


class Engine(Protocol):
    """Answers questions with one base model and any number of adapters.

    ``load`` comes first. ``run_batch`` is called from one thread only; everything else may be
    called from another thread while it runs. Adapters are named by ``AdapterCard.key``. After
    ``close`` whatever asks an adapter raises ``EngineStoppedError``.
    """

    @property
    def preferred_batch_tokens(self) -> int:
        """Padded tokens times passes at which this hardware is well used; read after ``load``."""
        ...

    @property
    def worthwhile_padding(self) -> float:
        """Share of padding in a batch above which two batches are cheaper here, in [0, 1]."""
        ...

    @property
    def mixes_adapters(self) -> bool:
        """Whether one batch may hold rows of different adapters and seeds with equal ``passes``."""
        ...

    @property
    def problem(self) -> str | None:
        """Why it cannot answer now, although it is not lost; None when it can. From any thread."""
        ...

    def load(self) -> tuple[AdapterCard, ...]:
        """Load the base model, and load, check and warm every adapter it was made with; slow.

        Raises when one cannot be served.
        """
        ...

    def load_adapter(self, directory: Path, name: str | None = None) -> AdapterCard:
        """Verify, load, warm and self-test one more adapter; slow.

        Nothing answers with it before this returns, and nothing of it stays when it raises.

        Args:
            directory: An artifact.
            name: Name to serve it under; None for the one in its manifest.

        Raises:
            AdapterLoadError: It cannot be served; its subclasses say why.
        """
        ...

    def unload_adapter(self, adapter: str) -> None:
        """Let go of an adapter; nobody asks it any more. An unknown key changes nothing."""
        ...

    def stored_adapter(self, directory: Path) -> StoredAdapter:
        """Return what lies in a directory, without loading it; never raises for bad content."""
        ...

    def self_test(self, adapter: str) -> SelfTest:
        """Recompute the stored probabilities of an adapter; takes turns with ``run_batch``."""
        ...

    def encode(self, adapter: str, question: Question, truncate: Truncate) -> EncodedRow:
        """Turn a question into tokens; called from several threads at once.

        Raises:
            RowTooLongError: Too many tokens and ``truncate`` is ``none``.
            RowRejectedError: The question cannot be asked of this adapter.
        """
        ...

    def run_batch(self, rows: Sequence[BatchRow], wanted: Wanted) -> BatchScores:
        """Answer rows with equal ``passes``; with one key, unless ``mixes_adapters``.

        Args:
            rows: At least one.
            wanted: Asked between forward passes, at least once before each; rows that nobody waits
                for any more need not be computed. It is also the sign of life of this batch.

        Raises:
            EngineFatalError: The engine is lost; nothing will ever be answered again.
            EngineMemoryError: The batch did not fit; a smaller one may.
            EngineUnavailableError: What the engine depends on does not answer; no row is to blame.
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
