"""benchmarks.scaling_plan and the tables of docs/scaling.md."""

import json
from argparse import Namespace
from pathlib import Path

import pytest

from benchmarks.cost_model import MODELS
from benchmarks.queue_simulation import of_lengths, simulate, summarise
from benchmarks.scaling_plan import adapter_bytes, adapters, bottlenecks, main, replica
from benchmarks.scaling_tables import PAGE, begin, stored, tables, with_tables
from benchmarks.serving.load import poisson

MODEL, GPU = "8B (Llama-3.1-8B)", "H100 SXM"
CHECKED, PLANNED = stored()


def test_the_page_is_what_the_results_say() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert with_tables(page, tables(CHECKED, PLANNED)) == page
    with pytest.raises(ValueError, match="each once"):
        with_tables(page.replace(begin("gpus"), ""), {"gpus": ""})


def test_a_planned_rate_keeps_its_bound() -> None:
    found = next(
        one
        for one in PLANNED["cells"]
        if (one["model"], one["gpu"], one["samples"]) == (MODEL, GPU, 10)
    )
    rate, lengths = found["carries_per_s"], [PLANNED["tokens"]]
    model = replica(MODELS[MODEL], GPU, 10, PLANNED["front_s"])
    assert model.service(lengths, 10) == pytest.approx(found["alone_s"])
    seconds = PLANNED["requests"] / rate
    run = simulate(of_lengths(poisson(rate, seconds), lengths), model)
    assert summarise(run.outcomes, seconds, 0.1 * seconds)["p99_s"] <= found["p99_s"]
    assert rate <= 0.9 * found["saturated_per_s"]
    assert found["gpus"]["1000"] == -(-1000 // rate)
    hours = found["gpus"]["1000"] * 1000 / 3600  # a million at 1,000 a second are 1,000 seconds
    assert found["gpu_hours_per_million"]["1000"] == pytest.approx(hours)


def test_the_tables_of_a_check_say_what_it_found() -> None:
    found = {"requests": 80, "answered_per_s": 2.5, "p50_s": 0.1, "p95_s": 0.2, "p99_s": 0.3}
    load = {
        "load": 0.5,
        "predicted": {**found, "shed": 0.25, "utilisation": 0.5},
        "measured": found,
    }
    load["predicted"]["rows_per_batch"] = 1.5
    load["measured"] = {**found, "shed": 0.0}
    check = {
        "hardware": "two cores",
        "subject": {"engine": "adapter a"},
        "replica": {"samples": 4},
        "loads": [load],
        "replicas": {"p99_s": 0.5, "one_per_s": 3.0, "in turn": {"two_per_s": 6.3, "ratio": 2.1}},
    }
    written = tables(check, PLANNED)
    assert written["check"].startswith("two cores, adapter a, M = 4:")
    assert (
        "| 0.5 | predicted | 80 | 2.50 | 100 | 200 | 300 | 25.0 % | 0.50 | 1.50 |"
        in written["check"]
    )
    assert "| 0.5 | measured | 80 | 2.50 | 100 | 200 | 300 | 0.0 % |  |  |" in written["check"]
    assert "| the server of the check | 500 | in turn | 3 | 6.3 | 2.10 |" in written["replicas"]
    assert tables(None, PLANNED)["check"] == "No check is stored yet.\n"


def test_two_planned_replicas_carry_what_was_asked_of_them() -> None:
    found = PLANNED["replicas"]
    for balancer in ("round-robin", "least-connections"):
        assert found[balancer]["ratio"] >= 1.7
        assert found[balancer]["two_per_s"] == pytest.approx(
            found[balancer]["ratio"] * found["one_per_s"]
        )


def test_the_memory_of_adapters_by_hand() -> None:
    shape = MODELS[MODEL]
    factors = 4 * 8 * (4096 + 4096 + 4096 + 1024) * 32
    labels = 2 * 5 * 4096
    gates = 4 * 8 * 2 * 32
    assert adapter_bytes(shape, gates) == factors + labels + 512 * gates
    assert adapter_bytes(shape, 2**20) == factors + labels + 2**28  # no more is kept
    assert adapter_bytes(shape, 2**26) == factors + labels + 10 * 2**26  # but one pack is
    found = adapters(MODEL, GPU)
    assert found["room_bytes"] == pytest.approx(
        64e9 - 2 * (shape.layer_weights * 32 + 128256 * 4096)
    )
    assert found["adapters"]["gates"] == found["room_bytes"] // (factors + labels + 512 * gates)


def test_bottlenecks_are_rates_of_one_part_each() -> None:
    found = bottlenecks(MODEL, GPU, 10, Namespace(front_s=0.004, tokens=64))
    assert found["event_loop_per_s"] == 250
    weights = 2 * (MODELS[MODEL].layer_weights * 32 + 4096 * (128256 + 5))
    assert found["weights_per_s"] == pytest.approx(0.65 * 3.35e12 / weights)


def test_the_program_writes_a_plan(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("benchmarks.scaling_plan.MODELS", {MODEL: MODELS[MODEL]})
    monkeypatch.setattr("benchmarks.scaling_plan.highest_rate", lambda *_, **__: 7.0)
    monkeypatch.setattr("benchmarks.scaling_plan.saturated_rate", lambda *_: 10.0)
    monkeypatch.setattr("benchmarks.scaling_plan.two_replicas", lambda *_: {"one_per_s": 3.0})
    out = tmp_path / "plan.json"
    assert main(["--samples", "4", "--front-ms", "2", "--output", str(out)]) == 0
    assert capsys.readouterr().out == out.read_text()
    found = json.loads(out.read_text())
    assert found["front_s"] == 0.002
    assert found["replicas"]["one_per_s"] == 3
    assert {one["gpus"]["10"] for one in found["cells"]} == {2}
