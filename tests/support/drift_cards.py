"""Adapter cards whose reference profile has the server's own edges, so that drift is measured."""

from dataclasses import replace

from server.ports import AdapterCard, ScoreReference
from server.telemetry import DRIFT_EDGES
from tests.support.fake_engine import CALIBRATION, TOPICS_CERTIFIED

__all__ = ["measured"]


def measured(card: AdapterCard = TOPICS_CERTIFIED) -> AdapterCard:
    """Return a card with a reference: scores spread evenly over the histograms' buckets."""
    scores = {
        name: ScoreReference(edges, tuple((i + 1) / len(edges) for i in range(len(edges))))
        for name, edges in DRIFT_EDGES.items()
        if name != "mutual_information" or not card.point_method
    }
    reference = replace(CALIBRATION.reference, scores=scores)
    return replace(card, calibration=replace(CALIBRATION, reference=reference))
