"""Admission, planning and execution of batches: plain Python, no torch, no pydantic, no HTTP."""

from server.batching.admission import Admission, AdmissionLimits, Permit, QueueFullError
from server.batching.batcher import Batcher
from server.batching.plan import BatchLimits, BatchPlan, next_batch, plan_batch, release
from server.batching.pulse import Pulse
from server.batching.stats import BatchObserver, BatchStats, FailureReason
from server.batching.ticket import (
    Answer,
    BatchFailedError,
    BatchTooLargeError,
    DeadlinePassedError,
    Pending,
    Ticket,
)

__all__ = [
    "Admission",
    "AdmissionLimits",
    "Answer",
    "BatchFailedError",
    "BatchLimits",
    "BatchObserver",
    "BatchPlan",
    "BatchStats",
    "BatchTooLargeError",
    "Batcher",
    "DeadlinePassedError",
    "FailureReason",
    "Pending",
    "Permit",
    "Pulse",
    "QueueFullError",
    "Ticket",
    "next_batch",
    "plan_batch",
    "release",
]
