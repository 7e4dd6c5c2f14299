"""Two real processes that hold half of the base model each, against one that holds all of it."""

import json
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from dalorra_core.artifact.store import load_artifact
from dalorra_core.predictive.predictor import Predictor
from dalorra_core.training.settings import TrainConfig
from tests.integration.test_distributed_training import (
    EPOCH,
    LAUNCHERS,
    METHODS,
    alone,
    assert_near,
    ended,
    free_port,
    launched,
    newest,
    together,
)
from tests.support.tiny_models import FAMILIES
from tests.support.tiny_tasks import TinyTask, tiny_config

pytestmark = pytest.mark.skipif(
    not hasattr(torch.cpu.Stream, "record_event"), reason="torch 2.6 gathers on GPUs only"
)

CASES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {"method": METHODS["mc_dropout"]},
    "gemma2": {"method": METHODS["blob"]},
    "gemma3": {"method": METHODS["amortised_token"]},
    "first_layer_frozen": {"adapter": {"layers": [1, 1]}},  # states below it are kept
    "recompute": {"run": {"recompute": True}, "method": {"name": "amortised_prompt"}},
    "bfloat16": {"run": {"precision": "bfloat16", "attention": "eager"}},  # loaded twice more
    "ensemble": {"method": METHODS["ensemble"]},
    "laplace": {"method": {"name": "laplace"}},
    "tfb": {"method": {"name": "tfb", "anchor_rows": 8}},
}
"""Each does something else with the base: other passes, other layers, passes after training."""


def config(task: TinyTask, *, sharded: bool, **groups: Any) -> TrainConfig:
    """Return a run of an epoch, with evaluations in the middle."""
    run = {"eval_every": 4, "checkpoint_every": 5, "shard_base": sharded, **groups.pop("run", {})}
    method = groups.pop("method", METHODS["dalorra"])
    return tiny_config(task, optim=EPOCH, run=run, method=method, **groups)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, TinyTask]:
    return {name: TinyTask(tmp_path_factory.mktemp(name), "text", name) for name in FAMILIES}


