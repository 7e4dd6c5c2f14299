"""Claims of predictions, and the databases that feedback is tested on."""

from typing import Any

from server.feedback.claim import PredictionClaim, Reproduction
from server.feedback.signing import make_nonce

__all__ = ["NOW", "make_claim", "make_reproduction"]

NOW = 1_800_000_000


def make_claim(**changes: Any) -> PredictionClaim:
    """Return a claim that no other is equal to; an accepted answer under a certificate."""
    values: dict[str, Any] = {
        "adapter": "topics",
        "revision": "3f9a00112233",
        "label": "billing",
        "confidence": 0.97,
        "decision": "accept",
        "policy": "risk-0.05",
        "target_risk": 0.05,
        "num_samples": 10,
        "seed": 0,
        "estimator": "monte_carlo",
        "issued_at": NOW,
        "nonce": make_nonce(),
        "default_sampling": True,
    }
    return PredictionClaim(**(values | changes))


def make_reproduction(**changes: Any) -> Reproduction:
    """Return what a version 2 id adds."""
    values: dict[str, Any] = {
        "manifest": "0123456789abcdef" * 2,
        "probs": "fedcba9876543210" * 2,
        "mask_set": "ms_0123456789ab",
        "combined_with": None,
        "truncated": False,
        "deterministic": True,
        "threads": 2,
        "dtype": "float32",
        "design": "iid",
    }
    return Reproduction(**(values | changes))
