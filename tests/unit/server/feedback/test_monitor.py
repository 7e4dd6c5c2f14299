import itertools
import math
import time

import numpy as np
import pytest
from mapie.exchangeability_testing import RiskMonitoring
from scipy.integrate import quad

from server.feedback import RiskMonitor
from server.feedback.monitor import DELTA, assess, log_e_value, risk_lower_bound
from server.feedback.store import FeedbackStore, RiskCount
from tests.support.feedback import NOW, make_claim

SEED = 20261122


def by_quadrature(n: int, wrong: int, p: float) -> float:
    """Return ln E from its definition: the likelihood ratio, integrated numerically."""

    def log_ratio(q: float) -> float:
        up = wrong * math.log(q / p) if wrong else 0.0
        down = (n - wrong) * math.log((1 - q) / (1 - p)) if n > wrong else 0.0
        return up + down

    peak = min(max(wrong / n if n else 0.5, p + 1e-9), 1 - 1e-9)
    top = log_ratio(peak)
    width = math.sqrt(peak * (1 - peak) / max(n, 1))
    edges = sorted({p, *(min(max(peak + k * width, p), 1.0) for k in (-12, -3, 3, 12)), 1.0})
    area = sum(
        quad(lambda q: math.exp(log_ratio(min(q, 1 - 1e-15)) - top), low, high)[0]
        for low, high in itertools.pairwise(edges)
    )
    return math.log(area / (1 - p)) + top


@pytest.mark.parametrize("p", [0.001, 0.01, 0.05, 0.1, 0.5, 0.9])
@pytest.mark.parametrize(
    ("n", "wrong"), [(0, 0), (1, 0), (1, 1), (10, 3), (100, 5), (100, 20), (1000, 30), (1000, 200)]
)
def test_the_e_value_is_the_integral_it_claims_to_be(n: int, wrong: int, p: float) -> None:
    found = log_e_value(n, wrong, p)
    if found > -30:
        assert found == pytest.approx(by_quadrature(n, wrong, p), abs=1e-6)
    else:  # a tail that a float cannot hold: no evidence at all, by either way
        assert by_quadrature(n, wrong, p) < 0


@pytest.mark.parametrize(("n", "wrong"), [(10**6, 10**5), (10**6, 0), (10**6, 10**6), (10**7, 1)])
def test_millions_of_labels_give_a_number(n: int, wrong: int) -> None:
    value = log_e_value(n, wrong, 0.05)
    assert not math.isnan(value)
    assert (value > 1) == (wrong / n > 0.05)
    assert 0 <= risk_lower_bound(n, wrong) <= wrong / n


@pytest.mark.parametrize("p", [0.0, 1.0, -0.1, 1.1])
def test_a_target_outside_its_domain(p: float) -> None:
    with pytest.raises(ValueError, match="strictly between 0 and 1"):
        log_e_value(10, 1, p)


@pytest.mark.parametrize("delta", [0.0, 0.4, 1.0])
def test_a_delta_for_which_the_bound_is_not_proven(delta: float) -> None:
    with pytest.raises(ValueError, match="1/e"):
        risk_lower_bound(10, 1, delta)


def test_the_expectation_is_one_at_the_target_and_less_below_it() -> None:
    # exactly, over all outcomes of n answers: what Ville's inequality rests on
    n, p = 40, 0.1
    for risk in (p, 0.05, 0.01):
        expected = sum(
            math.comb(n, k) * risk**k * (1 - risk) ** (n - k) * math.exp(log_e_value(n, k, p))
            for k in range(n + 1)
        )
        assert expected <= 1 + 1e-9
        assert (expected == pytest.approx(1, abs=1e-9)) == (risk == p)


@pytest.mark.parametrize(("n", "wrong"), [(1, 1), (5, 5), (20, 3), (100, 20), (400, 21), (30, 29)])
@pytest.mark.parametrize("delta", [0.01, 0.1, 0.36])
def test_the_lower_bound_is_where_the_test_turns(n: int, wrong: int, delta: float) -> None:
    bound = risk_lower_bound(n, wrong, delta)
    enough = -math.log(delta)
    contradicted = [
        p for p in np.linspace(1e-6, 1 - 1e-6, 4000) if log_e_value(n, wrong, p) >= enough
    ]
    assert all(p <= bound + 1e-9 for p in contradicted)
    assert max(contradicted, default=0.0) == pytest.approx(bound, abs=3e-4)
    assert bound < wrong / n


