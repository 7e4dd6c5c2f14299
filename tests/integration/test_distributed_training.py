"""Real processes that train one adapter together, on the CPU, against one process that does not."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from dalorra_core.artifact.store import load_artifact
from dalorra_core.training.run import run_training
from dalorra_core.training.settings import TrainConfig
from tests.support.tiny_tasks import TinyTask, tiny_config

ROOT = Path(__file__).parents[2]
LIMIT_S = 900

METHODS: dict[str, dict[str, Any]] = {
    "dalorra": {"name": "dalorra", "mask_lr": 3e-2, "num_train_samples": 2},
    "mc_dropout": {"name": "mc_dropout", "drop_prob": 0.3},
    "c_lora": {"name": "c_lora"},
    "blob": {"name": "blob"},
    "amortised_token": {"name": "amortised_token"},
    "ensemble": {"name": "ensemble", "num_members": 2},
}
"""One of each kind: masks, noise of rows, noise and divergence of tokens, two optimisers."""

EPOCH = {"batch_size": 3, "gradient_accumulation": 2, "steps": 11, "eps": 1e-3}
"""64 rows are 21 batches of 3, which no two processes can halve, and one of a single row."""


def settings(task: TinyTask, method: str = "dalorra", **groups: Any) -> TrainConfig:
    """Return a short run; eps keeps Adam from making much of the rounding of small gradients."""
    run = {"checkpoint_every": 100, "eval_every": 100} | groups.pop("run", {})
    return tiny_config(task, method=METHODS[method], optim=EPOCH, run=run, **groups)


def alone(config: TrainConfig, folder: Path, **options: Any) -> dict[str, Tensor]:
    """Train in this process and return the adapter's parameters, before they are rounded."""
    run_training(config, folder / "out", folder, overwrite=True, report=lambda _: None, **options)
    return newest(folder)


def newest(folder: Path) -> dict[str, Tensor]:
    """Return the parameters of the last step; of an ensemble, those of all members."""
    found: dict[str, Tensor] = {}
    for path in sorted(folder.rglob("step-00000011/params.safetensors")):
        where = path.parents[2].name
        found |= {f"{where}/{name}": value for name, value in load_file(path).items()}
    return {name.removeprefix(f"{folder.name}/"): value for name, value in found.items()}


def launched(command: Sequence[str], **environment: str) -> subprocess.Popen[str]:
    """Start a process as a launcher does."""
    plain = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PATH": "", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=plain | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,  # so that a launcher's own processes can be ended with it
    )


def free_port() -> str:
    """Return a port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def together(jobs: Sequence[dict[str, Any]]) -> list[tuple[int, str]]:
    """Do jobs in two processes; return how each ended and what it printed."""
    command = [sys.executable, "-m", "tests.support.train_together"]
    port = free_port()
    processes = [
        launched(
            [*command, str(rank), json.dumps(jobs)],
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            WORLD_SIZE="2",
            LOCAL_WORLD_SIZE="2",
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=port,
        )
        for rank in range(2)
    ]
    return [ended(process) for process in processes]


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Wait for a process and return its exit status and output; past the limit it is killed."""
    try:
        output, _ = process.communicate(timeout=LIMIT_S)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        pytest.fail(f"still running after {LIMIT_S} s:\n{output}")
    return process.returncode, output


def assert_near(
    found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-6
) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=tolerance, atol=tolerance)


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> TinyTask:
    return TinyTask(tmp_path_factory.mktemp("task"), "text")


