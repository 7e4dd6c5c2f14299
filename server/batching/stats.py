"""What the engine thread tells telemetry."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, Self

from server.batching.plan import ReleaseReason, pass_tokens
from server.batching.ticket import Pending
from server.ports import BatchScores

__all__ = ["BatchObserver", "BatchStats", "FailureReason"]

FailureReason = Literal["error", "memory", "unavailable", "fatal", "hung"]
"""Why a batch gave no answers: it raised or answered nonsense, it did not fit into memory,
what the engine depends on did not answer, the engine was lost with it, or the engine fell silent
in it."""


@dataclass(frozen=True, slots=True)
class BatchStats:
    """What one finished batch tells telemetry.

    Attributes:
        num_rows: Its rows.
        num_tokens: Their tokens, without padding, of one pass.
        pass_tokens: Tokens of one pass, with the padding there is.
        cost_tokens: Padded tokens times passes: what the engine computed.
        reserved_tokens: What admission had counted for these rows: the measure of its speed.
        reason: Why it was released.
        waited_s: How long each row waited.
        duration_s: Time of the whole batch; ``forward_s`` and ``uq_s`` are its parts.
        forward_s: Time of the forward passes.
        uq_s: Time of the uncertainty scores.
    """

    num_rows: int
    num_tokens: int
    pass_tokens: int
    cost_tokens: int
    reserved_tokens: int
    reason: ReleaseReason
    waited_s: tuple[float, ...]
    duration_s: float
    forward_s: float
    uq_s: float

    @classmethod
    def of(
        cls,
        rows: Sequence[Pending],
        reason: ReleaseReason,
        waited_s: tuple[float, ...],
        duration_s: float,
        scores: BatchScores,
    ) -> Self:
        """Return what there is to tell about these rows and their scores."""
        tokens = pass_tokens(rows)
        return cls(
            num_rows=len(rows),
            num_tokens=sum(pending.num_tokens for pending in rows),
            pass_tokens=tokens,
            cost_tokens=tokens * rows[0].passes,
            reserved_tokens=sum(pending.ticket.row_cost for pending in rows),
            reason=reason,
            waited_s=waited_s,
            duration_s=duration_s,
            forward_s=scores.forward_s,
            uq_s=scores.uq_s,
        )


class BatchObserver(Protocol):
    """Told about batches, from the engine thread; must be quick and not raise."""

    def batch_finished(self, stats: BatchStats, /) -> None:
        """Take note of one batch that was answered."""
        ...

    def batch_failed(self, reason: FailureReason, /) -> None:
        """Take note of one run that gave no answers; its parts may be run again."""
        ...
