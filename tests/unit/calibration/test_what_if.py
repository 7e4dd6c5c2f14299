"""Curves and dry runs against counting by hand."""

import numpy as np
import pytest
import torch

from dalorra_core.artifact.calibration_record import Limit, ScoreName
from dalorra_core.calibration.scores import ScoreTable, passes
from dalorra_core.calibration.what_if import evaluate_rule, risk_coverage_points
from dalorra_core.errors import ConfigError


@pytest.fixture
def table() -> ScoreTable:
    """Six rows in scope (two wrong), two out of scope."""
    confidence = torch.tensor([0.99, 0.95, 0.9, 0.8, 0.6, 0.5, 0.7, 0.4], dtype=torch.float64)
    scores: dict[ScoreName, torch.Tensor] = {
        "confidence": confidence,
        "predictive_entropy": 1 - confidence,
    }
    labels = torch.tensor([0, 1, 0, 1, 0, 1, -1, -1])
    return ScoreTable(labels, torch.tensor([0, 1, 0, 0, 0, 0, 0, 1]), scores)


@pytest.mark.parametrize("name", ["confidence", "predictive_entropy"])
def test_every_point_is_what_counting_gives(table: ScoreTable, name: ScoreName) -> None:
    share = 0.25
    points = risk_coverage_points(table, name, share, 0.1)
    assert len(points) == 8
    for point in points:
        accept = passes(Limit(score=name, threshold=point.threshold), table)
        inside, outside = accept[:6].double(), accept[6:].double()
        covered = 0.75 * inside.mean() + 0.25 * outside.mean()
        wrong = 0.75 * (inside * ~table.correct[:6]).mean() + 0.25 * outside.mean()
        assert point.coverage == pytest.approx(float(covered))
        assert point.in_scope_coverage == pytest.approx(float(inside.mean()))
        assert point.selective_risk == pytest.approx(float(wrong / covered))
        assert point.risk_lower_bound <= point.selective_risk <= point.risk_upper_bound
        assert point.n_accepted == int(accept.sum())
    coverages = [point.coverage for point in points]
    assert coverages == sorted(coverages)
    assert coverages[-1] == pytest.approx(1.0)


def test_points_are_limited_and_reach_from_the_surest_to_all() -> None:
    generator = torch.Generator().manual_seed(0)
    confidence = torch.rand(1000, generator=generator, dtype=torch.float64)
    right = torch.rand(1000, generator=generator, dtype=torch.float64) < confidence
    labels = torch.where(right, 0, 1)
    points = risk_coverage_points(
        ScoreTable(labels, torch.zeros(1000).long(), {"confidence": confidence}),
        "confidence",
        0.0,
        0.1,
        max_points=50,
    )
    assert len(points) == 50
    assert points[0].coverage == pytest.approx(0.02, abs=0.002)
    assert points[-1].coverage == 1.0


def test_pointwise_bounds_hold_as_often_as_promised() -> None:
    rng = np.random.default_rng(3)
    low = high = 0
    draws = 400
    for _ in range(draws):
        inside, outside = rng.random(200) < 0.05, rng.random(40) < 0.1
        labels = torch.from_numpy(np.concatenate([np.where(inside, 1, 0), np.full(40, -1)]))
        accept = torch.from_numpy(np.concatenate([np.ones(200, bool), outside]))
        held = ScoreTable(labels, torch.zeros(240).long(), {"confidence": accept.double()})
        point = risk_coverage_points(held, "confidence", 0.2, 0.1, max_points=1000)[0]
        true = (0.8 * 0.05 + 0.2 * 0.1) / (0.8 + 0.2 * 0.1)
        low += point.risk_lower_bound > true
        high += point.risk_upper_bound < true
    assert max(low, high) / draws <= 0.1 + 3 * (0.1 * 0.9 / draws) ** 0.5


def test_a_rule_is_counted_by_hand(table: ScoreTable) -> None:
    accept = table.scores["confidence"] >= 0.65  # 4 in scope (1 wrong), 1 out
    abstain = table.scores["confidence"] < 0.55  # 1 in scope, 1 out
    found = evaluate_rule(table, accept, abstain, 0.25, 0.1)
    assert found.accept == pytest.approx(0.75 * 4 / 6 + 0.25 / 2)
    assert found.abstain == pytest.approx(0.75 / 6 + 0.25 / 2)
    assert found.review == pytest.approx(1 - found.accept - found.abstain)
    assert found.in_scope_coverage == pytest.approx(4 / 6)
    assert found.out_of_scope_accepted == pytest.approx(0.5)
    assert found.selective_risk == pytest.approx((0.75 / 6 + 0.125) / found.accept)
    assert found.selective_risk is not None
    assert found.selective_risk < found.risk_upper_bound <= 1.0
    assert (found.n, found.n_out_of_scope) == (8, 2)


def test_accepting_nothing_has_no_risk_but_a_bound_of_one(table: ScoreTable) -> None:
    nothing = torch.zeros(8).bool()
    found = evaluate_rule(table, nothing, nothing, 0.25, 0.1)
    assert (found.accept, found.review, found.selective_risk) == (0.0, 1.0, None)
    assert found.risk_upper_bound == 1.0


def test_a_share_without_rows_is_refused(table: ScoreTable) -> None:
    inside = table.rows(~table.outside)
    with pytest.raises(ConfigError, match="needs out-of-scope rows"):
        risk_coverage_points(inside, "confidence", 0.1, 0.1)
    everything = torch.ones(6).bool()
    found = evaluate_rule(inside, everything, ~everything, 0.0, 0.1)
    assert found.out_of_scope_accepted is None
