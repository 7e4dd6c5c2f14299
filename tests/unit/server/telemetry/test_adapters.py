"""What is shown of an adapter: its thresholds in the units of the histograms, its self test."""

import math
from dataclasses import replace

import pytest

from server.ports import Limit
from server.telemetry import Telemetry
from tests.support.fake_engine import POLICY, TOPICS, TOPICS_POINT

OWN = {"adapter": TOPICS.name, "revision": TOPICS.revision}


def test_thresholds_are_lines_in_the_histograms_of_their_scores() -> None:
    policy = replace(
        POLICY,
        name="both",
        accept=(Limit("confidence", 0.8), Limit("mutual_information", 0.1)),
        abstain=(Limit("predictive_entropy", 0.9), Limit("label_mass", 0.3)),
    )
    telemetry = Telemetry()
    telemetry.adapters_loaded((replace(TOPICS, policies=(policy,)),), 1.0)
    found = {
        sample.labels["signal"]: sample.value
        for family in telemetry.collect()
        for sample in family.samples
        if sample.name == "dalorra_policy_threshold"
    }
    assert found == {
        "accept_confidence": 0.8,
        "accept_mutual_information": pytest.approx(0.1 / math.log(3)),
        "abstain_predictive_entropy": pytest.approx(0.9 / math.log(3)),
        "abstain_label_mass": 0.3,
    }


def test_a_policy_that_never_accepts_has_no_accept_line() -> None:
    telemetry = Telemetry()
    never = replace(POLICY, accept=None, abstain=(), target_selective_risk=None)
    telemetry.adapters_loaded((replace(TOPICS, policies=(never,)),), 1.0)
    names = {sample.name for family in telemetry.collect() for sample in family.samples}
    assert "dalorra_policy_threshold" not in names
    assert "dalorra_policy_target_risk_ratio" not in names


def test_an_adapter_without_probes_claims_no_self_test() -> None:
    telemetry = Telemetry()
    telemetry.adapters_loaded((replace(TOPICS, selftest_max_abs_error=None),), 1.0)
    get = telemetry.registry.get_sample_value
    assert get("dalorra_adapter_loaded", {"adapter": "topics"}) == 1
    assert get("dalorra_selftest_ok", {"adapter": "topics"}) is None


def test_a_lost_engine_is_shown() -> None:
    telemetry = Telemetry()
    telemetry.adapters_loaded((TOPICS,), 2.0)
    telemetry.engine_lost((TOPICS,))
    get = telemetry.registry.get_sample_value
    assert get("dalorra_adapter_loaded", {"adapter": "topics"}) == 0
    assert get("dalorra_adapter_load_duration_seconds_sum", {}) == 2.0


def test_a_comparison_with_an_adapter_that_is_gone_leaves_no_series() -> None:
    telemetry = Telemetry()
    telemetry.adapters_loaded((TOPICS, TOPICS_POINT), 1.0)
    telemetry.adapters_unloaded((TOPICS_POINT,))
    telemetry.shadow_compared(TOPICS, TOPICS_POINT, same_label=True, same_decision=True)
    telemetry.shadow_compared(TOPICS_POINT, TOPICS, same_label=True, same_decision=True)
    (family,) = [f for f in telemetry.collect() if f.name == "dalorra_shadow_comparisons"]
    assert family.samples == []
