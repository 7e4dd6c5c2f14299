"""Adaptive M: what stops a row, against every way the other samples could turn out."""

import math
from itertools import product
from typing import Any

import pytest
import torch
from scipy.stats import t as student_t
from torch import Tensor

from dalorra_core.data.examples import TextExample
from dalorra_core.errors import ConfigError
from dalorra_core.metrics.uncertainty import mean_probs, mutual_information
from dalorra_core.predictive.adaptive import (
    AdaptiveAnswers,
    Bound,
    StoppingRule,
    answer_adaptively,
    settled,
    stopped_at,
)
from dalorra_core.predictive.predictor import Predictor, SamplingPlan
from tests.support.tiny_artifacts import TEXTS, save_tiny_adapter
from tests.support.tiny_models import assert_near, save_tiny_base


def random_samples(m: int, rows: int, labels: int, seed: int = 0, spread: float = 2.0) -> Tensor:
    """Return log-probabilities (m, B, C) of samples that agree more or less, row by row."""
    generator = torch.Generator().manual_seed(seed)
    centre = 3 * torch.randn(rows, labels, generator=generator, dtype=torch.float64)
    noise = torch.randn(m, rows, labels, generator=generator, dtype=torch.float64)
    return (centre + spread * torch.rand(rows, 1, generator=generator) * noise).log_softmax(-1)


def outcome(probs: Tensor, thresholds: tuple[float, ...]) -> tuple[int, ...]:
    """Return label and decision of the mean of (M, C)."""
    mean = probs.mean(0)
    return (int(mean.argmax()), *(int(float(mean.max()) >= t) for t in thresholds))


@pytest.mark.parametrize("thresholds", [(), (0.6,), (0.5, 0.8)])
@pytest.mark.parametrize(("m", "total"), [(1, 2), (2, 4), (3, 4), (4, 6), (6, 8)])
def test_certain_means_that_nothing_the_others_say_changes_the_outcome(
    m: int, total: int, thresholds: tuple[float, ...]
) -> None:
    """Means are linear, so samples that are sure of one label are the extreme cases."""
    log_probs = random_samples(m, 40, 3)
    found = settled(log_probs, total, StoppingRule(step=1, thresholds=thresholds))
    for b in range(40):
        own = log_probs[:, b].exp()
        outcomes = {
            outcome(torch.cat([own, torch.eye(3).double()[list(rest)]]), thresholds)
            for rest in product(range(3), repeat=total - m)
        }
        # The confidence is lowest where the others say nothing of the label, whichever they say.
        if len(thresholds) == 0:
            assert bool(found[b]) == (len(outcomes) == 1)
        elif found[b]:
            assert len(outcomes) == 1
        else:
            best = int(own.mean(0).argmax())
            lead = own.sum(0)[best] - own.sum(0).topk(2).values[1]
            low = float(own[:, best].sum()) / total
            high = low + (total - m) / total
            open_ = [t for t in thresholds if low < t <= high]
            assert float(lead) <= total - m or open_
    assert m < 3 or thresholds or (found.any() and not found.all())


def test_with_all_samples_there_is_nothing_left_to_wait_for() -> None:
    assert settled(random_samples(3, 7, 4), 3, StoppingRule(thresholds=(0.5,))).all()


def half_width(bound: Bound, values: list[float], total: int, share: float, width: float) -> float:
    m = len(values)
    if bound == "serfling":
        rho = (1 - (m - 1) / total) if 2 * m <= total else (1 - m / total) * (1 + 1 / m)
        return width * math.sqrt(rho * math.log(1 / share) / (2 * m))
    mean = math.fsum(values) / m
    variance = math.fsum((v - mean) ** 2 for v in values) / (m - 1)
    return float(student_t.ppf(1 - share, m - 1)) * math.sqrt(variance / m * (1 - m / total))


@pytest.mark.parametrize("bound", ["serfling", "student"])
@pytest.mark.parametrize("thresholds", [(), (0.4, 0.7)])
@pytest.mark.parametrize(("m", "total", "step"), [(4, 10, 2), (60, 100, 20), (30, 100, 30)])
def test_bounds_are_those_of_the_formulas(
    bound: Bound, thresholds: tuple[float, ...], m: int, total: int, step: int
) -> None:
    log_probs = random_samples(m, 60, 4, seed=m)
    rule = StoppingRule(bound, 0.1, step, thresholds)
    found = settled(log_probs, total, rule)
    looks = len(range(step, total, step))
    share = 0.1 / looks / (1 if bound == "student" else 3 + (2 if thresholds else 0))
    for b in range(60):
        p = log_probs[:, b].exp()
        best = int(p.mean(0).argmax())
        own = p[:, best].tolist()
        done = True
        for c in range(4):
            gap = (p[:, best] - p[:, c]).tolist()
            mean = math.fsum(gap) / m
            surely = (math.fsum(gap) - (total - m)) / total
            low = max(surely, mean - half_width(bound, gap, total, share, 2.0))
            done = done and (c == best or low > 0)
        mean = math.fsum(own) / m
        half = half_width(bound, own, total, share, 1.0)
        low = max(mean * m / total, mean - half)
        high = min(mean * m / total + (total - m) / total, mean + half)
        done = done and all(low >= t or high < t for t in thresholds)
        assert bool(found[b]) == done
    assert m < 30 or found.any()
    assert bound == "student" or not found.all()


