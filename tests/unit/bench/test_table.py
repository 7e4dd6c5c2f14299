"""What a person sees of a bench."""

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from dalorra_core.bench.grid import Cell, EvaluationSettings
from dalorra_core.bench.keys import Job, Planned
from dalorra_core.bench.store import Evaluation, Interval, Record, run_directory
from dalorra_core.bench.table import Board
from dalorra_core.training.settings import TrainConfig

CONFIG = TrainConfig.model_validate({"name": "a", "data": {"source": "x"}, "optim": {"steps": 50}})


def job(key: str, label: str = "A", seed: int = 1) -> Job:
    cell = Cell(label, "sst2", seed, CONFIG, False, ())
    return Job(key, cell, EvaluationSettings(), (), {}, {})


def record(key: str, *, error: str | None = None) -> Record:
    numbers = {"accuracy": 0.75, "nll": 0.5, "ece": None}
    evaluation = Evaluation(
        id="1",
        set="in",
        predictive="monte_carlo",
        num_samples=1,
        tempered=False,
        temperature=1.0,
        fit=None,
        rows=4,
        truncated=0,
        seconds=0.1,
        metrics={n: Interval(value=v, low=None, high=None) for n, v in numbers.items()},
        ece_noise_floor=None,
        scores="s",
        scores_sha256="0",
    )
    return Record(
        key=key,
        label="A",
        task="sst2",
        seed=1,
        status="failed" if error else "done",
        error=error,
        settings={},
        sizes={},
        evaluations=() if error else (evaluation,),
    )


def board(out: Path, jobs: list[Job], *, terminal: bool) -> tuple[Board, io.StringIO]:
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=terminal, width=100, color_system=None)
    planned = [Planned(one.cell, one.key, ("1",)) for one in jobs]
    return Board(planned, {}, out, len(jobs), console), stream


def test_a_log_has_one_line_for_each_event(tmp_path: Path) -> None:
    one, two = job("k1"), job("k2", "B", 2)
    shown, stream = board(tmp_path, [one, two], terminal=False)
    with shown:
        shown.started(one, "cpu")
        shown.note(one, "scoring in: 4 rows")
        shown.tick()
        shown.ended(one, record("k1"))
        shown.started(two, "cuda:1")
        shown.ended(two, record("k2", error="DataError: no [rows]\nand more"))
    assert stream.getvalue().splitlines() == [
        "A / sst2 / seed 1 begins on cpu (k1)",
        "A / sst2 / seed 1: scoring in: 4 rows",
        "[1/2] A / sst2 / seed 1: done  accuracy 0.7500  nll 0.5000 (0:00:00)",
        "B / sst2 / seed 2 begins on cuda:1 (k2)",
        "[2/2] B / sst2 / seed 2: FAILED: DataError: no [rows] (0:00:00)",
    ]


def test_a_terminal_shows_cells_runs_at_work_and_time_left(tmp_path: Path) -> None:
    jobs = [job("k1"), job("k2", seed=2), job("k3", "B"), job("k4", "B", 2)]
    shown, stream = board(tmp_path, jobs, terminal=True)
    training = run_directory(tmp_path, "k3") / "training" / "member-1"
    training.mkdir(parents=True)
    lines = [json.dumps({"step": 10}), json.dumps({"step": 20, "loss": 1.0})]
    (training / "metrics.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    with shown:
        for one in jobs[:2]:
            shown.started(one, "cpu")
        shown.ended(jobs[0], record("k1"))
        shown.ended(jobs[1], record("k2", error="DataError: x"))
        shown.started(jobs[2], "cuda:0")
        shown.note(jobs[2], "training")
        shown.tick()
    text = stream.getvalue()
    assert "cuda:0 B / sst2 / seed 1" in text
    assert "step 20/50  training" in text
    last = text[text.rindex("sst2 ┃") :] if "sst2 ┃" in text else text
    assert "1/2 1 failed" in last
    assert "0/2" in last
    assert "2 of 4 runs" in last
    assert "left" in last


@pytest.mark.parametrize("content", ["", '{"step": 1', "[1]\n", '{"validation": {}}\n'])
def test_a_training_log_that_says_no_step_is_no_trouble(tmp_path: Path, content: str) -> None:
    training = run_directory(tmp_path, "k1") / "training"
    training.mkdir(parents=True)
    (training / "metrics.jsonl").write_text(content, encoding="utf-8")
    shown, stream = board(tmp_path, [job("k1")], terminal=True)
    with shown:
        shown.started(job("k1"), "cpu")
        shown.tick()
    assert "step" not in stream.getvalue()


def test_a_cell_is_done_that_wants_nothing_of_what_failed(tmp_path: Path) -> None:
    plain, tempered = job("k1", "MLE"), job("k1", "MLE+T")
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=100, color_system=None)
    half = record("k1").model_copy(update={"status": "failed", "error": "x"})
    planned = [Planned(plain.cell, "k1", ("1",)), Planned(tempered.cell, "k1", ("2",))]
    with Board(planned, {"k1": half}, tmp_path, 0, console):
        pass
    lines = {
        words[1]: words for line in stream.getvalue().splitlines() if (words := line.split())[1:]
    }
    assert lines["MLE"][3:] == ["1/1", "│"]
    assert lines["MLE+T"][3:] == ["0/1", "1", "failed", "│"]
