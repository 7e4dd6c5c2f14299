"""Which devices a bench works on."""

import io
from pathlib import Path

import pytest
import torch
from rich.console import Console

from dalorra_core.bench import workers as workers_module
from dalorra_core.bench.grid import Cell, EvaluationSettings
from dalorra_core.bench.keys import Job
from dalorra_core.bench.table import Board
from dalorra_core.bench.workers import devices_of, run_in_workers
from dalorra_core.errors import ConfigError
from dalorra_core.training.settings import TrainConfig


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.mark.usefixtures("two_gpus")
@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ("auto", ("cuda", ("cuda:0", "cuda:1"))),
        ("cuda", ("cuda", ("cuda:0", "cuda:1"))),
        ("cuda:1", ("cuda", ("cuda:1",))),
        ("cuda:1,cuda:0", ("cuda", ("cuda:1", "cuda:0"))),
        ("cpu", ("cpu", ("cpu",))),
    ],
)
def test_auto_and_cuda_are_all_gpus(asked: str, expected: object) -> None:
    assert devices_of(asked) == expected


@pytest.mark.usefixtures("no_gpu")
def test_auto_is_the_cpu_where_there_is_no_gpu() -> None:
    assert devices_of("auto") == ("cpu", ("cpu",))
    with pytest.raises(ConfigError, match="sees no CUDA"):
        devices_of("cuda")


@pytest.mark.usefixtures("two_gpus")
@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ("cuda:2", "some of cuda:0, cuda:1, each once, got 'cuda:2'"),
        ("cuda:x", "got 'cuda:x'"),
        ("cuda:0,cuda", "got 'cuda:0,cuda'"),
        ("cuda:0,cuda:0", "each once"),
        ("cuda:0,cpu", "some of cuda:0, cuda:1"),
        ("cpu,cuda:0", "some of cuda:0, cuda:1"),
        ("tpu", "auto, cpu, cuda or cuda:N, got 'tpu'"),
        ("", "got ''"),
    ],
)
def test_other_devices_are_refused(asked: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        devices_of(asked)


@pytest.mark.parametrize("runs", [0, 1, 2])
def test_threads_do_not_depend_on_how_many_runs_are_left(
    runs: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Numbers of threads change last digits: the last run must be like the others."""
    made: list[object] = []

    class Idle:
        job = None

        def __init__(self, *arguments: object) -> None:
            made.append(arguments[-1])

        def start(self, job: object, listener: object) -> None:
            """Do nothing."""

        def stop(self) -> None:
            """Do nothing."""

    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    monkeypatch.setattr(workers_module, "_Worker", Idle)
    config = TrainConfig.model_validate({"name": "a", "data": {"source": "x"}})
    job = Job("k", Cell("A", "t", 1, config, False, ()), EvaluationSettings(), (), {}, {})
    shown = Board([], {}, tmp_path, 0, Console(file=io.StringIO()))
    run_in_workers([job] * runs, tmp_path, shown, devices=("cpu",) * 4)
    assert made == [2] * runs
