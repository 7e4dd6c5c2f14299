"""benchmarks.queue_simulation: by hand, and against what queueing theory says of known queues."""

import itertools
import json
import math
import random
import statistics
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.cost_model import Shape
from benchmarks.queue_simulation import (
    BALANCERS,
    Arrival,
    Bound,
    Linear,
    Outcome,
    ReplicaModel,
    Run,
    Service,
    bursty,
    highest_rate,
    of_lengths,
    recorded,
    saturated_rate,
    simulate,
    summarise,
)
from benchmarks.queue_simulation.__main__ import main
from benchmarks.queue_simulation.calibration import cut, replica_of
from benchmarks.queue_simulation.check import judge, two_replicas
from benchmarks.serving.load import poisson
from server.batching import AdmissionLimits, BatchLimits

TINY = Shape(2, 4, 2, 1, 2, 6, 10, labels=3, rank=1)  # 120 weights a layer
UNBOUNDED = AdmissionLimits(10**9, 10**9, 10**12)
ONE_BY_ONE = BatchLimits(max_rows=1, wait_s=0.0)


def a_second(lengths: Sequence[int], samples: int) -> float:
    del lengths, samples
    return 1.0


def replica(service: Service = a_second, **values: Any) -> ReplicaModel:
    model = ReplicaModel(service, ONE_BY_ONE, UNBOUNDED, samples=1, deadline_s=math.inf)
    return replace(model, **values)


def at(*moments: float) -> list[Arrival]:
    return list(of_lengths(moments, [1]))


def ends(run: Run) -> list[tuple[float, str, Any]]:
    found = sorted(run.outcomes, key=lambda one: one.at_s)
    return [(one.at_s, one.fate, pytest.approx(one.took_s)) for one in found]


# -- by hand ------------------------------------------------------------------------------------


def test_rows_that_wait_share_the_next_batch() -> None:
    run = simulate(at(0, 0.1, 0.2, 0.3), replica(batch=BatchLimits(max_rows=2, wait_s=0.0)))
    assert [one[2] for one in ends(run)] == [1.0, 1.9, 1.8, 2.7]
    assert run.batches == [1, 2, 1]
    assert run.rows_per_batch == pytest.approx(4 / 3)
    assert run.utilisation == pytest.approx(1.0)


def test_an_idle_engine_waits_for_a_request_that_is_on_its_way() -> None:
    model = replica(batch=BatchLimits(wait_s=0.5), front_s=0.1, delay_s=0.01)
    assert ends(simulate(at(0), model)) == [(0, "answered", 1.11)]
    together = simulate(at(0, 0.05), model)
    assert ends(together) == [(0, "answered", 1.21), (0.05, "answered", 1.16)]
    assert together.batches == [2]
    late = simulate(at(0, 0.05), replace(model, batch=BatchLimits(wait_s=0.04)))
    assert late.batches == [1, 1]  # the first has waited its time at 0.14, the other comes at 0.2


def test_a_request_is_answered_with_its_last_row() -> None:
    run = simulate([Arrival(0, (1, 1, 1))], replica(batch=BatchLimits(max_rows=2)))
    assert ends(run) == [(0, "answered", 2.0)]
    assert run.batches == [2, 1]


def test_a_deadline_ends_a_request_and_spares_the_engine_what_has_not_begun() -> None:
    run = simulate(at(0, 0.1, 0.2, 2.5), replica(deadline_s=1.5))
    assert ends(run) == [
        (0, "answered", 1.0),
        (0.1, "late", 1.5),
        (0.2, "late", 1.5),
        (2.5, "answered", 1.0),
    ]
    assert run.batches == [1, 1, 1]


def test_a_full_server_sheds_at_once() -> None:
    run = simulate(at(0, 0.1, 1.2), replica(admission=AdmissionLimits(1, 9, 9)))
    assert [one[1] for one in ends(run)] == ["answered", "shed", "answered"]
    run = simulate(
        [Arrival(0, (1,)), Arrival(0, (9,))], replica(admission=AdmissionLimits(9, 9, 9))
    )
    assert sorted(one.fate for one in run.outcomes) == ["answered", "shed"]  # by its tokens


def test_work_of_more_than_half_a_deadline_ahead_sheds() -> None:
    run = simulate(at(0, 2.0, 2.1, 2.2), replica(deadline_s=3.0))
    assert [one[1] for one in ends(run)] == ["answered", "answered", "answered", "shed"]


def test_balancers_know_who_is_busy() -> None:
    arrivals = [Arrival(0, (5,)), Arrival(1, (1,)), Arrival(2.5, (1,))]
    model = replica(lambda lengths, _: float(lengths[0]))
    fair = simulate(arrivals, model, replicas=2, balancer=BALANCERS["round-robin"])
    assert ends(fair)[2] == (2.5, "answered", 3.5)  # behind the long one
    least = simulate(arrivals, model, replicas=2)
    assert ends(least)[2] == (2.5, "answered", 1.0)
    assert least.busy_s == [5.0, 2.0]


