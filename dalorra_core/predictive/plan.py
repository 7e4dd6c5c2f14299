"""Which predictive is asked for, and the sample packs that answer for it."""

import threading
from collections.abc import Callable
from dataclasses import dataclass

from dalorra_core.adapters.pack import SamplePack
from dalorra_core.config import Design, Estimator, PredictiveConfig
from dalorra_core.errors import ConfigError

__all__ = [
    "BYTES_KEPT",
    "LINEARISED_DRAWS",
    "MOST_PACK_BYTES",
    "PACKS_KEPT",
    "SAMPLES_KEPT",
    "KeptPacks",
    "SamplingPlan",
    "plan_of",
    "sampled_plan_of",
]

PACKS_KEPT = 8
"""Recent sample packs that an adapter keeps; the last one always, whatever its size."""

SAMPLES_KEPT = 512
"""Samples that several of them may have together."""

BYTES_KEPT = 2**28
"""Memory that the own tensors of several of them may take together, in bytes.

Gates take next to nothing; dense noise is as large as the factors, once for each sample.
"""

MOST_PACK_BYTES = 2**31
"""Memory that the own tensors of one pack may take; a plan that asks for more is refused."""


LINEARISED_DRAWS = 256
"""Draws of a linearised network: they cost no pass, and what is random in their mean is small
beside what ten samples of the network leave."""


@dataclass(frozen=True)
class SamplingPlan:
    """Which predictive is asked for.

    Attributes:
        num_samples: M, at least 1; ignored by ``mean_mask`` and ``linearised``, by point methods
            and where the number of functions is fixed, as an ensemble's.
        seed: Picks the sample set; without effect in the same cases.
        estimator: ``monte_carlo`` averages the probabilities of M samples; ``mean_mask`` is the one
            deterministic pass at the posterior mean, which has no epistemic part; ``linearised``
            averages ``LINEARISED_DRAWS`` draws of the network linearised in its gates.
        design: How the samples are drawn together; no choice where there is nothing to draw.
    """

    num_samples: int = 10
    seed: int = 0
    estimator: Estimator = "monte_carlo"
    design: Design = "iid"

    def __post_init__(self) -> None:
        """Refuse an empty mixture."""
        if self.num_samples < 1:
            raise ConfigError(f"num_samples must be at least 1, got {self.num_samples}")


def plan_of(stored: PredictiveConfig) -> SamplingPlan:
    """Return the default predictive of an artifact."""
    if stored.estimator == "linearised":
        return SamplingPlan(LINEARISED_DRAWS, stored.seed, "linearised")
    return sampled_plan_of(stored)


def sampled_plan_of(stored: PredictiveConfig) -> SamplingPlan:
    """Return what an artifact has for who asks for samples, whatever its default is."""
    return SamplingPlan(stored.num_samples, stored.seed, "monte_carlo", stored.design)


class KeptPacks:
    """The sample packs that one adapter used last; any thread may ask.

    The last one is always kept, so that the batches of one plan draw it once. Older ones go, those
    used longest ago first, where there are more than the limits above allow.

    Args:
        draw: Draws the pack of a plan.
        size: Memory of a pack's own tensors, in bytes.
    """

    def __init__(
        self,
        draw: Callable[[SamplingPlan], SamplePack],
        size: Callable[[SamplePack], int] = lambda _: 0,
    ) -> None:
        self._draw, self._size = draw, size
        self._packs: dict[SamplingPlan, SamplePack] = {}
        self._lock = threading.Lock()

    def of(self, plan: SamplingPlan) -> SamplePack:
        """Return the pack of a plan."""
        with self._lock:
            found = self._packs.pop(plan, None)
            pack = self._draw(plan) if found is None else found
            self._packs[plan] = pack  # the last one is the one that was used last
            while len(self._packs) > 1 and self._too_many():
                self._packs.pop(next(iter(self._packs)))
            return pack

    def _too_many(self) -> bool:
        packs = self._packs.values()
        return (
            len(packs) > PACKS_KEPT
            or sum(pack.num_samples for pack in packs) > SAMPLES_KEPT
            or sum(self._size(pack) for pack in packs) > BYTES_KEPT
        )
