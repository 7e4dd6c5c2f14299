"""Claims of predictions, and the databases that feedback is tested on."""

from typing import Any

from server.feedback.signing import PredictionClaim, make_nonce

__all__ = ["NOW", "make_claim"]

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
