"""What a policy decides on labelled rows: the table behind ``dalorra evaluate``."""

import torch
from torch import Tensor

from dalorra_core.artifact.manifest import Policy
from dalorra_core.metrics.uncertainty import summarise
from dalorra_core.predictive.scoring import Prediction

__all__ = ["decision_table"]


def decision_table(
    prediction: Prediction, labels: Tensor, policy: Policy
) -> dict[str, str | float | None]:
    """Return the shares of accept, review and abstain, and the errors among the accepted.

    Args:
        prediction: Answers for n rows.
        labels: (n,) right labels, -1 for out of scope.
        policy: Thresholds to apply.

    Returns:
        Fractions in [0, 1]; None where nothing is there to divide by. ``accuracy_answered_or_``
        ``refused`` counts a row as right when it is in scope, not abstained and labelled right,
        or out of scope and abstained: a rejected in-scope row counts as wrong, as in the
        published CLINC150 figures. ``in_scope_accuracy_after_abstaining`` does so in scope only.
    """
    summary = summarise(prediction.log_probs)
    scores = {
        "predictive_entropy": summary.predictive_entropy,
        "confidence": summary.confidence,
        "mutual_information": summary.mutual_information,
        "label_mass": prediction.label_mass,
    }
    score = scores[policy.abstain_score]
    if score is None:
        raise ValueError(f"policy {policy.name} needs {policy.abstain_score}")
    past = (
        score > policy.abstain_threshold
        if policy.abstain_above
        else score < policy.abstain_threshold
    )
    accept = ~past & (summary.confidence >= policy.min_confidence)
    inside = labels >= 0
    correct = summary.mean_probs.argmax(-1) == labels
    return {
        "policy": policy.name,
        "accepted": _share(accept),
        "reviewed": _share(~past & ~accept),
        "abstained": _share(past),
        "selective_risk_accepted": _share(~correct[accept]),
        "selective_risk_accepted_in_scope": _share(~correct[accept & inside]),
        "in_scope_abstained": _share(past[inside]),
        "out_of_scope_accepted": _share(accept[~inside]),
        "out_of_scope_abstained": _share(past[~inside]),
        "in_scope_accuracy_after_abstaining": _share((correct & ~past)[inside]),
        "accuracy_answered_or_refused": _share((correct & ~past) | (~inside & past)),
    }


def _share(flags: Tensor) -> float | None:
    return float(flags.to(torch.float64).mean()) if flags.numel() else None
