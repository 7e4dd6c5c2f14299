"""What a policy decides on labelled rows: the table behind ``dalorra evaluate``."""

from collections.abc import Sequence

from torch import Tensor

from dalorra_core.artifact.calibration_record import Policy
from dalorra_core.calibration.decisions import decide
from dalorra_core.calibration.scores import ScoreTable

__all__ = ["decision_table"]


def decision_table(
    table: ScoreTable, policy: Policy, labels: Sequence[str], *, truncated: Tensor | None = None
) -> dict[str, str | float | None]:
    """Return the shares of accept, review and abstain, and the errors among the accepted.

    Args:
        table: n labelled rows.
        policy: Limits to apply.
        labels: Label names in label order.
        truncated: (n,) which rows were cut; the server reviews what it would accept of them.

    Returns:
        Fractions in [0, 1]; None where nothing is there to divide by. ``accuracy_answered_or_``
        ``refused`` counts a row as right when it is in scope, not abstained and labelled right,
        or out of scope and abstained: a rejected in-scope row counts as wrong, as in the
        published CLINC150 figures. ``in_scope_accuracy_after_abstaining`` does so in scope only.
        ``target_risk`` and ``certified_out_of_scope_share`` are the certificate's, None without.

    Raises:
        ConfigError: If the policy needs a score that was not measured.
    """
    decisions = decide(policy, table, labels)
    accept, past = decisions.accept, decisions.abstain
    if truncated is not None:
        accept = accept & ~truncated
    outside, correct = table.outside, table.correct
    held = policy.guarantee
    return {
        "policy": policy.name,
        "accepted": _share(accept),
        "reviewed": _share(~accept & ~past),
        "abstained": _share(past),
        "selective_risk_accepted": _share(~correct[accept]),
        "selective_risk_accepted_in_scope": _share(~correct[accept & ~outside]),
        "in_scope_accepted": _share(accept[~outside]),
        "in_scope_abstained": _share(past[~outside]),
        "out_of_scope_accepted": _share(accept[outside]),
        "out_of_scope_abstained": _share(past[outside]),
        "in_scope_accuracy_after_abstaining": _share((correct & ~past)[~outside]),
        "accuracy_answered_or_refused": _share((correct & ~past) | (outside & past)),
        "target_risk": None if held is None else held.target_risk,
        "certified_out_of_scope_share": None if held is None else held.out_of_scope_share,
    }


def _share(flags: Tensor) -> float | None:
    return float(flags.double().mean()) if flags.numel() else None