def test_a_summary_counts_after_the_start() -> None:
    outcomes = [Outcome(0, 9, "answered"), *(Outcome(n, 0.5, "answered") for n in range(2, 6))]
    outcomes += [Outcome(6, 0.0, "shed"), Outcome(7, 2.0, "late"), Outcome(9.9, 1.0, "answered")]
    found = summarise(outcomes, seconds=10, skip_s=2)
    assert found["requests"] == 7
    assert found["answered_per_s"] == pytest.approx(5 / 8)  # four, and the first one's end
    assert (found["p50_s"], found["p99_s"]) == (0.5, 1.0)
    assert (found["shed"], found["late"]) == (pytest.approx(1 / 7), pytest.approx(1 / 7))


# -- against theory -----------------------------------------------------------------------------


def mean_in_system(
    rate: float, model: ReplicaModel, count: int, replicas: int = 1
) -> tuple[float, float]:
    """Return the mean time in the system and its standard error, by means of 20 batches."""
    arrivals = of_lengths(poisson(rate, count / rate), [1])
    run = simulate(arrivals, model, replicas=replicas, balancer=BALANCERS["round-robin"])
    took_s = [one.took_s for one in sorted(run.outcomes, key=lambda one: one.at_s)]
    size = len(took_s) // 20
    means = [statistics.fmean(took_s[i * size : (i + 1) * size]) for i in range(20)]
    return statistics.fmean(means), statistics.stdev(means) / math.sqrt(20)


def exponential(seed: int) -> Service:
    draw = random.Random(seed)
    return lambda _lengths, _samples: draw.expovariate(1.0)


def test_the_mean_wait_of_an_m_d_1_queue() -> None:
    """Pollaczek and Khinchine: rho / (2 (1 - rho)) service times."""
    mean, error = mean_in_system(0.5, replica(), 8000)
    assert error < 0.03
    assert abs(mean - 1.5) < 4 * error


def test_the_mean_wait_of_an_m_m_1_queue() -> None:
    mean, error = mean_in_system(0.5, replica(exponential(5)), 8000)
    assert error < 0.12
    assert abs(mean - 1 / (1 - 0.5)) < 4 * error


def test_two_replicas_in_turn_are_queues_of_every_second_arrival() -> None:
    """Each is an E2/M/1 queue: 1 / (1 - s), s the root of s = (2 l / (2 l + 1 - s))**2, l = 0.6."""
    root = 0.5
    for _ in range(200):
        root = (1.2 / (1.2 + 1 - root)) ** 2
    mean, error = mean_in_system(1.2, replica(exponential(6)), 8000, replicas=2)
    assert error < 0.12
    assert abs(mean - 1 / (1 - root)) < 4 * error
    assert mean < 1 / (1 - 0.6) - 2 * error  # shorter than with arrivals at random


