"""The load programs of benchmarks/serving in small, on the paced fake engine: ratios only.

``make soak`` runs them in full.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.queue_simulation.__main__ import main as queue_simulation
from benchmarks.serving import fuzz, hot_swap, overload, rolling, targets
from tests.support.required import require_or_skip

pytestmark = pytest.mark.integration

PACE = "4000"  # padded tokens times samples a second: some hundred requests


def verdicts(path: Path) -> dict[str, Any]:
    """Return what was found by the verdict's name."""
    found = json.loads(path.read_text())
    return {verdict["name"]: verdict for verdict in found["verdicts"]}


def test_ten_times_the_capacity_loses_nobody(tmp_path: Path) -> None:
    output = tmp_path / "overload.json"
    options = f"--fake {PACE} --seconds 3 --capacity-seconds 0.8 --clients 8 --deadline-ms 4000"
    overload.main([*options.split(), "--output", str(output)])
    found = verdicts(output)
    for name in (
        "requests without an answer",
        "answers other than 200, 429, 503, 504",
        "share of 429s with Retry-After",
    ):  # times are the benchmark's: here other tests run beside it
        assert found[name]["passed"], found[name]
    answers = json.loads(output.read_text())["answers"]
    assert answers["429"] > answers["200"] > 0
    assert found["throughput / peak"]["found"] > 0.5  # a busy machine may take its share


def test_a_simulation_says_beforehand_what_a_paced_server_does(tmp_path: Path) -> None:
    output = tmp_path / "check.json"
    options = "--check --fake 2000 --loads 0.5 3 --seconds 4 --front-seconds 0.5"
    options += " --deadline-ms 3000 --texts-used 8 --sizes 2 --repeats 1 --requests 200"
    queue_simulation([*options.split(), "--output", str(output)])
    found = json.loads(output.read_text())
    for load in found["loads"]:
        assert load["predicted"]["requests"] == load["measured"]["requests"] > 0
    light, heavy = found["loads"]
    assert light["predicted"]["shed"] == light["measured"]["shed"] == 0
    assert heavy["predicted"]["shed"] > 0.2
    ratio = heavy["measured"]["answered_per_s"] / heavy["predicted"]["answered_per_s"]
    assert 0.3 < ratio < 1.5  # a busy machine may take its share
    assert found["replicas"]["least-connections"]["ratio"] > 1.7


def test_an_adapter_is_replaced_under_traffic_without_a_failed_or_wrong_answer(
    tmp_path: Path,
) -> None:
    output = tmp_path / "hot-swap.json"
    hot_swap.main(["--fake", "--cycles", "6", "--clients", "3", "--output", str(output)])
    found = verdicts(output)
    for name in ("cycles", "failed requests", "wrong-revision answers"):
        assert found[name]["passed"], json.loads(output.read_text())
    assert len(json.loads(output.read_text())["revisions"]) == 2


def test_a_revision_counts_only_while_it_was_published() -> None:
    """The judge of the hot swap can tell a wrong answer: it is no test that cannot fail."""
    published = hot_swap.Published()
    published.allow("name", "old")
    published.end("name", "old")
    published.allow("name", "new")
    (old,), (new,) = published.spans["name"].values()
    before, during, after = ((at_s, 0.0) for at_s in (old[0] - 1, old[0], new[0] + 1))

    def fits(revision: str, sent: tuple[float, float]) -> bool:
        return published.fits("name", revision, hot_swap.Reply(200, *sent))

    assert not fits("old", before)
    assert fits("old", during)
    assert not fits("old", after)
    assert fits("new", after)
    assert not fits("new", before)


def test_steady_load_keeps_no_objects(tmp_path: Path) -> None:
    output = tmp_path / "soak.json"
    options = f"--fake {PACE} --minutes 0.03 --load 0.5 --capacity-seconds 0.6 --clients 4"
    command = [sys.executable, "-m", "benchmarks.serving.soak", *options.split()]
    # a process of its own: it counts all objects there are
    command += ["--objects", "250", "--output", str(output)]
    subprocess.run(command, cwd=Path(__file__).parents[2], check=False, timeout=300)
    found = verdicts(output)
    for name in ("failed requests", "more open files", "objects kept per request"):
        assert found[name]["passed"], found[name]


def test_the_targets_are_measured(tmp_path: Path) -> None:
    output = tmp_path / "targets.json"
    options = f"--fake {PACE} --block-rows 24 --clients 8 --repeats 1 --single 5 --starts 0"
    targets.main([*options.split(), "--idle-seconds", "0.2", "--output", str(output)])
    found = json.loads(output.read_text())
    assert found["added_latency"]["p50_ms"] > 0
    assert found["rates"]["server_rows_per_s"][0] > 0
    assert set(verdicts(output)) == {
        "added latency p50, ms",
        "start to ready, s",
        "idle CPU, %",
    }


def test_the_fuzzer_reports_cases_and_failures(tmp_path: Path) -> None:
    output = tmp_path / "fuzz.json"
    options = ["--cases", "300", "--seed", "9", "--only", "traceparent"]
    assert fuzz.main([*options, "--output", str(output)]) == 0
    found = json.loads(output.read_text())
    assert sum(target["cases"] for target in found["targets"].values()) >= 300
    assert all(target["num_failures"] == 0 for target in found["targets"].values())


def test_two_replicas_are_replaced_behind_a_proxy_without_a_failed_request(tmp_path: Path) -> None:
    require_or_skip("haproxy", rolling.find_haproxy())
    output = tmp_path / "rolling.json"
    options = f"--fake {PACE} --minutes 0.4 --rate 20 --pause 0.5 --reserve 8"
    rolling.main([*options.split(), "--output", str(output)])
    found = verdicts(output)
    for name in (
        "failed requests",
        "requests sent while one was replaced",
        "servers that did not exit 0",
    ):
        assert found[name]["passed"], output.read_text()
    # how many fit into the time is the machine's affair
    assert found["replacements under load"]["found"] >= 1


def test_a_replica_that_does_not_drain_is_found_out() -> None:
    """The judge of the replacement can fail: a refused request, and one that ended badly."""
    found: dict[str, Any] = {
        "answers": {"200": 99, "503": 1},
        "replacements": [{"exit_code": 0}, {"exit_code": -9}],
        "latency": {"replacing": {"requests": 10}},
        "answers_after_replacement": {"a": 3, "b": 0},
    }
    failed = {verdict.name for verdict in rolling.judge(found) if not verdict.passed}
    assert failed == {
        "failed requests",
        "servers that did not exit 0",
        "fewest answers of a new server",
    }
