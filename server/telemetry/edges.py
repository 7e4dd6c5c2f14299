"""Upper edges of every histogram. The drift edges are also those of the reference profiles.

A reference profile holds its distribution at these edges, so changing one of the four in
``DRIFT_EDGES`` makes stored profiles useless until their adapters are calibrated again.
"""

from collections.abc import Mapping

__all__ = [
    "BATCH_TOKENS",
    "DRIFT_EDGES",
    "INPUT_TOKENS",
    "LOAD_SECONDS",
    "PADDING",
    "ROWS",
    "SAMPLES",
    "SECONDS",
    "STAGE_SECONDS",
]

DRIFT_EDGES: Mapping[str, tuple[float, ...]] = {
    "confidence": (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 1),
    "predictive_entropy": (0.01, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1),
    "mutual_information": (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1),
    "label_mass": (0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 0.999, 1),
}
"""By the name of the score in ``ReferenceProfile.scores``; entropy and MI are divided by ln K."""

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
# 0.5 ms to 33 s: the queue alert compares with half of the default deadline, which is 15 s
STAGE_SECONDS = tuple(0.0005 * 2**power for power in range(17))
LOAD_SECONDS = (1, 2.5, 5, 10, 30, 60, 120, 300)
ROWS = tuple(2**power for power in range(9))
BATCH_TOKENS = tuple(2**power for power in range(6, 17))
PADDING = (0, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75)
SAMPLES = (1, 2, 4, 8, 16, 32, 64)
INPUT_TOKENS = tuple(2**power for power in range(3, 14))
