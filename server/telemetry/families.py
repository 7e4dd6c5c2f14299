"""How metrics are made, and how the series of one adapter come and go together."""

from typing import TypeVar

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.registry import Collector

__all__ = ["AdapterKey", "Children", "Families"]

AdapterKey = tuple[str, str]
"""Name and revision of a loaded adapter."""

Metric = TypeVar("Metric", Counter, Gauge, Histogram)


class Families:
    """Makes metrics with the server's prefix in one registry."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry

    def counter(self, name: str, text: str, *labels: str) -> Counter:
        """Return a new counter; ``_total`` is added to its name when it is shown."""
        return Counter(f"dalorra_{name}", text, labels, registry=self._registry)

    def gauge(self, name: str, text: str, *labels: str) -> Gauge:
        """Return a new gauge."""
        return Gauge(f"dalorra_{name}", text, labels, registry=self._registry)

    def histogram(self, name: str, text: str, edges: tuple[float, ...], *labels: str) -> Histogram:
        """Return a new histogram; the edge +Inf is added by itself."""
        return Histogram(f"dalorra_{name}", text, labels, buckets=edges, registry=self._registry)

    def register(self, collector: Collector) -> None:
        """Add a collector that makes its samples when it is read."""
        self._registry.register(collector)


class Children:
    """The labelled children that one adapter owns.

    They are created when it is loaded, so that every series starts from zero and ``increase`` sees
    its first event, and removed when it is unloaded.
    """

    def __init__(self) -> None:
        self._owned: dict[tuple[Counter | Gauge | Histogram, tuple[str, ...]], None] = {}

    def make(self, metric: Metric, *values: str) -> Metric:
        """Create and return a child, and remember it."""
        self._owned[metric, values] = None  # a set in order: asking twice owns it once
        return metric.labels(*values)

    def remove(self) -> None:
        """Take every child out of its metric: its series vanish."""
        for metric, values in self._owned:
            metric.remove(*values)
        self._owned.clear()
