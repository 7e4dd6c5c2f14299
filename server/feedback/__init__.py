"""Feedback: signed prediction ids, the database of true labels, and the monitor of certificates."""

from server.feedback.claim import PredictionClaim, Reproduction, answer_digest
from server.feedback.errors import (
    BadPredictionIdError,
    ExpiredPredictionError,
    FeedbackConflictError,
    FeedbackError,
    FeedbackSetupError,
    FeedbackUnavailableError,
)
from server.feedback.from_settings import make_signer, make_store, secret_path
from server.feedback.monitor import RiskMonitor
from server.feedback.signing import (
    PredictionSigner,
    claim_unverified,
    load_secrets,
    make_nonce,
)
from server.feedback.store import FeedbackStore, StoredFeedback

__all__ = [
    "BadPredictionIdError",
    "ExpiredPredictionError",
    "FeedbackConflictError",
    "FeedbackError",
    "FeedbackSetupError",
    "FeedbackStore",
    "FeedbackUnavailableError",
    "PredictionClaim",
    "PredictionSigner",
    "Reproduction",
    "RiskMonitor",
    "StoredFeedback",
    "answer_digest",
    "claim_unverified",
    "load_secrets",
    "make_nonce",
    "make_signer",
    "make_store",
    "secret_path",
]
