"""Metrics of the queue, the batches and the stages of a request."""

from collections.abc import Callable
from functools import partial
from typing import Literal, get_args

from server.batching import BatchStats, FailureReason
from server.ports import Priority
from server.telemetry.edges import BATCH_TOKENS, PADDING, ROWS, STAGE_SECONDS
from server.telemetry.families import Families

__all__ = ["FAILURES", "RELEASES", "RESTARTS", "STAGES", "Loss", "WorkMetrics"]

Loss = Literal["dead", "hung"]
"""How an engine was lost: its thread ended, or gave no sign of life for too long."""

STAGES = ("queue", "tokenize", "forward", "uq", "serialize")
RELEASES = ("full", "timeout", "alone", "drain", "deadline")
FAILURES: tuple[FailureReason, ...] = get_args(FailureReason)
RESTARTS: tuple[Loss, ...] = get_args(Loss)


class WorkMetrics:
    """What waits, what runs, and where the time goes."""

    def __init__(self, families: Families) -> None:
        stage = families.histogram(
            "stage_duration_seconds",
            "Time per stage of a request or batch.",
            STAGE_SECONDS,
            "stage",
        )
        released = families.counter("batch_released", "Why batches were released.", "reason")
        failed = families.counter("batch_failures", "Runs of a batch without answers.", "reason")
        restarted = families.counter("engine_restarts", "Restarts of a lost engine.", "reason")
        self._depth = families.gauge("queue_depth", "Rows waiting for the engine.", "priority")
        self._tokens = families.gauge(
            "queue_tokens", "Tokens times samples waiting for the engine.", "priority"
        )
        self._batch_rows = families.histogram("batch_rows", "Rows per batch.", ROWS)
        self._batch_tokens = families.histogram(
            "batch_tokens",
            "Tokens times samples per batch, with the padding there is.",
            BATCH_TOKENS,
        )
        self._padding = families.histogram(
            "batch_padding_ratio", "Share of padding in a batch.", PADDING
        )
        self._stages = {name: stage.labels(name) for name in STAGES}
        self._released = {reason: released.labels(reason) for reason in RELEASES}
        self._failed = {reason: failed.labels(reason) for reason in FAILURES}
        self._restarted = {reason: restarted.labels(reason) for reason in RESTARTS}
        for priority in get_args(Priority):
            self._depth.labels(priority)
            self._tokens.labels(priority)

    def watch_queue(
        self, depth: Callable[[Priority], float], tokens: Callable[[Priority], float]
    ) -> None:
        """Read the queue's size at every scrape from these two functions of a priority."""
        for priority in get_args(Priority):
            self._depth.labels(priority).set_function(partial(depth, priority))
            self._tokens.labels(priority).set_function(partial(tokens, priority))

    def stage(self, name: str, duration_s: float) -> None:
        """Note the time of one stage; ``name`` is one of ``STAGES``."""
        self._stages[name].observe(duration_s)

    def batch(self, stats: BatchStats) -> None:
        """Note one finished batch; called from the engine thread."""
        self._batch_rows.observe(stats.num_rows)
        self._batch_tokens.observe(stats.cost_tokens)
        self._padding.observe(1 - stats.num_tokens / stats.pass_tokens)
        self._released[stats.reason].inc()
        for waited_s in stats.waited_s:
            self.stage("queue", waited_s)
        self.stage("forward", stats.forward_s)
        self.stage("uq", stats.uq_s)

    def batch_failed(self, reason: FailureReason) -> None:
        """Count a run of a batch that gave no answers; called from the engine thread."""
        self._failed[reason].inc()

    def engine_restarted(self, loss: Loss) -> None:
        """Count an attempt to replace a lost engine."""
        self._restarted[loss].inc()