def test_bursts_keep_the_mean_rate_and_are_bursts() -> None:
    moments = list(bursty(20, 4000, seed=3, factor=4, share=0.1, burst_s=2))
    assert moments == sorted(moments)
    assert 0 < moments[0] < moments[-1] < 4000
    per_10_s = [0] * 400
    for at_s in moments:
        per_10_s[int(at_s // 10)] += 1
    mean, spread = statistics.fmean(per_10_s), statistics.variance(per_10_s)
    assert abs(mean - 200) < 5 * math.sqrt(spread / 400)
    assert spread > 5 * mean  # a Poisson process has spread = mean
    calm = list(bursty(20, 100, factor=2, share=0.5))  # nothing comes between its bursts
    assert max(b - a for a, b in itertools.pairwise(calm)) > 1
    with pytest.raises(ValueError, match="cannot take"):
        next(bursty(1, 1, factor=4, share=0.5))


# -- how long a batch takes ---------------------------------------------------------------------


def test_a_batch_is_cut_into_passes_as_the_core_cuts_it() -> None:
    assert Linear.counts([3, 5], 4, 20) == (2, 32)  # 3 x 4 and 5 x 4: together 40 are too many
    assert Linear.counts([5, 3], 4, 40) == (1, 40)
    assert Linear.counts([10], 4, 25) == (2, 40)  # two samples a pass
    assert Linear(0.5, 0.01, 20)([3, 5], 4) == pytest.approx(1.0 + 0.32)
    assert Linear.counts([5, 3], 4, 40, unpadded=True) == (1, 32)
    assert Linear(0.5, 0.01, 40, unpadded=True)([3, 5], 4) == pytest.approx(0.5 + 0.32)


def test_the_fit_finds_what_the_times_were_made_of() -> None:
    counts = [(1, 10), (1, 40), (3, 120), (2, 50)]
    fitted = Linear.fit(counts, [0.2 * passes + 0.01 * tokens for passes, tokens in counts], 99)
    assert (fitted.pass_s, fitted.token_s) == (pytest.approx(0.2), pytest.approx(0.01))
    falling = Linear.fit([(1, 10), (1, 20)], [2.0, 1.9], 99)
    assert falling.token_s == 0
    assert 1.9 < falling.pass_s < 2.0
    steep = Linear.fit([(1, 10), (1, 20)], [1.0, 2.2], 99)
    assert steep.pass_s == 0
    assert 0.1 < steep.token_s < 0.11


def test_the_bound_of_a_batch_is_that_of_its_passes() -> None:
    slow = Bound(TINY, 1e3, 1e12, 2, 9)
    assert slow([3], 2) == pytest.approx(slow([3], 1) * 2, rel=0.2)
    assert slow([3, 3], 3) == pytest.approx(2 * slow([3], 3))  # nine tokens a pass
    reading = Bound(TINY, 1e15, 1e3, 2, 9)
    assert reading([3], 1) == reading([3], 3) == pytest.approx(2 * (2 * 120 + 4 * 13) / 1e3)


def test_a_request_alone_is_cut_as_the_policy_cuts_it() -> None:
    assert cut([5, 1, 4], 1, BatchLimits(max_rows=2, max_padding=1.0)) == [[1, 4], [5]]
    assert cut([5, 1, 4], 1, BatchLimits(max_rows=9, max_padding=0.2)) == [[1], [4, 5]]
    assert cut([5, 4], 3, BatchLimits(max_tokens=15)) == [[4], [5]]
    assert sorted(*cut([5, 1, 4], 1, BatchLimits(max_padding=0.0), unpadded=True)) == [1, 4, 5]


# -- what replicas carry ------------------------------------------------------------------------


def test_the_highest_rate_keeps_the_bound_and_two_replicas_carry_twice_as_much() -> None:
    model = replica(lambda lengths, _: 0.1 + 0.02 * len(lengths), batch=BatchLimits(max_rows=8))
    most = saturated_rate(model, [4])
    assert most == pytest.approx(8 / 0.26, rel=0.01)  # the first batch has one row
    rate = highest_rate(model, [4], 0.6, requests=400)
    assert 0.3 * most < rate < most
    assert highest_rate(model, [4], 0.3, requests=400) < rate
    assert highest_rate(model, [4], 0.1, requests=400) == 0
    assert highest_rate(model, [4], 0.6, replicas=2, requests=400) >= 1.7 * rate


def document() -> dict[str, Any]:
    model = replica(Linear(0.02, 0.001, 64), deadline_s=4.0, batch=BatchLimits(max_rows=4))
    return {"replica": asdict(model), "lengths": [4, 6, 8]}


def test_a_replica_that_was_measured_can_be_simulated_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = replica_of(json.loads(json.dumps(document()["replica"])))
    assert found.service == Linear(0.02, 0.001, 64)
    assert found.batch.max_rows == 4
    measured = tmp_path / "check.json"
    measured.write_text(json.dumps(document()))
    arguments = ["--measured", str(measured), "--seconds", "20", "--rate", "30"]
    assert main(arguments) == 0
    one = json.loads(capsys.readouterr().out)
    assert main([*arguments, "--replicas", "2", "--balancer", "round-robin"]) == 0
    two = json.loads(capsys.readouterr().out)
    assert two["p99_s"] < one["p99_s"]
    assert two["utilisation"] < one["utilisation"] < 1


def test_a_record_of_arrivals_is_replayed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = tmp_path / "trace.csv"
    table.write_text("at_s,tokens\n10.5,7\n10.0,\n")
    assert recorded(table, [3]) == [Arrival(0.0, (3,)), Arrival(0.5, (7,))]
    lines = tmp_path / "trace.jsonl"
    lines.write_text('{"at_s": 2, "tokens": [4, 5]}\n{"at_s": 3, "tokens": 6}\n{"at_s": 5}\n')
    found = recorded(lines, [3])
    assert found == [Arrival(0.0, (4, 5)), Arrival(1.0, (6,)), Arrival(3.0, (3,))]
    measured = tmp_path / "check.json"
    measured.write_text(json.dumps(document()))
    assert main(["--measured", str(measured), "--arrivals", str(lines)]) == 0
    assert json.loads(capsys.readouterr().out)["requests"] == 3


def test_two_replicas_are_compared_at_one_bound() -> None:
    found = two_replicas(
        replica(Linear(0.02, 0.001, 64), batch=BatchLimits(max_rows=4)), [4, 6], 500
    )
    assert found["p99_s"] == pytest.approx(5 * 0.026)
    for balancer in BALANCERS:
        assert found[balancer]["ratio"] >= 1.7


def test_a_check_is_judged_by_its_errors() -> None:
    same = {"answered_per_s": 1.0, "p50_s": 0.1, "p95_s": 0.2, "shed": 0.0}
    loads = [
        {"load": 0.5, "predicted": same, "measured": {**same, "p95_s": 0.1}},
        {"load": 2.0, "predicted": same, "measured": {**same, "p50_s": 9.0, "shed": 0.5}},
    ]
    ratios = {"round-robin": {"ratio": 1.9}, "least-connections": {"ratio": 2.0}}
    verdicts = judge({"loads": loads, "replicas": ratios})
    failed = {verdict.name for verdict in verdicts if not verdict.passed}
    assert failed == {"load 0.5: error of p95_s", "load 2.0: error of the share shed"}
    assert verdicts[-1].found == 1.9
