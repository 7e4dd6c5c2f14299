"""dalorra_core.calibration.reference_profile: the server's edges, and counts by hand."""

import math

import pytest
import torch

from dalorra_core.calibration import reference_profile as module
from dalorra_core.calibration.decisions import Decisions
from dalorra_core.calibration.reference_profile import confidence_bins, reference_profile
from dalorra_core.calibration.scores import ScoreTable
from server.telemetry.edges import DRIFT_EDGES

LN2 = math.log(2)


def test_the_edges_are_the_servers() -> None:
    ours = {
        "confidence": module.CONFIDENCE_EDGES,
        "predictive_entropy": module.ENTROPY_EDGES,
        "mutual_information": module.MUTUAL_INFORMATION_EDGES,
        "label_mass": module.LABEL_MASS_EDGES,
    }
    assert ours == dict(DRIFT_EDGES)


def table() -> ScoreTable:
    return ScoreTable(
        labels=torch.tensor([0, 1, 0, -1]),
        predicted=torch.tensor([0, 0, 0, 1]),
        scores={
            "confidence": torch.tensor([1.0, 0.95, 0.9, 0.55], dtype=torch.float64),
            "predictive_entropy": torch.tensor([0.0, 0.2, 0.3, 0.68], dtype=torch.float64),
        },
    )


def test_shares_by_hand() -> None:
    flags = torch.tensor([True, True, False, False])
    decisions = Decisions(accept=flags, abstain=torch.tensor([False, False, False, True]))
    found = reference_profile(table(), decisions, ("a", "b", "c"), torch.full((4,), 2))
    assert (found.n, found.n_out_of_scope) == (4, 1)
    assert found.labels == {"a": 0.75, "b": 0.25, "c": 0.0}
    assert found.decisions == {"accept": 0.5, "review": 0.25, "abstain": 0.25}
    confidence = found.scores["confidence"]
    shares = dict(zip(confidence.edges, confidence.cdf, strict=True))
    assert shares[0.5] == 0.0
    assert (shares[0.6], shares[0.9], shares[0.95], shares[0.99]) == (0.25, 0.5, 0.75, 0.75)
    assert shares[1.0] == 1.0
    assert confidence.deciles[4] == pytest.approx(0.925)
    entropy = found.scores["predictive_entropy"]
    expected = [sum(v / LN2 <= edge for v in (0.0, 0.2, 0.3, 0.68)) / 4 for edge in entropy.edges]
    assert list(entropy.cdf) == expected
    assert set(found.scores) == {"confidence", "predictive_entropy"}  # nothing was made up


def test_entropies_are_of_each_rows_own_choices() -> None:
    rows = ScoreTable(
        torch.tensor([0, 0]),
        torch.tensor([0, 0]),
        {
            "confidence": torch.tensor([0.5, 0.25], dtype=torch.float64),
            "predictive_entropy": torch.tensor([LN2, 2 * LN2], dtype=torch.float64),
        },
    )
    decisions = Decisions(torch.tensor([True, True]), torch.tensor([False, False]))
    found = reference_profile(rows, decisions, ("a", "b", "c", "d"), torch.tensor([2, 4]))
    assert found.scores["predictive_entropy"].deciles == pytest.approx((1.0,) * 9)


def test_tenths_where_values_differ() -> None:
    values = torch.arange(1000, dtype=torch.float64) / 1000
    edges, shares = confidence_bins(values)
    assert len(edges) == 9
    assert shares == pytest.approx((0.1,) * 10, abs=0.002)


@pytest.mark.parametrize("saturated", [0.3, 0.85, 0.97, 0.985, 1.0])
def test_saturated_confidence_leaves_no_small_bin(saturated: float) -> None:
    n = 1000
    ones = int(saturated * n)
    values = torch.cat([torch.linspace(0.2, 0.99, n - ones), torch.ones(ones)]).double()
    edges, shares = confidence_bins(values)
    assert min(shares) >= 0.02
    assert sum(shares) == pytest.approx(1)
    assert len(shares) == len(edges) + 1
    assert list(edges) == sorted(set(edges))
    by_hand = [sum(int(v >= e) for e in edges) for v in values.tolist()]
    assert list(shares) == [by_hand.count(k) / n for k in range(len(shares))]
    if saturated == 0.85:  # all nine deciles but the first are 1: a bin below, a bin of ones
        assert shares[-1] == pytest.approx(0.85)


def test_one_value_makes_one_bin() -> None:
    assert confidence_bins(torch.ones(50)) == ((), (1.0,))


def test_a_score_that_is_no_number_is_refused() -> None:
    broken = ScoreTable(
        torch.tensor([0, 0]),
        torch.tensor([0, 0]),
        {"confidence": torch.tensor([0.5, math.nan]).double()},
    )
    decisions = Decisions(torch.tensor([True, True]), torch.tensor([False, False]))
    with pytest.raises(ValueError, match="finite"):
        reference_profile(broken, decisions, ("a", "b"), torch.tensor([2, 2]))
