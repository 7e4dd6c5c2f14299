"""dalorra_core.calibration.prediction_sets: against MAPIE, by hand, and by repetition."""

import math
import warnings
from typing import Any, Literal

import numpy as np
import pytest
import torch
from sklearn.base import BaseEstimator, ClassifierMixin
from torch import Tensor

from dalorra_core.artifact.calibration_record import PredictionSets
from dalorra_core.calibration.prediction_sets import fewest_rows, fit_prediction_sets, members
from dalorra_core.errors import ConfigError, DataError

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from mapie.classification import SplitConformalClassifier

KINDS: tuple[Literal["lac", "aps"], ...] = ("lac", "aps")


def drawn(n: int, seed: int, labels: int = 6) -> tuple[Tensor, Tensor]:
    """Probabilities and labels that do not follow them: the guarantee needs no calibration."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(n, labels, generator=generator, dtype=torch.float64)
    y = torch.multinomial(logits.softmax(-1), 1, generator=generator).flatten()
    return (3 * logits).softmax(-1), y


class _Given(ClassifierMixin, BaseEstimator):
    """A classifier whose inputs are its probabilities."""

    def __init__(self, num_labels: int = 6) -> None:
        self.num_labels = num_labels
        self.classes_ = np.arange(num_labels)

    def fit(self, *_: object) -> "_Given":
        return self

    def predict_proba(self, x: Any) -> Any:
        return x

    def predict(self, x: Any) -> Any:
        return x.argmax(1)

    def __sklearn_is_fitted__(self) -> bool:
        return True


class _Ones(np.random.RandomState):
    """MAPIE's aps takes a random part of the right label's probability off; ours takes all."""

    def uniform(self, *_: Any, size: Any = None, **__: Any) -> Any:
        return np.ones(size)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("alpha", [0.05, 0.1, 0.3])
@pytest.mark.parametrize("n", [99, 137])
def test_the_sets_are_mapies(kind: Literal["lac", "aps"], alpha: float, n: int) -> None:
    probs, labels = drawn(n, seed=3)
    new, _ = drawn(300, seed=4)
    rule = fit_prediction_sets(kind, alpha, (probs, labels), (probs, labels))
    oracle = SplitConformalClassifier(
        _Given(),
        confidence_level=1 - alpha,
        conformity_score=kind,
        prefit=True,
        random_state=_Ones(),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        oracle.conformalize(probs.numpy(), labels.numpy())
        options = {"include_last_label": True} if kind == "aps" else {}
        _, sets = oracle.predict_set(new.numpy(), conformity_score_params=options)
    torch.testing.assert_close(members(rule, new), torch.from_numpy(np.asarray(sets)[:, :, 0]))


@pytest.mark.parametrize("kind", KINDS)
def test_coverage_is_kept_over_many_draws(kind: Literal["lac", "aps"]) -> None:
    """Mean coverage over calibration sets of 40 rows is at least 1 - alpha, up to 5 s.e."""
    alpha, draws, fresh = 0.2, 400, 250
    found = []
    for seed in range(draws):
        certify, test = drawn(40, 2 * seed), drawn(fresh, 2 * seed + 1)
        found.append(fit_prediction_sets(kind, alpha, certify, test).empirical_coverage)
    mean = sum(found) / draws
    error = float(np.std(found)) / math.sqrt(draws)
    assert mean >= 1 - alpha - 5 * error
    if kind == "lac":  # continuous scores: k / (n + 1) exactly, with k = ceil(41 * 0.8)
        assert mean == pytest.approx(33 / 41, abs=5 * error)


def test_lac_by_hand() -> None:
    probs = torch.tensor([[0.6, 0.4], [0.7, 0.3], [0.8, 0.2]], dtype=torch.float64)
    labels = torch.tensor([0, 0, 1])  # scores 0.4, 0.3, 0.8; k = ceil(4 * 0.5) = 2
    rule = fit_prediction_sets("lac", 0.5, (probs, labels), (probs, labels))
    assert rule.quantile == pytest.approx(0.4)
    assert members(rule, probs).tolist() == [[True, False]] * 3
    assert (rule.empirical_coverage, rule.mean_size, rule.n) == (pytest.approx(2 / 3), 1.0, 3)
    assert members(rule, torch.tensor([[0.5, 0.5]])).tolist() == [[False, False]]


def test_aps_by_hand() -> None:
    rule = PredictionSets(
        kind="aps", alpha=0.1, quantile=0.75, n=9, empirical_coverage=0.9, mean_size=1.0
    )
    probs = torch.tensor([[0.5, 0.2, 0.25, 0.05], [0.1, 0.7, 0.2, 0.0], [0.9, 0.1, 0.0, 0.0]])
    assert members(rule, probs.double()).tolist() == [
        [True, True, True, False],  # 0.5, 0.75 meets the quantile, 0.95 crosses it
        [False, True, True, False],  # 0.7, 0.9 crosses it
        [True, False, False, False],  # never empty
    ]


def test_aps_counts_what_is_more_probable_than_the_right_label() -> None:
    probs = torch.tensor([[0.6, 0.4], [0.7, 0.3], [0.2, 0.8]], dtype=torch.float64)
    labels = torch.tensor([0, 1, 1])  # scores 0, 0.7, 0; k = ceil(4 * 0.5) = 2
    rule = fit_prediction_sets("aps", 0.5, (probs, labels), (probs, labels))
    assert rule.quantile == 0.0
    assert (rule.empirical_coverage, rule.mean_size) == (pytest.approx(2 / 3), 1.0)


def test_the_fewest_rows_are_those_of_the_formula() -> None:
    assert [fewest_rows(alpha) for alpha in (0.5, 0.1, 0.05, 0.01)] == [1, 9, 19, 99]
    probs, labels = drawn(18, 0)
    fit_prediction_sets("lac", 0.1, (probs, labels), (probs, labels))
    with pytest.raises(DataError, match="at least 19 in-scope rows in the certify part, got 18"):
        fit_prediction_sets("lac", 0.05, (probs, labels), (probs, labels))


@pytest.mark.parametrize("alpha", [0.0, 1.0, -0.1, math.nan])
def test_an_alpha_outside_its_domain_is_refused(alpha: float) -> None:
    with pytest.raises(ConfigError, match=f"alpha must lie strictly.*{alpha}"):
        fit_prediction_sets("lac", alpha, drawn(9, 0), drawn(9, 0))
