"""What a row counts into, and that it counts into nothing when its adapter has gone."""

import math
from dataclasses import replace

import pytest

from server.decision import Verdict
from server.ports import AdapterCard, EncodedRow, RowScores
from server.telemetry import Telemetry
from server.telemetry.predictions import ALL_LABELS, MAX_LABELS
from tests.support.drift_cards import measured
from tests.support.fake_engine import TOPICS_POINT, score

CARD = measured()
OWN = {"adapter": CARD.name, "revision": CARD.revision}
ROW = EncodedRow(5, False, None)
ACCEPT = Verdict("accept", ())


def loaded(*cards: AdapterCard) -> Telemetry:
    telemetry = Telemetry()
    telemetry.adapters_loaded(cards or (CARD,), 1.0)
    return telemetry


def value(telemetry: Telemetry, name: str, **labels: str) -> float | None:
    return telemetry.registry.get_sample_value(f"dalorra_{name}", labels)


def series(telemetry: Telemetry) -> set[tuple[str, tuple[tuple[str, str], ...]]]:
    return {
        (sample.name, tuple(sorted(sample.labels.items())))
        for family in telemetry.collect()
        for sample in family.samples
    }


def scores(confidence: float = 0.7, **changes: object) -> RowScores:
    made = score("x", CARD.labels, CARD.defaults, CARD)
    return replace(made, confidence=confidence, **changes)


def test_a_row_counts_its_label_decision_and_reasons() -> None:
    telemetry = loaded()
    row = scores()
    verdict = Verdict("review", ("low_confidence", "truncated"))
    telemetry.prediction(CARD, ROW, row, verdict)
    for label in CARD.labels:
        for decision in ("accept", "review", "abstain"):
            found = value(telemetry, "predictions_total", **OWN, label=label, decision=decision)
            assert found == (label == row.label and decision == "review")
    assert value(telemetry, "decision_reasons_total", **OWN, reason="truncated") == 1
    assert value(telemetry, "decision_reasons_total", **OWN, reason="high_entropy") == 0
    assert value(telemetry, "posterior_samples_sum", adapter=CARD.name) == 4
    assert value(telemetry, "input_tokens_sum", adapter=CARD.name) == 5


@pytest.mark.parametrize(
    ("confidence", "expected"), [(0.0, 0), (0.59, 0), (0.6, 1), (0.8, 2), (0.949, 2), (1.0, 3)]
)
def test_a_confidence_falls_into_the_bin_of_the_edges_at_or_below_it(
    confidence: float, expected: int
) -> None:
    telemetry = loaded()
    telemetry.drift(CARD, scores(confidence))
    found = [value(telemetry, "confidence_bin_total", **OWN, bin=str(i)) for i in range(4)]
    assert found == [float(i == expected) for i in range(4)]
    assert value(telemetry, "confidence_bin_total", **OWN, bin="4") is None


def test_entropies_are_divided_by_the_logarithm_of_the_rows_own_choices() -> None:
    telemetry = loaded()
    nats = 0.5 * math.log(2)  # half of the most that two choices allow
    telemetry.drift(
        CARD,
        scores(predictive_entropy=nats, normalized_entropy=0.5, mutual_information=0.2 * nats),
    )
    assert value(telemetry, "entropy_ratio_sum", **OWN) == pytest.approx(0.5)
    assert value(telemetry, "mutual_information_ratio_sum", **OWN) == pytest.approx(0.1)
    telemetry.drift(
        CARD, scores(predictive_entropy=0.0, normalized_entropy=0.0, mutual_information=0.0)
    )
    assert value(telemetry, "mutual_information_ratio_count", **OWN) == 2
    assert value(telemetry, "mutual_information_ratio_sum", **OWN) == pytest.approx(0.1)


def test_a_point_method_has_no_mutual_information_series() -> None:
    telemetry = loaded(TOPICS_POINT)
    telemetry.drift(TOPICS_POINT, scores(mutual_information=None, label_mass=None))
    own = {"adapter": TOPICS_POINT.name, "revision": TOPICS_POINT.revision}
    assert value(telemetry, "confidence_ratio_count", **own) == 1
    assert value(telemetry, "label_mass_ratio_count", **own) == 0
    assert value(telemetry, "mutual_information_ratio_count", **own) is None
    assert value(telemetry, "confidence_bin_total", **own, bin="0") is None


def test_every_series_is_there_at_load_and_gone_after_unload() -> None:
    telemetry = Telemetry()
    before = series(telemetry)
    telemetry.adapters_loaded((CARD,), 1.0)
    at_load = series(telemetry)
    for text in ("sure", "lost", "x"):
        row = score(text, CARD.labels, CARD.defaults, CARD)
        telemetry.prediction(CARD, ROW, row, Verdict("abstain", ("high_epistemic",)))
        telemetry.drift(CARD, row)
    own = {"adapter": CARD.name, "revision": CARD.revision}
    telemetry.feedback(**own, decision="accept", confidence=1.0, correct=True)
    assert series(telemetry) == at_load
    telemetry.adapters_unloaded((CARD,))
    assert series(telemetry) == before
    telemetry.prediction(CARD, ROW, scores(), ACCEPT)  # was in the queue when it went
    telemetry.drift(CARD, scores())
    telemetry.feedback(**own, decision="accept", confidence=0.5, correct=False)
    telemetry.engine_lost((CARD,))
    assert series(telemetry) == before


def test_a_new_revision_keeps_what_belongs_to_the_name() -> None:
    telemetry = loaded()
    new = replace(CARD, revision="ffff00112233")
    telemetry.adapters_loaded((new,), 1.0)
    telemetry.adapters_unloaded((CARD,))
    telemetry.prediction(new, ROW, scores(), ACCEPT)
    assert value(telemetry, "adapter_loaded", adapter=CARD.name) == 1
    assert value(telemetry, "input_tokens_count", adapter=CARD.name) == 1
    revisions = {
        dict(labels)["revision"] for _, labels in series(telemetry) if "revision" in dict(labels)
    }
    assert revisions == {new.revision}


def test_loading_again_begins_from_zero() -> None:
    telemetry = loaded()
    telemetry.drift(CARD, scores())
    telemetry.adapters_loaded((CARD,), 1.0)
    assert value(telemetry, "confidence_ratio_count", **OWN) == 0
    assert value(telemetry, "adapter_loaded", adapter=CARD.name) == 1


def test_labels_above_the_cap_share_one_series(caplog: pytest.LogCaptureFixture) -> None:
    large = replace(
        CARD,
        name="large",
        labels=tuple(f"label {i}" for i in range(MAX_LABELS - len(CARD.labels) + 1)),
    )
    telemetry = loaded(CARD, large)
    assert "too many labels" in caplog.text
    row = score("x", large.labels, large.defaults, large)
    telemetry.prediction(large, ROW, row, ACCEPT)
    own = {"adapter": "large", "revision": large.revision}
    labels = {
        dict(found)["label"]
        for name, found in series(telemetry)
        if name == "dalorra_predictions_total" and dict(found)["adapter"] == "large"
    }
    assert labels == {ALL_LABELS}
    assert value(telemetry, "predictions_total", **own, label=ALL_LABELS, decision="accept") == 1
    assert value(telemetry, "reference_label_ratio", **own, label="label 0") is None
    assert value(telemetry, "reference_label_ratio", **OWN, label="billing") == 0.5
    telemetry.adapters_unloaded((large, CARD))
    assert all(name.startswith("dalorra_") for name, _ in series(telemetry))
