"""Records, results and scores: what is not whole is refused."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from dalorra_core.bench.grid import Cell
from dalorra_core.bench.keys import Planned
from dalorra_core.bench.store import (
    Evaluation,
    Interval,
    Record,
    Scores,
    hold,
    read_record,
    read_results,
    read_scores,
    run_directory,
    with_sound_scores,
    write_record,
    write_results,
    write_scores,
)
from dalorra_core.errors import ConfigError, DataError
from dalorra_core.training.settings import TrainConfig

KEY = "0123456789abcdef"
CONFIG = TrainConfig.model_validate({"name": "a", "data": {"source": "x"}})


def evaluation(name: str, **changes: Any) -> Evaluation:
    values: dict[str, Any] = {
        "id": name,
        "set": "in",
        "predictive": "monte_carlo",
        "num_samples": 3,
        "tempered": False,
        "temperature": 1.0,
        "fit": None,
        "rows": 4,
        "truncated": 0,
        "seconds": 0.1,
        "metrics": {"nll": Interval(value=0.5, low=0.4, high=None)},
        "ece_noise_floor": (0.1, 0.02),
        "scores": f"scores-{name}.safetensors",
        "scores_sha256": "00",
    }
    return Evaluation.model_validate(values | changes)


def record(key: str = KEY, **changes: Any) -> Record:
    values = {
        "key": key,
        "label": "A",
        "task": "sst2",
        "seed": 1,
        "status": "done",
        "settings": {},
        "sizes": {"train": 3},
        "evaluations": (evaluation("one"), evaluation("two", tempered=True)),
    }
    return Record(**(values | changes))


def planned(label: str, *wanted: str, key: str = KEY) -> Planned:
    return Planned(Cell(label, "t", 7, CONFIG, False, ()), key, wanted)


def test_a_record_comes_back_as_it_was_written(tmp_path: Path) -> None:
    run_directory(tmp_path, KEY).mkdir(parents=True)
    assert read_record(tmp_path, KEY) is None
    write_record(tmp_path, record())
    assert read_record(tmp_path, KEY) == record()


def test_a_record_cut_anywhere_is_refused_with_its_file_and_line(tmp_path: Path) -> None:
    directory = run_directory(tmp_path, KEY)
    directory.mkdir(parents=True)
    write_record(tmp_path, record())
    path = directory / "record.json"
    whole = path.read_bytes()
    for size in range(0, len(whole.rstrip()), 37):
        path.write_bytes(whole[:size])
        with pytest.raises(DataError, match=r"record\.json, line \d+"):
            read_record(tmp_path, KEY)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('"format": 1', '"format": 2', "format"),
        ('"seed": 1', '"seed": "x"', "seed"),
        ('"status": "done"', '"status": "fine"', "status"),
        ('"status": "done"', '"stadus": "done"', "status"),
        ('"temperature": 1.0', '"temperature": NaN', "temperature"),
        (f'"key": "{KEY}"', '"key": "ffff"', "key must be"),
    ],
)
def test_a_changed_record_is_refused(tmp_path: Path, old: str, new: str, said: str) -> None:
    directory = run_directory(tmp_path, KEY)
    directory.mkdir(parents=True)
    write_record(tmp_path, record())
    path = directory / "record.json"
    path.write_text(path.read_text().replace(old, new, 1))
    with pytest.raises(DataError, match=said):
        read_record(tmp_path, KEY)


def test_a_cell_sees_its_own_evaluations_and_paths_from_the_benchs_directory(
    tmp_path: Path,
) -> None:
    cells = [planned("A", "one"), planned("A+T", "two"), planned("B", "one", key="absent")]
    write_results(tmp_path, cells, {KEY: record()})
    one, two = read_results(tmp_path)
    assert [(r.label, r.task, r.seed, r.line, r.lines) for r in (one, two)] == [
        ("A", "t", 7, 1, 2),
        ("A+T", "t", 7, 2, 2),
    ]
    assert [[e.id for e in r.evaluations] for r in (one, two)] == [["one"], ["two"]]
    assert one.evaluations[0].scores == f"runs/{KEY}/scores-one.safetensors"


def test_results_cut_anywhere_are_refused(tmp_path: Path) -> None:
    path = write_results(tmp_path, [planned("A", "one"), planned("B", "two")], {KEY: record()})
    whole = path.read_bytes()
    lines = whole.splitlines(keepends=True)
    for size in [0, *range(1, len(whole) - 1, 101), len(lines[0])]:
        path.write_bytes(whole[:size])
        with pytest.raises(DataError, match=r"results\.jsonl, line [12]"):
            read_results(tmp_path)
    path.write_bytes(lines[1])  # the first line is gone
    with pytest.raises(DataError, match="line 1: says it is line 2 of 2"):
        read_results(tmp_path)
    path.write_bytes(whole.replace(b'"seed": 7', b'"seed": "7x"', 1))
    with pytest.raises(DataError, match="line 1: seed"):
        read_results(tmp_path)
    path.write_bytes(whole.replace(b'"value": 0.5', b'"value": 0.4', 1))
    with pytest.raises(DataError, match="line 1: was changed: its sha256"):
        read_results(tmp_path)


def test_a_cell_is_done_when_all_that_it_wants_is_there(tmp_path: Path) -> None:
    half = record(status="failed", error="DataError: x", evaluations=(evaluation("one"),))
    cells = [planned("A", "one"), planned("A+T", "one", "two")]
    write_results(tmp_path, cells, {KEY: half})
    assert [(r.status, r.error) for r in read_results(tmp_path)] == [
        ("done", None),
        ("failed", "DataError: x"),
    ]
    write_results(tmp_path, cells, {KEY: half.model_copy(update={"status": "done", "error": None})})
    done, left = read_results(tmp_path)
    assert (done.status, left.status) == ("done", "failed")
    assert left.error is not None
    assert "1 of 2 evaluations are missing" in left.error


def test_evaluations_without_their_scores_are_dropped(tmp_path: Path) -> None:
    directory = run_directory(tmp_path, KEY)
    directory.mkdir(parents=True)
    known = [
        evaluation(
            name, scores_sha256=write_scores(directory / f"scores-{name}.safetensors", scores())
        )
        for name in ("one", "two", "three")
    ]
    whole = record(evaluations=tuple(known))
    assert with_sound_scores(tmp_path, whole) == (whole, [])
    (directory / known[0].scores).unlink()
    file = directory / known[2].scores
    file.write_bytes(file.read_bytes()[:-1])
    left, faults = with_sound_scores(tmp_path, whole)
    assert left.evaluations == (known[1],)
    assert "scores-one.safetensors cannot be read" in faults[0]
    assert "scores-three.safetensors has sha256" in faults[1]


def test_a_directory_without_results_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="OUT must be the --output"):
        read_results(tmp_path)


def scores() -> Scores:
    log_mean = torch.tensor([[0.5, 0.5, 0.0], [0.1, 0.2, 0.7]]).log()
    confidence = {"confidence": torch.tensor([0.5, 0.7])}
    return Scores(("a", "é"), torch.tensor([1, -1]), log_mean, confidence, torch.tensor([0, 0]))


def test_scores_come_back_and_a_changed_file_is_refused(tmp_path: Path) -> None:
    path, written = tmp_path / "scores.safetensors", scores()
    digest = write_scores(path, written)
    assert write_scores(path, written) == digest  # the same bytes
    found = read_scores(path, digest)
    assert found.ids == written.ids
    torch.testing.assert_close(found.labels, written.labels, rtol=0, atol=0)
    torch.testing.assert_close(found.groups, written.groups, rtol=0, atol=0)
    torch.testing.assert_close(found.log_mean_probs, written.log_mean_probs, rtol=0, atol=0)
    torch.testing.assert_close(dict(found.scores), dict(written.scores), rtol=0, atol=0)
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(DataError, match="sha256"):
        read_scores(path, digest)
    path.unlink()
    with pytest.raises(DataError, match="cannot be read"):
        read_scores(path, digest)


def test_a_directory_is_held_by_one_process_and_free_when_that_dies(tmp_path: Path) -> None:
    program = (
        "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.flock(f, fcntl.LOCK_EX); "
        "print('held', flush=True); sys.stdin.read()"
    )
    (tmp_path / ".lock").touch()
    with subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path / ".lock")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with (
            pytest.raises(ConfigError, match="another process works in"),
            hold(tmp_path, wait=False),
        ):
            pytest.fail("held twice")
        other.kill()
        other.wait()
    with hold(tmp_path, wait=False):
        pass
