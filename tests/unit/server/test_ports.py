"""The server's plain values say the same as the core's: neither imports the other."""

from typing import get_args

from dalorra_core.artifact import calibration_record
from dalorra_core.sampling.designs import DESIGNS
from server import ports


def test_scores_and_their_directions_are_the_cores() -> None:
    assert get_args(ports.ScoreName) == get_args(calibration_record.ScoreName)
    assert dict(ports.HIGHER_IS_SURER) == calibration_record.HIGHER_IS_SURER
    assert set(ports.HIGHER_IS_SURER) == set(get_args(ports.ScoreName))


def test_designs_are_the_cores() -> None:
    assert get_args(ports.Design) == DESIGNS
