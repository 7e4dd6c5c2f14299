"""Metrics of the adapters: which are loaded, whether they are sound, what they aim at."""

import math
from collections.abc import Callable, Iterator

from server.ports import AdapterCard, Limit, SelfTest
from server.telemetry.edges import LOAD_SECONDS
from server.telemetry.families import AdapterKey, Children, Families

__all__ = ["AdapterMetrics"]

_IN_NATS = frozenset({"predictive_entropy", "mutual_information"})


class AdapterMetrics:
    """Residency, self test, and the lines that policies draw."""

    def __init__(self, families: Families) -> None:
        whose = ("adapter", "revision")
        self._info = families.gauge(
            "adapter_info",
            "Loaded adapters; always 1.",
            *whose,
            "base",
            "mask_set",
            "rank",
            "signed",
        )
        self._memory = families.gauge(
            "adapter_memory_bytes", "What an adapter takes in memory.", *whose
        )
        self._count = families.gauge(
            "adapters", "Known adapters, in memory and put out of it.", "state"
        )
        self._evictions = families.counter(
            "adapter_evictions", "Adapters put out of memory to make room."
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
        self._selftest_ok = families.gauge("selftest_ok", "1 when golden probes match.", *whose)
        self._selftest_error = families.gauge(
            "selftest_max_abs_error", "Largest golden probe difference.", *whose
        )
        self._load_seconds = families.histogram(
            "adapter_load_duration_seconds",
            "Time to load adapters: all at start, or one at run time.",
            LOAD_SECONDS,
        )
        self._load_failures = families.counter("adapter_load_failures", "Failed loads.")
        self._cards: dict[AdapterKey, AdapterCard] = {}
        self._children: dict[AdapterKey, Children] = {}
        self._by_name: dict[str, Children] = {}

    @property
    def shown(self) -> tuple[AdapterCard, ...]:
        """The adapters that have series now."""
        return tuple(self._cards.values())

    def shows(self, card: AdapterCard) -> bool:
        """Whether an adapter has series now."""
        return (card.name, card.revision) in self._cards

    def load_took(self, duration_s: float) -> None:
        """Note the time of a load."""
        self._load_seconds.observe(duration_s)

    def load_failed(self) -> None:
        """Count a load that failed."""
        self._load_failures.inc()

    def watch(self, resident: Callable[[], float], evicted: Callable[[], float]) -> None:
        """Read the numbers of adapters in and out of memory at every scrape."""
        self._count.labels("resident").set_function(resident)
        self._count.labels("evicted").set_function(evicted)

    def evicted(self) -> None:
        """Count an adapter that was put out of memory to make room."""
        self._evictions.inc()

    def load(self, card: AdapterCard) -> None:
        """Show a new adapter."""
        self.unload(card)
        self._cards[card.name, card.revision] = card
        children = self._children[card.name, card.revision] = Children()
        shared = self._by_name.setdefault(card.name, Children())
        whose = (card.name, card.revision)
        signed = "yes" if card.signed_by else "no"
        mask_set = card.mask_set or "none"
        children.make(self._info, *whose, card.base, mask_set, str(card.rank), signed).set(1)
        children.make(self._memory, *whose).set(card.memory_bytes)
        shared.make(self._loaded, card.name).set(1)
        if card.selftest_max_abs_error is not None:
            children.make(self._selftest_ok, *whose).set(1)
            children.make(self._selftest_error, *whose).set(card.selftest_max_abs_error)
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
        del self._cards[card.name, card.revision]
        if all(name != card.name for name, _ in self._children):
            self._by_name.pop(card.name).remove()

    def back(self, card: AdapterCard) -> bool:
        """Show that an adapter can answer again; False when it was not shown before."""
        if (card.name, card.revision) not in self._children:
            return False
        self._loaded.labels(card.name).set(1)
        return True

    def selftest(self, card: AdapterCard, result: SelfTest) -> None:
        """Show the latest self test; an adapter without golden probes has nothing to show."""
        whose = (card.name, card.revision)
        if whose in self._children and card.selftest_max_abs_error is not None:
            self._selftest_ok.labels(*whose).set(result.passed)
            self._selftest_error.labels(*whose).set(result.max_abs_error)

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
