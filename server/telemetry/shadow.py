"""Metrics of shadows: adapters that answer besides, so that they can be compared."""

from server.ports import AdapterCard
from server.telemetry.families import AdapterKey, Children, Families

__all__ = ["SHADOW_DROPS", "ShadowMetrics"]

SHADOW_DROPS = ("busy", "failed")
ASPECTS = ("label", "decision")


class ShadowMetrics:
    """How often a candidate was compared with the adapter that answered, and disagreed."""

    def __init__(self, families: Families) -> None:
        whose = ("adapter", "revision", "candidate")
        self._comparisons = families.counter(
            "shadow_comparisons", "Rows that a shadow answered too.", *whose
        )
        self._disagreements = families.counter(
            "shadow_disagreements",
            "Rows where a shadow gave another label or decision.",
            *whose,
            "aspect",
        )
        dropped = families.counter(
            "shadow_dropped", "Requests that a shadow could not answer.", "reason"
        )
        self._dropped = {reason: dropped.labels(reason) for reason in SHADOW_DROPS}
        self._children: dict[tuple[AdapterKey, str], Children] = {}

    def compared(
        self, card: AdapterCard, candidate: AdapterCard, *, same_label: bool, same_decision: bool
    ) -> None:
        """Count one row that both answered."""
        whose = (card.name, card.revision, f"{candidate.name}:{candidate.revision}")
        children = self._children.setdefault((whose[:2], whose[2]), Children())
        children.make(self._comparisons, *whose).inc()
        for aspect, same in zip(ASPECTS, (same_label, same_decision), strict=True):
            children.make(self._disagreements, *whose, aspect).inc(0 if same else 1)

    def dropped(self, reason: str) -> None:
        """Count a request that was not compared; ``reason`` is one of ``SHADOW_DROPS``."""
        self._dropped[reason].inc()

    def unload(self, card: AdapterCard) -> None:
        """Remove the series of an adapter, on either side."""
        key, candidate = (card.name, card.revision), f"{card.name}:{card.revision}"
        for pair in [pair for pair in self._children if pair[0] == key or pair[1] == candidate]:
            self._children.pop(pair).remove()
