"""dalorra_core.training.evaluation and decisions: the report of a labelled set, by hand."""

import json
import math

import pytest
import torch
from torch import Tensor

from dalorra_core.artifact.calibration_record import Limit, Policy, ScoreName
from dalorra_core.calibration.scores import score_table
from dalorra_core.errors import ConfigError
from dalorra_core.predictive.scoring import Prediction
from dalorra_core.training.decisions import decision_table
from dalorra_core.training.evaluation import evaluate, json_number
from tests.support.tiny_manifest import tiny_manifest

CHOSEN = tiny_manifest().policies[0].chosen_on


def log_probs_of(confidence: list[float]) -> Tensor:
    """One sample that predicts label 0 with the given confidences."""
    p = torch.tensor(confidence, dtype=torch.float64)
    return torch.stack([p, 1 - p], dim=-1).log().unsqueeze(0)


def policy_of(score: ScoreName, threshold: float, confidence: float = 0.8) -> Policy:
    return Policy(
        name="p",
        accept=Limit(score="confidence", threshold=confidence),
        abstain=Limit(score=score, threshold=threshold),
        target_selective_risk=0.02,
        chosen_on=CHOSEN,
    )


def table_of(prediction: Prediction, labels: Tensor, policy: Policy) -> dict[str, object]:
    return {**decision_table(score_table(prediction, labels), policy, ("a", "b"))}


# five rows: right, wrong, right, right, out of scope
CONFIDENCE = [0.95, 0.9, 0.85, 0.6, 0.55]
LABELS = torch.tensor([0, 1, 0, 0, -1])


@pytest.mark.parametrize(
    ("score", "threshold"),
    [
        ("predictive_entropy", -(0.6 * math.log(0.6) + 0.4 * math.log(0.4)) + 1e-3),
        ("confidence", 0.58),
        ("label_mass", 0.15),
    ],
)
def test_the_decision_table_by_hand(score: ScoreName, threshold: float) -> None:
    """Each score parts the last row from the others: accept three, review one, abstain one."""
    mass = torch.tensor([0.5, 0.4, 0.3, 0.2, 0.1])
    prediction = Prediction(log_probs_of(CONFIDENCE), mass)
    table = table_of(prediction, LABELS, policy_of(score, threshold))
    expected = {
        "accepted": 3 / 5,
        "reviewed": 1 / 5,
        "abstained": 1 / 5,
        "selective_risk_accepted": 1 / 3,
        "selective_risk_accepted_in_scope": 1 / 3,
        "in_scope_accepted": 3 / 4,
        "in_scope_abstained": 0.0,
        "out_of_scope_accepted": 0.0,
        "out_of_scope_abstained": 1.0,
        "in_scope_accuracy_after_abstaining": 3 / 4,
        "accuracy_answered_or_refused": 4 / 5,
    }
    assert table.pop("policy") == "p"
    assert (table.pop("target_risk"), table.pop("certified_out_of_scope_share")) == (None, None)
    assert table == {name: pytest.approx(value) for name, value in expected.items()}


def test_an_accepted_out_of_scope_row_is_wrong_and_a_refused_in_scope_row_too() -> None:
    prediction = Prediction(log_probs_of([0.95, 0.9]), None)
    table = table_of(prediction, torch.tensor([-1, 0]), policy_of("confidence", 0.92))
    assert table["selective_risk_accepted"] == 1.0
    assert table["selective_risk_accepted_in_scope"] is None
    assert table["out_of_scope_accepted"] == 1.0
    assert table["in_scope_abstained"] == 1.0
    assert table["accuracy_answered_or_refused"] == 0.0


def test_epistemic_abstention_needs_samples_that_disagree() -> None:
    samples = torch.cat([log_probs_of([0.9, 0.99]), log_probs_of([0.9, 0.01])])
    table = table_of(
        Prediction(samples, None), torch.tensor([0, -1]), policy_of("mutual_information", 0.1)
    )
    assert (table["out_of_scope_abstained"], table["in_scope_abstained"]) == (1.0, 0.0)


