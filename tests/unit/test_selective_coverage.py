"""benchmarks.selective_coverage: plain thresholds are compared with what a policy accepts."""

import torch

from benchmarks.selective_coverage import measured
from dalorra_core.artifact.calibration_record import Guarantee, Limit, Policy
from dalorra_core.calibration.scores import ScoreTable
from tests.support.tiny_manifest import tiny_calibration, tiny_manifest

LABELS = ("ham", "spam")


def table() -> ScoreTable:
    """Four rows, the third one wrong, none out of scope."""
    confidence = torch.tensor([0.9, 0.8, 0.7, 0.6], dtype=torch.float64)
    return ScoreTable(
        torch.tensor([0, 1, 1, 1]),
        torch.tensor([0, 1, 0, 1]),
        {"confidence": confidence, "predictive_entropy": -confidence},
    )


def policy(threshold: float, by_label: dict[str, float | None] | None = None) -> Policy:
    guarantee = Guarantee(
        procedure="fixed_sequence",
        target_risk=0.1,
        delta=0.1,
        out_of_scope_share=0.0,
        n=9,
        n_out_of_scope=0,
        n_accepted=9,
        n_out_of_scope_accepted=0,
        risk_upper_bound=0.1,
        in_scope_coverage=1.0,
        calibrated_at="",
        measured_with=tiny_calibration("").measured_with,
    )
    return Policy(
        name="p",
        accept=Limit(score="confidence", threshold=threshold),
        accept_by_label=by_label,
        chosen_on=tiny_manifest().policies[0].chosen_on,
        guarantee=guarantee,
    )


def test_the_measured_risk_and_the_thresholds_beside_it() -> None:
    found = measured(policy(0.65), table(), LABELS)
    assert (found["coverage"], found["measured_risk"]) == (0.75, 1 / 3)
    assert found["coverage_at_this_risk"] == {"confidence": 1.0, "predictive_entropy": 1.0}
    assert found["out_of_scope_accepted"] is None


def test_a_label_that_is_never_accepted_is_not_counted() -> None:
    found = measured(policy(0.5, {"ham": None, "spam": 0.5}), table(), LABELS)
    assert (found["coverage"], found["measured_risk"]) == (0.5, 0.0)


def test_a_policy_that_accepts_none_of_the_rows_has_no_risk() -> None:
    found = measured(policy(0.95), table(), LABELS)
    assert (found["coverage"], found["measured_risk"]) == (0.0, None)
    assert found["coverage_at_this_risk"] is None
