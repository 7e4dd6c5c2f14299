"""The fitted score: the formula by hand, a known answer, and what it refuses."""

import math

import pytest
import torch

from dalorra_core.artifact.calibration_record import CombinedScore, ScoreName
from dalorra_core.calibration.combined import combined_score, fit_combined
from dalorra_core.errors import ConfigError, DataError
from dalorra_core.metrics.selective import auroc


def test_formula_by_hand() -> None:
    combined = CombinedScore(
        bias=0.5, weights={"logit_confidence": 2.0, "predictive_entropy": -1.0}, n=1
    )
    scores: dict[ScoreName, torch.Tensor] = {
        "confidence": torch.tensor([0.9]),
        "predictive_entropy": torch.tensor([0.3]),
    }
    expected = 1 / (1 + math.exp(-(0.5 + 2 * math.log(0.9 / 0.1) - 0.3)))
    assert combined_score(combined, scores).item() == pytest.approx(expected, rel=1e-6)


def test_extreme_scores_stay_finite() -> None:
    weights = {"logit_confidence": 1.0, "log_mutual_information": 1.0, "log_label_mass": 1.0}
    combined = CombinedScore(bias=0.0, weights=weights, n=1)
    scores: dict[ScoreName, torch.Tensor] = {
        "confidence": torch.tensor([0.0, 1.0]),
        "mutual_information": torch.tensor([0.0, -1e-9]),
        "label_mass": torch.tensor([0.0, 1.0]),
    }
    assert bool(torch.isfinite(combined_score(combined, scores)).all())


def rows(n: int, seed: int) -> tuple[dict[ScoreName, torch.Tensor], torch.Tensor, torch.Tensor]:
    """Two scores that each know half of what decides whether an answer is right."""
    generator = torch.Generator().manual_seed(seed)
    a, b = torch.randn(2, n, generator=generator, dtype=torch.float64)
    right = torch.rand(n, generator=generator, dtype=torch.float64) < torch.sigmoid(2 * a - 2 * b)
    return {"confidence": torch.sigmoid(a), "predictive_entropy": b}, right, torch.zeros(n).bool()


def test_fit_finds_the_weights_that_made_the_rows() -> None:
    scores, right, outside = rows(20_000, 0)
    fitted = fit_combined(scores, right, outside, 0.0)
    assert fitted.weights["logit_confidence"] == pytest.approx(2.0, abs=0.15)
    assert fitted.weights["predictive_entropy"] == pytest.approx(-2.0, abs=0.15)
    assert fitted.bias == pytest.approx(0.0, abs=0.1)
    assert fitted.n == 20_000


def test_combination_beats_its_parts_on_other_rows() -> None:
    fitted = fit_combined(*rows(600, 0), 0.0)
    scores, right, _ = rows(5000, 1)
    both = combined_score(fitted, scores)
    alone = max(
        auroc(values[right], values[~right])
        for values in (scores["confidence"], -scores["predictive_entropy"])
    )
    assert auroc(both[right], both[~right]) > alone + 0.02


def test_out_of_scope_rows_weigh_as_declared() -> None:
    scores, right, _ = rows(4000, 0)
    outside = torch.arange(4000) >= 3800
    right = right & ~outside
    rare = fit_combined(scores, right, outside, 0.01)
    common = fit_combined(scores, right, outside, 0.5)
    assert float(combined_score(common, scores).mean()) < float(combined_score(rare, scores).mean())


def test_rows_out_of_scope_are_left_out_when_none_are_declared() -> None:
    scores, right, _ = rows(4000, 0)
    outside = torch.arange(4000) >= 3800
    with_them = fit_combined(scores, right & ~outside, outside, 0.0)
    inside: dict[ScoreName, torch.Tensor] = {k: v[:3800] for k, v in scores.items()}
    without = fit_combined(inside, right[:3800], torch.zeros(3800).bool(), 0.0)
    assert with_them.weights["predictive_entropy"] == pytest.approx(
        without.weights["predictive_entropy"], rel=0.01
    )


def test_too_few_errors_to_learn_from() -> None:
    scores, right, outside = rows(300, 0)
    with pytest.raises(DataError, match=r"at least 20 right and 20 wrong answers .* got 300 and 0"):
        fit_combined(scores, torch.ones_like(right), outside, 0.0)


def test_a_missing_score_is_named() -> None:
    combined = CombinedScore(bias=0.0, weights={"log_label_mass": 1.0}, n=1)
    with pytest.raises(ConfigError, match="the combined score needs label_mass"):
        combined_score(combined, {"confidence": torch.ones(1)})