@pytest.fixture(scope="module")
def runs(tasks: dict[str, TinyTask], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of runs by two processes: NAME-whole, NAME-sharded, some with a history."""
    folder = tmp_path_factory.mktemp("runs")
    jobs: list[dict[str, Any]] = []

    def by_two(name: str, settings: TrainConfig, **more: Any) -> None:
        values = settings.model_dump(mode="json")
        jobs.append({"config": values, "run": str(folder / name), **more})

    for name, groups in CASES.items():
        task = tasks.get(name, tasks["llama"])
        for kind, sharded in (("whole", False), ("sharded", True)):
            by_two(f"{name}-{kind}", config(task, sharded=sharded, **groups))
    alone(config(tasks["llama"], sharded=True), folder / "one")  # which one process ignores
    shutil.copytree(folder / "one", folder / "one-then-two")
    shutil.rmtree(folder / "one-then-two" / "checkpoints" / "step-00000011")
    by_two("one-then-two", config(tasks["llama"], sharded=True), resume=True)
    by_two("watched", config(tasks["llama"], sharded=True), watched=True)
    other = config(tasks["llama"], sharded=False).model_dump(mode="json")
    by_two("unlike", config(tasks["llama"], sharded=True), rank_1=other)
    for status, output in together(jobs):
        assert status == 0, output
    return folder


@pytest.mark.parametrize("case", CASES)
def test_two_halves_give_the_numbers_of_two_wholes(runs: Path, case: str) -> None:
    whole, sharded = newest(runs / f"{case}-whole"), newest(runs / f"{case}-sharded")
    assert whole.keys() == sharded.keys()
    assert all(torch.equal(sharded[name], value) for name, value in whole.items())
    one, other = (load_artifact(runs / f"{case}-{kind}" / "out") for kind in ("whole", "sharded"))
    assert one.tensors.keys() == other.tensors.keys()
    assert all(torch.equal(other.tensors[name], value) for name, value in one.tensors.items())
    assert other.manifest.golden == one.manifest.golden
    said = [
        [line for line in read_log(runs / f"{case}-{kind}") if "validation" in line]
        for kind in ("whole", "sharded")
    ]
    assert said[0] == said[1]
    assert len(said[0]) >= 3


def read_log(folder: Path) -> list[dict[str, Any]]:
    lines = [p.read_text().splitlines() for p in sorted(folder.rglob("metrics.jsonl"))]
    return [json.loads(line) for member in lines for line in member]


@pytest.mark.parametrize("case", CASES)
def test_each_process_holds_half_of_the_layers(runs: Path, case: str) -> None:
    for rank in range(2):
        held = json.loads((runs / f"{case}-sharded" / f"base-{rank}.json").read_text())
        assert held["here"] * 2 == held["whole"]
        assert held["gathered"] == 0
        held = json.loads((runs / f"{case}-whole" / f"base-{rank}.json").read_text())
        assert held["here"] == held["whole"]
        assert held["gathered"] == 6  # three of each layer's MLP


def test_one_layer_is_whole_at_a_time_forward_and_backward(runs: Path) -> None:
    for rank in range(2):
        held = json.loads((runs / "watched" / f"base-{rank}.json").read_text())
        assert held["in_passes"] == [3]


def test_two_processes_take_the_steps_of_one(runs: Path) -> None:
    assert_near(newest(runs / "llama-sharded"), newest(runs / "one"), 5e-6)


def test_a_run_goes_on_with_and_without_halves(runs: Path, tasks: dict[str, TinyTask]) -> None:
    expected = newest(runs / "one")
    assert_near(newest(runs / "one-then-two"), expected)
    folder = shutil.copytree(runs / "llama-sharded", runs / "two-then-one")
    shutil.rmtree(folder / "checkpoints" / "step-00000011")
    assert_near(alone(config(tasks["llama"], sharded=False), folder, resume=True), expected)
    for name in ("one-then-two", "two-then-one"):
        assert load_artifact(runs / name / "out").manifest.provenance["resumed_at"] == 10


def test_a_process_that_holds_all_does_not_begin_beside_one_that_holds_half(runs: Path) -> None:
    for rank in range(2):
        said = (runs / "unlike" / f"error-{rank}.txt").read_text()
        assert said.startswith("ConfigError: the 2 processes must train one run: they differ in")
        assert "differ in run.shard_base, validation_rows." in said


def test_a_process_that_dies_in_the_middle_of_a_pass_ends_the_others(
    tasks: dict[str, TinyTask], tmp_path: Path
) -> None:
    settings = config(tasks["llama"], sharded=True).model_dump(mode="json")
    job = {"config": settings, "run": str(tmp_path), "dies_at": 4}
    (status, said), (killed, _) = together([job])
    assert (status, killed) == (1, -signal.SIGKILL)
    assert "all_gather" in said  # where torch noticed
    assert not (tmp_path / "out").exists()


def test_the_command_runs_under_a_launcher(tasks: dict[str, TinyTask], tmp_path: Path) -> None:
    script, settings = tmp_path / "dalorra.py", tmp_path / "run.json"
    script.write_text("from server.cli import main\n\nmain()\n")
    settings.write_text(config(tasks["llama"], sharded=False).model_dump_json())
    launcher = [sys.executable, "-m", *LAUNCHERS["torchrun"].split(), free_port(), str(script)]
    where = ["-o", str(tmp_path / "out"), "--run-dir", str(tmp_path / "run")]
    command = ["train", "-c", str(settings), "-s", "run.shard_base=true", *where]
    status, output = ended(launched([*launcher, *command]))
    assert status == 0, output
    assert output.count("; try: dalorra inspect") == 1
    made: Any = load_artifact(tmp_path / "out").manifest.provenance["config"]
    assert made["run"]["shard_base"] is True
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [
        "checkpoints",
        "metrics.jsonl",
    ]


def test_a_server_reproduces_what_halves_answered(runs: Path, tasks: dict[str, TinyTask]) -> None:
    predictor = Predictor.load(runs / "bfloat16-sharded" / "out", base=str(tasks["llama"].base))
    assert predictor.self_test() < 1e-5