@pytest.fixture(scope="module")
def runs(task: TinyTask, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of runs: NAME-1 by one process, NAME-2 by two, and some with a history."""
    folder = tmp_path_factory.mktemp("runs")
    jobs: list[dict[str, Any]] = []

    def by_two(name: str, config: TrainConfig, **more: Any) -> None:
        values = config.model_dump(mode="json")
        jobs.append({"config": values, "run": str(folder / name), **more})

    for method in METHODS:
        alone(settings(task, method), folder / f"{method}-1")
        by_two(f"{method}-2", settings(task, method))
    often = settings(task, run={"checkpoint_every": 5})
    alone(often, folder / "one-then-two")
    shutil.rmtree(folder / "one-then-two" / "checkpoints" / "step-00000011")
    by_two("one-then-two", often, resume=True)
    by_two("two-then-one", often)
    other = settings(task, data={"max_tokens": 200}).model_dump(mode="json")
    by_two("unlike", settings(task), rank_1=other)
    for status, output in together(jobs):
        assert status == 0, output
    return folder


@pytest.mark.parametrize("method", METHODS)
def test_two_processes_take_the_steps_of_one(runs: Path, method: str) -> None:
    one, two = newest(runs / f"{method}-1"), newest(runs / f"{method}-2")
    assert_near(two, one, 5e-6)  # eleven steps of rounding; they move lora_B by 0.1
    assert max(float(v.abs().max()) for k, v in one.items() if k.endswith("lora_B")) > 1e-3


@pytest.mark.parametrize("method", METHODS)
def test_both_processes_have_the_same_bits(runs: Path, method: str) -> None:
    first, second = (load_file(runs / f"{method}-2" / f"params-{k}.safetensors") for k in (0, 1))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_run_goes_on_with_another_number_of_processes(runs: Path, task: TinyTask) -> None:
    expected = newest(runs / "dalorra-1")
    assert_near(newest(runs / "one-then-two"), expected)
    made = load_artifact(runs / "one-then-two" / "out").manifest.provenance
    assert made["resumed_at"] == 10
    shutil.rmtree(runs / "two-then-one" / "checkpoints" / "step-00000011")
    often = settings(task, run={"checkpoint_every": 5})
    assert_near(alone(often, runs / "two-then-one", resume=True), expected)
    made = load_artifact(runs / "two-then-one" / "out").manifest.provenance
    assert made["resumed_at"] == 10


def test_the_first_process_alone_writes_and_the_log_is_of_all_rows(runs: Path) -> None:
    logs = [
        [json.loads(line) for line in (runs / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("dalorra-1", "dalorra-2")
    ]
    assert [line["step"] for line in logs[1]] == [10, 11, 11]  # the last one is the evaluation
    for one, two in zip(*logs, strict=True):
        assert one.keys() == two.keys()
        for name in one.keys() & {"loss", "nll", "mask_kl", "keep_prob"}:
            assert two[name] == pytest.approx(one[name], rel=1e-5)
    one, two = (load_artifact(runs / f"dalorra-{k}" / "out") for k in (1, 2))
    assert one.manifest.policies[0].accept == pytest.approx(two.manifest.policies[0].accept)
    assert len(two.manifest.golden) == 4


def test_processes_with_unlike_settings_do_not_begin(runs: Path) -> None:
    for rank in range(2):
        said = (runs / "unlike" / f"error-{rank}.txt").read_text()
        assert said.startswith("ConfigError: the 2 processes must train one run: they differ in")
        assert "differ in data." in said
    assert not (runs / "unlike" / "checkpoints").exists()


def test_a_process_that_dies_ends_the_others(task: TinyTask, tmp_path: Path) -> None:
    config = settings(task).model_dump(mode="json")
    (_, _), (killed, _) = together([{"config": config, "run": str(tmp_path), "dies_at": 4}])
    assert killed == -signal.SIGKILL
    said = (tmp_path / "error-0.txt").read_text()
    assert said.startswith("DalorraError: process 0 of 2 lost another one")
    assert not (tmp_path / "out").exists()


LAUNCHERS = {
    "torchrun": "torch.distributed.run --nproc-per-node 2 --master-port",
    # which starts several processes on GPUs only
    "accelerate": "accelerate.commands.launch --cpu --num_processes 1 --num_machines 1 "
    "--mixed_precision bf16 --main_process_port",
}


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_the_command_runs_under_a_launcher(launcher: str, task: TinyTask, tmp_path: Path) -> None:
    """What a launcher says of precision and accumulation does not win over the configuration."""
    script, config = tmp_path / "dalorra.py", tmp_path / "run.json"
    script.write_text("from server.cli import main\n\nmain()\n")
    config.write_text(settings(task).model_dump_json())
    where = ["-o", str(tmp_path / "out"), "--run-dir", str(tmp_path / "run")]
    command = [sys.executable, "-m", *LAUNCHERS[launcher].split(), free_port(), str(script)]
    status, output = ended(
        launched(
            [*command, "train", "-c", str(config), *where],
            ACCELERATE_GRADIENT_ACCUMULATION_STEPS="1",
        )
    )
    assert status == 0, output
    assert output.count("; try: dalorra inspect") == 1
    assert_near(newest(tmp_path / "run"), alone(settings(task), tmp_path / "alone"))
