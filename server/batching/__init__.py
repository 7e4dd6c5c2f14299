"""Admission, planning and execution of batches: plain Python, no torch, no pydantic, no HTTP."""

from server.batching.admission import Admission, AdmissionLimits, Permit, QueueFullError
from server.batching.batcher import Batcher, BatchObserver, BatchStats
from server.batching.plan import BatchLimits, BatchPlan, plan_batch, release
from server.batching.ticket import Answer, BatchFailedError, DeadlinePassedError, Pending, Ticket

__all__ = [
    "Admission",
    "AdmissionLimits",
    "Answer",
    "BatchFailedError",
    "BatchLimits",
    "BatchObserver",
    "BatchPlan",
    "BatchStats",
    "Batcher",
    "DeadlinePassedError",
    "Pending",
    "Permit",
    "QueueFullError",
    "Ticket",
    "plan_batch",
    "release",
]
