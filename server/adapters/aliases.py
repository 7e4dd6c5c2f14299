"""Names such as ``triage@prod`` that stand for adapters: canaries by weight, shadows by share.

Which target answers is decided by a hash of the request's id, so that a retry with the same id is
answered by the same adapter, on any replica, and no random state is kept.
"""

import hashlib
from dataclasses import dataclass

__all__ = ["Alias", "ShadowTarget", "Target"]


@dataclass(frozen=True, slots=True)
class Target:
    """An adapter that may answer: ``name`` or ``name:revision``, and its weight above 0."""

    model: str
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class ShadowTarget:
    """An adapter that answers a share of the requests, in (0, 1], unseen by their clients."""

    model: str
    share: float


@dataclass(frozen=True, slots=True)
class Alias:
    """A name that stands for one or more adapters.

    Attributes:
        name: ``name@alias``.
        targets: Who answers; at least one. Weights need not sum to 1.
        shadow: Who answers besides, for comparison; None for nobody.
    """

    name: str
    targets: tuple[Target, ...]
    shadow: ShadowTarget | None = None

    @property
    def models(self) -> tuple[str, ...]:
        """Every adapter it names, the shadow last."""
        shadow = (self.shadow.model,) if self.shadow else ()
        return (*(target.model for target in self.targets), *shadow)

    def pick(self, request_id: str) -> str:
        """Return the target that answers a request; each has its weight's share of all ids."""
        place = self._unit(request_id, "target") * sum(target.weight for target in self.targets)
        for target in self.targets:
            place -= target.weight
            if place < 0:
                return target.model
        return self.targets[-1].model  # rounding left nothing over

    def shadowed_by(self, request_id: str) -> str | None:
        """Return the shadow that answers a request besides; None for most."""
        if self.shadow is None or self._unit(request_id, "shadow") >= self.shadow.share:
            return None
        return self.shadow.model

    def _unit(self, request_id: str, purpose: str) -> float:
        """Return a number in [0, 1) that depends on nothing but its arguments and this name."""
        digest = hashlib.sha256(f"{purpose}|{self.name}|{request_id}".encode()).digest()
        return int.from_bytes(digest[:7], "big") / 2**56