def false_alarms(risk: float, target: float, *, length: int, paths: int) -> float:
    """Return the share of streams that are ever called a violation, looking after every label."""
    rng = np.random.default_rng(SEED)
    wrong = np.cumsum(rng.random((paths, length)) < risk, axis=1)
    table = np.array(
        [
            [log_e_value(n, k, target) if k <= n else math.inf for k in range(wrong.max() + 1)]
            for n in range(1, length + 1)
        ]
    )
    evidence = table[np.arange(length)[None, :], wrong]
    return float((evidence >= -math.log(DELTA)).any(axis=1).mean())


@pytest.mark.parametrize(("risk", "target"), [(0.05, 0.05), (0.03, 0.05), (0.1, 0.1)])
def test_looking_all_the_time_raises_no_more_false_alarms_than_promised(
    risk: float, target: float
) -> None:
    paths = 4000
    rate = false_alarms(risk, target, length=1000, paths=paths)
    assert rate <= DELTA + 5 * math.sqrt(DELTA * (1 - DELTA) / paths)
    if risk == target:
        assert rate > 0.01  # not valid by never speaking


def test_a_broken_certificate_is_found_and_soon() -> None:
    # twice the target: 95 of 100 streams are found within a thousand labels
    assert false_alarms(0.10, 0.05, length=1000, paths=1000) > 0.95
    assert false_alarms(0.30, 0.05, length=100, paths=1000) > 0.95


def test_the_lower_bound_agrees_with_mapies() -> None:
    # another bound with the same promise (a predictably mixed empirical Bernstein martingale):
    # both stay below the risk, and ours, made for zeros and ones, is not the looser one
    rng = np.random.default_rng(SEED)
    errors = rng.random(2000) < 0.15
    truth = np.ones(2000, dtype=int)
    monitor = RiskMonitoring(risk="accuracy", test_level=DELTA, threshold=0.05, warn=False)
    monitor.update(truth, np.where(errors, 0, 1))
    theirs = float(monitor.online_risk_lower_bound_latest or 0.0)
    ours = risk_lower_bound(2000, int(errors.sum()), DELTA)
    assert 0.08 < theirs < 0.15
    assert theirs <= ours < 0.15
    assert monitor.harmful_shift_detected
    assert log_e_value(2000, int(errors.sum()), 0.05) >= -math.log(DELTA)


def test_an_assessment_says_violated_exactly_when_the_bound_is_above_the_target() -> None:
    verdicts = set()
    for wrong in range(41):
        risk = assess(RiskCount("topics", "r1", "risk-0.05", 0.05, 200, wrong))
        assert risk.violated == (risk.risk_lower_bound >= 0.05)
        assert risk.selective_risk == wrong / 200
        verdicts.add(risk.violated)
    assert verdicts == {True, False}


def wait_for(monitor: RiskMonitor) -> None:
    assert monitor._refresh is not None
    monitor._refresh.result(timeout=20)


def test_a_read_never_waits_and_asks_again_when_it_is_old(database_url: str) -> None:
    now_s = [0.0]
    store = FeedbackStore(database_url, retention_days=30, clock=lambda: NOW)
    monitor = RiskMonitor(store, max_age_s=5, clock=lambda: now_s[0])
    try:
        assert list(monitor.read()) == []
        wait_for(monitor)
        for number in range(40):
            store.insert(make_claim(), None if number < 20 else "billing", None)
        assert list(monitor.read()) == []  # known five seconds ago: not asked again
        now_s[0] = 5.0
        monitor.read()
        wait_for(monitor)
        (risk,) = monitor.read()
        assert (risk.n, risk.wrong, risk.policy) == (40, 20, "risk-0.05")
        assert risk.violated
        assert risk.risk_lower_bound > 0.05
    finally:
        store.close()


def test_what_was_known_stays_while_the_database_is_away(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    path = tmp_path_factory.mktemp("away") / "feedback.sqlite3"
    store = FeedbackStore(f"sqlite:///{path}", retention_days=30, clock=lambda: NOW)
    monitor = RiskMonitor(store, max_age_s=0, clock=time.monotonic)
    try:
        store.insert(make_claim(), "billing", None)
        monitor.refresh()
        store._engine.dispose()
        path.rename(path.with_name("gone"))
        path.mkdir()
        monitor.refresh()
        (risk,) = monitor.read()
        assert (risk.n, risk.wrong) == (1, 0)
        wait_for(monitor)
    finally:
        store.close()
