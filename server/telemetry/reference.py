"""What drift is measured against: the distributions stored at calibration, as series.

Recording rules compare them with the live histograms inside Prometheus, so the result is right over
replicas and restarts, which no detector in a process could be.
"""

import logging
from collections.abc import Iterator, Mapping

from prometheus_client.metrics_core import GaugeMetricFamily, Metric, UntypedMetricFamily
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from server.decision import DECISIONS
from server.ports import AdapterCard, ReferenceProfile
from server.telemetry.edges import DRIFT_EDGES
from server.telemetry.families import AdapterKey

__all__ = ["ReferenceCollector"]

logger = logging.getLogger(__name__)

_CDF = {
    "confidence": ("confidence", "confidence"),
    "predictive_entropy": ("entropy", "predictive entropy / ln K"),
    "mutual_information": ("mutual_information", "mutual information / ln K"),
    "label_mass": ("label_mass", "label mass"),
}
_WHOSE = ("adapter", "revision")


class ReferenceCollector(Collector):
    """Shows the reference profile of every loaded adapter that has one."""

    def __init__(self) -> None:
        self._profiles: dict[AdapterKey, ReferenceProfile] = {}
        self._labels: dict[AdapterKey, tuple[str, ...]] = {}

    def load(self, card: AdapterCard, *, own_labels: bool) -> None:
        """Show an adapter's profile; ``own_labels`` says that its labels have series too."""
        self.unload(card)
        if card.calibration is None:
            return
        key = (card.name, card.revision)
        self._profiles[key] = card.calibration.reference
        self._labels[key] = card.labels if own_labels else ()
        for name in card.calibration.reference.scores:
            if not _comparable(name, card.calibration.reference):
                logger.warning(
                    "reference profile has other edges than the histogram: no drift is measured; "
                    "calibrate the adapter again",
                    extra={"adapter": card.name, "score": name},
                )

    def unload(self, card: AdapterCard) -> None:
        """Show it no longer."""
        self._profiles.pop((card.name, card.revision), None)
        self._labels.pop((card.name, card.revision), None)

    def describe(self) -> Iterator[Metric]:
        """Yield the families without samples."""
        return self._families({})

    def collect(self) -> Iterator[Metric]:
        """Yield one family per kind of reference."""
        return self._families(dict(self._profiles))

    def _families(self, profiles: dict[AdapterKey, ReferenceProfile]) -> Iterator[Metric]:
        for score in _CDF:
            yield _cdf_family(score, profiles)
        yield _shares(
            "confidence_bin",
            "bin",
            "Share of calibration rows per confidence bin.",
            {
                key: {str(bin_): share for bin_, share in enumerate(profile.confidence_bin_shares)}
                for key, profile in profiles.items()
            },
        )
        # every label and decision has a share, if only 0: a join drops what one side lacks
        labelled = {
            key: {label: profile.labels.get(label, 0.0) for label in self._labels[key]}
            for key, profile in profiles.items()
        }
        yield _shares("label", "label", "Share of calibration rows per predicted label.", labelled)
        decisions = {
            key: {decision: profile.decisions.get(decision, 0.0) for decision in DECISIONS}
            for key, profile in profiles.items()
            if profile.decisions
        }
        text = "Share of calibration rows per decision under the first policy."
        yield _shares("decision", "decision", text, decisions)
        rows = GaugeMetricFamily(
            "dalorra_reference_rows", "Calibration rows behind the reference.", labels=_WHOSE
        )
        for key, profile in profiles.items():
            rows.add_metric(key, profile.n)
        yield rows


def _cdf_family(score: str, profiles: dict[AdapterKey, ReferenceProfile]) -> Metric:
    metric, text = _CDF[score]
    # untyped, not a gauge: `le` is what the joins need, and it is forbidden on a gauge
    family = UntypedMetricFamily(
        f"dalorra_reference_{metric}_cdf_ratio",
        f"Share of calibration rows with a {text} of at most `le`.",
        labels=(*_WHOSE, "le"),
    )
    for key, profile in profiles.items():
        if score not in profile.scores or not _comparable(score, profile):
            continue
        for edge, share in zip(DRIFT_EDGES[score], profile.scores[score].cdf, strict=True):
            family.add_metric((*key, floatToGoString(edge)), share)
        family.add_metric((*key, "+Inf"), 1.0)
    return family


def _comparable(score: str, profile: ReferenceProfile) -> bool:
    """Return whether a stored distribution has the edges of the live histogram."""
    return score in DRIFT_EDGES and profile.scores[score].edges == DRIFT_EDGES[score]


def _shares(
    name: str, label: str, text: str, values: Mapping[AdapterKey, Mapping[str, float]]
) -> Metric:
    family = GaugeMetricFamily(f"dalorra_reference_{name}_ratio", text, labels=(*_WHOSE, label))
    for key, shares in values.items():
        for value, share in shares.items():
            family.add_metric((*key, value), share)
    return family