def test_a_truncated_question_is_never_accepted() -> None:
    table = score_table(Prediction(log_probs_of(CONFIDENCE), None), LABELS)
    policy = policy_of("confidence", 0.58)
    whole = decision_table(table, policy, ("a", "b"))
    cut = torch.tensor([True, False, False, False, True])
    found = decision_table(table, policy, ("a", "b"), truncated=cut)
    assert (whole["accepted"], found["accepted"]) == (0.6, 0.4)
    assert (whole["reviewed"], found["reviewed"]) == (0.2, 0.4)
    assert found["abstained"] == whole["abstained"] == 0.2


def test_a_policy_on_a_score_that_was_not_computed_is_refused() -> None:
    policy = policy_of("label_mass", 0.1)
    with pytest.raises(ConfigError, match="label_mass was not measured"):
        table_of(Prediction(log_probs_of([0.9]), None), torch.tensor([0]), policy)


def test_the_report_by_hand() -> None:
    report = evaluate(log_probs_of(CONFIDENCE), LABELS)
    values = {name: estimate.value for name, estimate in report.metrics.items()}
    assert (report.num_in_scope, report.num_out_of_scope) == (4, 1)
    assert values["accuracy"] == pytest.approx(3 / 4)
    nll = -(math.log(0.95) + math.log(0.1) + math.log(0.85) + math.log(0.6)) / 4
    assert values["nll"] == pytest.approx(nll)
    brier = (2 * 0.05**2 + 2 * 0.9**2 + 2 * 0.15**2 + 2 * 0.4**2) / 4
    assert values["brier"] == pytest.approx(brier)
    assert values["aurc"] == pytest.approx((0 + 1 / 2 + 1 / 3 + 1 / 4) / 4)
    # 0.95, 0.9 | 0.85 | 0.6 by fifteenths: [14/15, 1], [13/15, 14/15), [12/15, 13/15), [9/15, ...)
    assert values["ece"] == pytest.approx((0.05 + 0.9 + 0.15 + 0.4) / 4, abs=1e-6)
    assert values["auroc_oos_confidence"] == values["auroc_oos_predictive_entropy"] == 1.0
    assert values["auroc_error_confidence"] == pytest.approx(1 / 3)  # two right rows are less sure
    assert "auroc_oos_mutual_information" not in values  # one sample has no epistemic part
    assert all(e.low is None for e in report.metrics.values())


def test_more_samples_bring_the_epistemic_scores_and_a_seed_the_intervals() -> None:
    generator = torch.Generator().manual_seed(0)
    log_probs = torch.randn(3, 60, 4, generator=generator).log_softmax(-1)
    labels = torch.randint(-1, 4, (60,), generator=generator)
    report = evaluate(log_probs, labels, bootstrap_seed=1, num_resamples=50)
    again = evaluate(log_probs, labels, bootstrap_seed=1, num_resamples=50)
    assert report == again
    assert "auroc_oos_mutual_information" in report.metrics
    estimate = report.metrics["accuracy"]
    assert estimate.low is not None
    assert estimate.high is not None
    assert estimate.low < estimate.value < estimate.high
    for kind in ("error", "oos"):
        for score in ("confidence", "expected_entropy", "variation_ratio", "confidence_std"):
            estimate = report.metrics[f"auroc_{kind}_{score}"]
            assert estimate.low is not None
            assert estimate.high is not None
            assert estimate.low < estimate.value < estimate.high


def test_an_undefined_statistic_is_null_in_json() -> None:
    assert json_number(math.nan) is None
    assert json_number(0.25) == 0.25
    perfect = evaluate(log_probs_of([0.9, 0.8]), torch.tensor([0, 0]))
    assert math.isnan(perfect.metrics["auroc_error_confidence"].value)
    text = json.dumps(perfect.to_json(), allow_nan=False)
    assert json.loads(text)["metrics"]["auroc_error_confidence"]["value"] is None
