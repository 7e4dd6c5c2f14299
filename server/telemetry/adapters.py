"""Metrics of the adapters: which are loaded, whether they are sound, what they aim at."""

import math
from collections.abc import Iterator

from server.ports import AdapterCard, Limit
from server.telemetry.edges import LOAD_SECONDS
from server.telemetry.families import AdapterKey, Children, Families

__all__ = ["AdapterMetrics"]

_IN_NATS = frozenset({"predictive_entropy", "mutual_information"})


class AdapterMetrics:
    """Residency, self test, and the lines that policies draw."""

    def __init__(self, families: Families) -> None:
        whose = ("adapter", "revision")
        self._info = families.gauge(
            "adapter_info", "Loaded adapters; always 1.", *whose, "base", "mask_set"
        )
        self._loaded = families.gauge("adapter_loaded", "1 while it can answer.", "adapter")
        self._threshold = families.gauge(
            "policy_threshold",
            "Thresholds of a policy, in the unit of the score's histogram.",
            *whose,
            "policy",
            "signal",
        )
        self._target = families.gauge(
            "policy_target_risk_ratio", "Selective risk a policy aims at.", *whose, "policy"
        )
        self._selftest_ok = families.gauge("selftest_ok", "1 when golden probes match.", "adapter")
        self._selftest_error = families.gauge(
            "selftest_max_abs_error", "Largest golden probe difference.", "adapter"
        )
        self._load_seconds = families.histogram(
            "adapter_load_duration_seconds", "Time to load all adapters at start.", LOAD_SECONDS
        )
        self._load_failures = families.counter("adapter_load_failures", "Failed loads.")
        self._children: dict[AdapterKey, Children] = {}
        self._by_name: dict[str, Children] = {}

    def load_took(self, duration_s: float) -> None:
        """Note the time of a load."""
        self._load_seconds.observe(duration_s)

    def load_failed(self) -> None:
        """Count a load that failed."""
        self._load_failures.inc()

    def load(self, card: AdapterCard) -> None:
        """Show a new adapter."""
        self.unload(card)
        children = self._children[card.name, card.revision] = Children()
        shared = self._by_name.setdefault(card.name, Children())
        whose = (card.name, card.revision)
        children.make(self._info, *whose, card.base, card.mask_set or "none").set(1)
        shared.make(self._loaded, card.name).set(1)
        if card.selftest_max_abs_error is not None:
            shared.make(self._selftest_ok, card.name).set(1)
            shared.make(self._selftest_error, card.name).set(card.selftest_max_abs_error)
        for policy in card.policies:
            for prefix, limits in (("accept", policy.accept or ()), ("abstain", policy.abstain)):
                for signal, value in _lines(card, prefix, limits):
                    children.make(self._threshold, *whose, policy.name, signal).set(value)
            if policy.target_selective_risk is not None:
                target = children.make(self._target, *whose, policy.name)
                target.set(policy.target_selective_risk)

    def unload(self, card: AdapterCard) -> None:
        """Remove the series of an adapter; those without a revision go with its last one."""
        children = self._children.pop((card.name, card.revision), None)
        if children is None:
            return
        children.remove()
        if all(name != card.name for name, _ in self._children):
            self._by_name.pop(card.name).remove()

    def lost(self, card: AdapterCard) -> None:
        """Show that an adapter can no longer answer."""
        if card.name in self._by_name:
            self._loaded.labels(card.name).set(0)


def _lines(
    card: AdapterCard, prefix: str, limits: tuple[Limit, ...]
) -> Iterator[tuple[str, float]]:
    """Yield the signal and the threshold of every limit, in the unit of its histogram."""
    for limit in limits:
        unit = math.log(len(card.labels)) if limit.score in _IN_NATS else 1.0
        yield f"{prefix}_{limit.score}", limit.threshold / unit