@pytest.mark.parametrize("bound", ["serfling", "student"])
def test_of_all_orders_of_a_set_few_stop_at_another_outcome(bound: Bound) -> None:
    """A set whose mean lies close to a tie, and of which no sample is near its mean."""
    generator = torch.Generator().manual_seed(4)
    sure = torch.tensor([[0.99, 0.005, 0.005], [0.005, 0.99, 0.005]], dtype=torch.float64).log()
    counts = torch.tensor([115, 85])
    whole = torch.cat([sure[i].expand(int(n), -1) for i, n in enumerate(counts)])  # (200, C)
    orders = torch.stack([torch.randperm(200, generator=generator) for _ in range(400)], dim=1)
    rule = StoppingRule(bound, 0.1, 10)
    log_probs = whole[orders]  # (200, 400, C)
    used = stopped_at(log_probs, rule)
    answers = AdaptiveAnswers(log_probs, used)
    wrong = float((answers.mean_probs.argmax(-1) != 0).double().mean())
    limit = rule.delta + 5 * math.sqrt(rule.delta * (1 - rule.delta) / 400)
    assert wrong <= limit
    assert (used < 200).double().mean() > 0.5  # it does stop
    assert (used <= stopped_at(log_probs, StoppingRule("certain", step=10))).all()


def test_one_sample_shows_no_spread() -> None:
    log_probs = random_samples(1, 30, 3)
    found = settled(log_probs, 3, StoppingRule("student", step=1))
    assert torch.equal(found, settled(log_probs, 3, StoppingRule("certain", step=1)))


@pytest.mark.parametrize("bound", ["certain", "serfling", "student"])
def test_a_row_stops_at_the_first_look_that_settles_it(bound: Bound) -> None:
    log_probs, rule = random_samples(9, 50, 3), StoppingRule(bound, 0.2, 2, (0.5,))
    used = stopped_at(log_probs, rule)
    for b in range(50):
        looks = [m for m in (2, 4, 6, 8) if settled(log_probs[:m, [b]], 9, rule)]
        assert int(used[b]) == (looks[0] if looks else 9)
    assert len(used.unique()) > 2


def test_values_that_mean_nothing_are_refused() -> None:
    bad: list[tuple[dict[str, Any], str]] = [
        ({"bound": "never"}, "certain, serfling, student, got 'never'"),
        ({"delta": 0.0}, "strictly between 0 and 1, got 0.0"),
        ({"delta": 1.0}, "strictly between 0 and 1, got 1.0"),
        ({"step": 0}, "step must be at least 1, got 0"),
    ]
    for options, message in bad:
        with pytest.raises(ConfigError, match=message):
            StoppingRule(**options)


@pytest.fixture(scope="module")
def predictors(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Predictor]:
    folder = tmp_path_factory.mktemp("adaptive")
    base = save_tiny_base(folder / "base")
    places = {
        "late": save_tiny_adapter(folder / "late", base, layers=(1, 1)),
        "all": save_tiny_adapter(folder / "all", base),
        "map": save_tiny_adapter(folder / "map", base, method="map"),
    }
    return {
        name: Predictor.load(place, base=str(base), device="cpu") for name, place in places.items()
    }


@pytest.mark.parametrize("name", ["late", "all"])
@pytest.mark.parametrize("design", ["iid", "stratified"])
def test_rows_drop_out_and_keep_the_answers_of_the_plan(
    predictors: dict[str, Predictor], name: str, design: Any
) -> None:
    predictor = predictors[name]
    texts = [f"{a} {b}" for a in TEXTS for b in TEXTS]
    rows = [predictor.encode(TextExample(text, text)) for text in texts]
    plan, rule = SamplingPlan(8, 3, "monte_carlo", design), StoppingRule("student", 0.2, 2)
    found = answer_adaptively(predictor, rows, plan, rule)
    whole = predictor.predict(rows, plan, label_mass=False).log_probs
    assert torch.equal(found.num_samples, stopped_at(whole, rule))
    assert len(found.num_samples.unique()) > 1
    for b, m in enumerate(found.num_samples.tolist()):
        assert_near(found.log_probs[:m, b], whole[:m, b])
        assert found.log_probs[m:, b].isnan().all()
        own = whole[:m, [b]]
        assert_near(found.mean_probs[b], mean_probs(own)[0])
        assert_near(found.mutual_information[b], mutual_information(own)[0])


def test_nothing_is_run_for_rows_that_all_stopped(predictors: dict[str, Predictor]) -> None:
    predictor = predictors["all"]
    rows = [predictor.encode(TextExample(text, text)) for text in TEXTS]
    rule = StoppingRule("student", 0.999, 2)
    found = answer_adaptively(predictor, rows, SamplingPlan(40), rule, calibrated=False)
    assert int(found.num_samples.max()) < 40
    assert found.log_probs[int(found.num_samples.max()) :].isnan().all()


def test_what_has_no_samples_to_stop_is_refused(predictors: dict[str, Predictor]) -> None:
    rows = [predictors["map"].encode(TextExample("a", TEXTS[0]))]
    with pytest.raises(ConfigError, match="method map has no samples that cost a pass"):
        answer_adaptively(predictors["map"], rows, SamplingPlan(4), StoppingRule())
    pairs = SamplingPlan(4, 0, "monte_carlo", "antithetic")
    with pytest.raises(ConfigError, match="those of design antithetic are not"):
        answer_adaptively(predictors["all"], rows, pairs, StoppingRule("student"))
    found = answer_adaptively(predictors["all"], rows, pairs, StoppingRule())
    assert int(found.num_samples[0]) <= 4
