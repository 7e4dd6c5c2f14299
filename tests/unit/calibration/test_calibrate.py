"""dalorra_core.calibration.calibrate on made-up answers: what is left out, and why."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from dalorra_core.artifact.calibration_record import MeasuredWith
from dalorra_core.calibration.answered_rows import AnsweredRows
from dalorra_core.calibration.calibrate import (
    CalibrationOutcome,
    CalibrationRequest,
    calibrate,
)
from dalorra_core.cli.calibration_summary import policy_text
from dalorra_core.errors import DataError
from dalorra_core.predictive.scoring import Prediction

WITH = MeasuredWith(
    adapter_sha256="0",
    num_samples=3,
    design="iid",
    seed=0,
    estimator="monte_carlo",
    temperature=1.0,
    dtype="float32",
)


def answered(n: int, n_outside: int = 0, *, wrong: float = 0.0) -> AnsweredRows:
    """Three samples; sure in scope, unsure out of it; a share of labels is wrong."""
    generator = torch.Generator().manual_seed(2)
    total = n + n_outside
    truth = torch.randint(3, (total,), generator=generator)
    height = 3 + 2 * torch.rand(total, 1, generator=generator)
    height[n:] = 0.3
    logits = height * torch.nn.functional.one_hot(truth, 3)
    samples = logits + 0.3 * torch.randn(3, total, 3, generator=generator)
    flipped = torch.rand(total, generator=generator) < wrong
    labels = torch.where(flipped, (truth + 1) % 3, truth)
    labels[n:] = -1
    return AnsweredRows(
        source="made up",
        digest="d",
        ids=[f"r{i}" for i in range(total)],
        digests=torch.zeros(total, 16, dtype=torch.uint8),
        labels=labels,
        num_choices=torch.full((total,), 3),
        prediction=Prediction(samples.log_softmax(-1), None),
    )


def calibrated(rows: AnsweredRows, **request: Any) -> CalibrationOutcome:
    return calibrate(rows, ("a", "b", "c"), WITH, CalibrationRequest(**request), "2026-01-01")


def test_an_adapter_without_errors_gets_certificates_and_no_combined_score() -> None:
    found = calibrated(answered(800))
    assert found.calibration.combined is None
    assert "combined" not in found.rows.table.scores
    assert "at least 20 right and 20 wrong answers" in found.notes[0]
    assert found.out_of_scope_share == 0.0
    names = [policy.name for policy in found.policies]
    assert names == ["default", "risk-0.01", "risk-0.02", "risk-0.05", "risk-0.1"]
    default = found.policies[0]
    assert default.guarantee is not None
    assert default.guarantee.target_risk == 0.05
    with pytest.raises(DataError, match="at least 20 right"):
        calibrated(answered(800), score="combined")
    assert calibrated(answered(800), score="confidence").notes == ()


def test_out_of_scope_rows_set_the_share_unless_it_is_declared() -> None:
    rows = answered(800, 200)
    assert calibrated(rows).out_of_scope_share == 0.2
    assert calibrated(rows, out_of_scope_share=0.05).out_of_scope_share == 0.05


def test_a_hopeless_adapter_gets_an_empirical_default_and_reasons() -> None:
    found = calibrated(answered(400, wrong=0.9), per_label=(0.1,))
    (default,) = found.policies
    assert default.guarantee is None
    assert default.chosen_on.n == 400
    assert "accepts nothing" in policy_text(default)
    assert policy_text(default).endswith("guarantee: none")  # nothing accepted meets no target
    missing = found.calibration.uncertified
    assert [u.target_risk for u in missing] == [0.01, 0.02, 0.05, 0.1, 0.1, 0.1, 0.1]
    assert [u.label for u in missing[4:]] == ["a", "b", "c"]


def test_too_few_rows_to_promise_anything_about_abstaining_never_abstain() -> None:
    found = calibrated(answered(300), max_abstained=0.005)
    default = found.policies[0]
    assert default.guarantee is not None
    assert (default.abstain, default.abstain_guarantee) == (None, None)


def test_too_few_rows_are_counted() -> None:
    with pytest.raises(DataError, match=r"at least 10 in-scope rows in the (fit|select) part, got"):
        calibrated(answered(20))
    with pytest.raises(DataError, match="at least 999 in-scope rows in the certify part, got"):
        calibrated(answered(400), alphas=(0.001,))


def test_an_answer_that_is_no_number_is_named() -> None:
    rows = answered(400, 100)
    log_probs = rows.prediction.log_probs.clone()
    log_probs[0, 3] = math.nan
    mass = torch.full((500,), 0.5)
    mass[7] = math.nan
    for broken, name in (
        (Prediction(log_probs, None), "r3"),
        (Prediction(rows.prediction.log_probs, mass), "r7"),
    ):
        with pytest.raises(DataError, match=f"answer to row '{name}' is not a number"):
            calibrated(replace(rows, prediction=broken))


def test_a_combined_score_learns_nothing_from_rows_that_are_declared_away() -> None:
    rows = answered(800, 200)  # every in-scope answer is right
    with pytest.raises(DataError, match="at least 20 right and 20 wrong answers"):
        calibrated(rows, score="combined", out_of_scope_share=0.0)


def test_the_certify_part_decides_nothing_but_certificates() -> None:
    """Other labels there change neither temperature nor score nor combined score."""
    rows = answered(800, 200, wrong=0.2)
    first = calibrated(rows)
    certify = first.rows.part == 2
    labels = torch.where(certify & (rows.labels >= 0), (rows.labels + 1) % 3, rows.labels)
    changed = AnsweredRows(**{**vars(rows), "labels": labels})
    second = calibrated(changed)
    assert second.calibration.temperature == first.calibration.temperature
    assert second.calibration.combined == first.calibration.combined
    assert first.calibration.combined is not None
