"""The reference side of the drift rules joins with the live side, label by label."""

from dataclasses import replace

import pytest

from dalorra_core.calibration import reference_profile
from server.ports import ScoreReference
from server.telemetry import DRIFT_EDGES, Telemetry
from tests.support.drift_cards import measured
from tests.support.fake_engine import TOPICS, TOPICS_POINT

CARD = measured()
SCORES = {
    "confidence": "confidence",
    "entropy": "predictive_entropy",
    "mutual_information": "mutual_information",
    "label_mass": "label_mass",
}


def labels_of(telemetry: Telemetry, name: str, label: str) -> list[str]:
    return [
        sample.labels[label]
        for family in telemetry.collect()
        for sample in family.samples
        if sample.name == f"dalorra_{name}"
    ]


def loaded(*cards: object) -> Telemetry:
    telemetry = Telemetry()
    telemetry.adapters_loaded(cards, 1.0)  # type: ignore[arg-type]
    return telemetry


def test_the_cores_edges_are_the_servers() -> None:
    assert DRIFT_EDGES == {
        "confidence": reference_profile.CONFIDENCE_EDGES,
        "predictive_entropy": reference_profile.ENTROPY_EDGES,
        "mutual_information": reference_profile.MUTUAL_INFORMATION_EDGES,
        "label_mass": reference_profile.LABEL_MASS_EDGES,
    }


@pytest.mark.parametrize(("metric", "score"), SCORES.items())
def test_every_le_of_a_histogram_has_its_reference(metric: str, score: str) -> None:
    telemetry = loaded(CARD)
    live = labels_of(telemetry, f"{metric}_ratio_bucket", "le")
    assert labels_of(telemetry, f"reference_{metric}_cdf_ratio", "le") == live
    assert live[-2:] == ["1.0", "+Inf"]
    own = {"adapter": CARD.name, "revision": CARD.revision}
    name = f"dalorra_reference_{metric}_cdf_ratio"
    found = [telemetry.registry.get_sample_value(name, {**own, "le": le}) for le in live]
    assert CARD.calibration is not None
    assert found == [*CARD.calibration.reference.scores[score].cdf, 1.0]


def test_every_bin_label_and_decision_has_its_reference() -> None:
    telemetry = loaded(CARD)
    for live, reference, label in (
        ("confidence_bin_total", "reference_confidence_bin_ratio", "bin"),
        ("predictions_total", "reference_label_ratio", "label"),
        ("predictions_total", "reference_decision_ratio", "decision"),
    ):
        found = labels_of(telemetry, reference, label)
        assert set(found) == set(labels_of(telemetry, live, label))
        assert len(found) == len(set(found))


def test_what_never_happened_at_calibration_has_a_share_of_zero() -> None:
    assert CARD.calibration is not None
    reference = replace(
        CARD.calibration.reference, labels={"billing": 1.0}, decisions={"accept": 1.0}
    )
    card = replace(CARD, calibration=replace(CARD.calibration, reference=reference))
    telemetry = loaded(card)
    own = {"adapter": CARD.name, "revision": CARD.revision}
    get = telemetry.registry.get_sample_value
    assert get("dalorra_reference_label_ratio", {**own, "label": "fraud"}) == 0
    assert get("dalorra_reference_decision_ratio", {**own, "decision": "abstain"}) == 0
    assert get("dalorra_reference_rows", own) == 3000


def test_an_uncalibrated_adapter_has_no_reference() -> None:
    telemetry = loaded(TOPICS, TOPICS_POINT)
    names = {sample.name for family in telemetry.collect() for sample in family.samples}
    assert not [name for name in names if "reference" in name or "confidence_bin" in name]
    assert "dalorra_confidence_ratio_bucket" in names


def test_a_reference_on_other_edges_is_not_compared(caplog: pytest.LogCaptureFixture) -> None:
    assert CARD.calibration is not None
    reference = CARD.calibration.reference
    scores = dict(reference.scores) | {"confidence": ScoreReference((0.5, 1.0), (0.1, 1.0))}
    other = replace(CARD.calibration, reference=replace(reference, scores=scores))
    telemetry = loaded(replace(CARD, calibration=other))
    assert labels_of(telemetry, "reference_confidence_cdf_ratio", "le") == []
    assert labels_of(telemetry, "reference_entropy_cdf_ratio", "le")
    assert labels_of(telemetry, "reference_confidence_bin_ratio", "bin") == ["0", "1", "2", "3"]
    assert "other edges" in caplog.text


def test_a_point_method_has_no_reference_of_its_own_mutual_information() -> None:
    telemetry = loaded(measured(TOPICS_POINT))
    assert labels_of(telemetry, "reference_mutual_information_cdf_ratio", "le") == []
    assert labels_of(telemetry, "reference_entropy_cdf_ratio", "le")
