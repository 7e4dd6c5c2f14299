"""The limit below which a policy abstains, with a bound on the in-scope questions it refuses."""

import numpy as np

from dalorra_core.artifact.calibration_record import Limit, ScoreName
from dalorra_core.calibration.bounds import clopper_pearson_upper
from dalorra_core.calibration.certificate import in_own_unit
from dalorra_core.calibration.scores import ScoreTable, surer

__all__ = ["certify_abstain"]

_GRID = 100
"""Thresholds tested, at equal steps up to twice the allowed share of the select part."""


def certify_abstain(
    select: ScoreTable, held: ScoreTable, score: ScoreName, max_in_scope_share: float, delta: float
) -> Limit | None:
    """Return the limit that refuses most, yet at most this share of in-scope questions.

    The loss falls as the threshold falls, so testing from the loosest threshold on is a fixed
    sequence. With confidence 1 - delta the share of in-scope questions refused is at most
    ``max_in_scope_share``.

    Args:
        select: Rows whose quantiles are the thresholds to test.
        held: Rows that decide.
        score: Score to put the threshold on.
        max_in_scope_share: Strictly between 0 and 1.
        delta: Chance that the statement is wrong.

    Returns:
        None when not even the loosest threshold passes: too few rows.
    """
    inside = surer(score, select.score(score))[~select.outside].numpy()
    held_inside = np.sort(surer(score, held.score(score))[~held.outside].numpy())
    steps = np.linspace(0.0, min(1.0, 2 * max_in_scope_share), _GRID)
    thresholds = np.unique(np.quantile(inside, steps))
    refused = np.searchsorted(held_inside, thresholds, side="left")
    passed = clopper_pearson_upper(refused, len(held_inside), delta) <= max_in_scope_share
    passed = np.logical_and.accumulate(passed)
    if not passed.any():
        return None
    return Limit(
        score=score, threshold=in_own_unit(score, thresholds[int(np.flatnonzero(passed)[-1])])
    )
