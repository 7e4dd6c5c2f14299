"""dalorra_core.objectives.schedules: BLoB's cycle."""

from fractions import Fraction

import pytest

from dalorra_core.errors import ConfigError
from dalorra_core.objectives.schedules import cycle_length, cyclic_weight


@pytest.mark.parametrize(
    ("num_examples", "cycle"),
    [(640, 316), (1119, 393), (2251, 517), (2558, 544), (4957, 706), (9427, 909)],
)
def test_the_published_cycles(num_examples: int, cycle: int) -> None:
    """methods.md 4.6: WG-S, ARC-C, ARC-E, WG-M, OBQA, BoolQ with batches of four."""
    assert cycle_length(num_examples, 4) == cycle


def test_a_cycle_has_at_least_one_step() -> None:
    assert cycle_length(3, 4) == 1
    assert cycle_length(10**6, 4, gamma=1000.0) >= 1


@pytest.mark.parametrize("cycle", [1, 2, 5, 60])
def test_weights_are_those_of_whole_numbers(cycle: int) -> None:
    exact = [Fraction(2**i, 2 ** (cycle + 1) - 1) for i in range(1, cycle + 1)]
    found = [cyclic_weight(step, cycle) for step in range(cycle)]
    assert found == pytest.approx([float(w) for w in exact], rel=1e-14)
    assert cyclic_weight(cycle, cycle) == found[0]  # and again
    assert sum(found) == pytest.approx(1 - 1 / (2 ** (cycle + 1) - 1), rel=1e-14)


@pytest.mark.parametrize("cycle", [909, 5000])
def test_long_cycles_stay_finite(cycle: int) -> None:
    found = [cyclic_weight(step, cycle) for step in range(cycle)]
    assert sum(found) == pytest.approx(1.0, rel=1e-12)
    assert found[-1] == pytest.approx(0.5)
    assert found[-1] == 2 * found[-2]


def test_impossible_settings_are_refused() -> None:
    with pytest.raises(ConfigError, match="cycle must be at least 1, got 0"):
        cyclic_weight(3, 0)
    with pytest.raises(ConfigError, match="gamma must be positive, got 0"):
        cycle_length(10, 2, gamma=0.0)
