"""dalorra_core.artifact.manifest: label sets, and predictives that a plan chose."""

from typing import Literal

import pytest
from pydantic import ValidationError

from dalorra_core.artifact.calibration_record import PlanCandidate, PlanEvidence
from dalorra_core.artifact.manifest import LabelsRef, with_plan
from dalorra_core.config import Design, Estimator, PredictiveConfig
from tests.support.tiny_manifest import tiny_manifest


def test_an_older_label_set_scores_a_question_over_its_own_choices() -> None:
    assert LabelsRef.model_validate({"labels": ["A", "B"], "token_ids": [1, 2]}).union == ()


def test_a_union_holds_labels_of_the_adapter_only() -> None:
    values = {"labels": ["A", "B", "E"], "token_ids": [1, 2, 3]}
    assert LabelsRef.model_validate({**values, "union": ["A", "B"]}).union == ("A", "B")
    with pytest.raises(ValidationError, match=r"labels of the adapter only, got \['C', 'D'\]"):
        LabelsRef.model_validate({**values, "union": ["A", "D", "C"]})


def plan_of(
    design: Design,
    num_samples: int,
    estimator: Literal["monte_carlo", "linearised"] = "monte_carlo",
) -> PlanEvidence:
    return PlanEvidence(
        date="2026-01-01T00:00:00+00:00",
        dalorra="0",
        estimator=estimator,
        design=design,
        num_samples=num_samples,
        digest="",
        n=8,
        n_out_of_scope=0,
        reference=64,
        packs=8,
        level=0.95,
        peer_num_samples=10,
        reference_auroc=None,
        dtype="float32",
        candidates=(
            candidate("monte_carlo", "iid", 10),
            candidate("mean_mask", "iid", 1),
            candidate(estimator, design, num_samples),
        ),
    )


def candidate(estimator: Estimator, design: Design, num_samples: int) -> PlanCandidate:
    return PlanCandidate(
        estimator=estimator,
        design=design,
        num_samples=num_samples,
        mean_error=1 / num_samples,
        mean_error_se=0.0,
    )


def test_evidence_knows_what_was_chosen_and_what_it_is_as_good_as() -> None:
    found = plan_of("stratified", 4)
    assert found.chosen == candidate("monte_carlo", "stratified", 4)
    assert found.peer == candidate("monte_carlo", "iid", 10)
    assert plan_of("iid", 256, "linearised").chosen.estimator == "linearised"


def test_probes_stay_those_of_the_predictive_they_were_stored_under() -> None:
    manifest = tiny_manifest(predictive=PredictiveConfig(num_samples=3, seed=5))
    planned = with_plan(manifest, plan_of("stratified", 4))
    assert planned.predictive == PredictiveConfig(num_samples=4, seed=5, design="stratified")
    assert planned.golden_predictive == manifest.predictive
    twice = with_plan(planned, plan_of("iid", 10))
    assert twice.golden_predictive == manifest.predictive
    assert with_plan(twice, plan_of("iid", 3)) == manifest
    draws = with_plan(planned, plan_of("iid", 256, "linearised"))
    assert draws.predictive == planned.predictive.model_copy(update={"estimator": "linearised"})
    assert draws.golden_predictive == manifest.predictive
    assert with_plan(draws, plan_of("stratified", 4)) == planned
