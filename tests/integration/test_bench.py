"""A bench from grid to results: every run once, whatever ends the process, whatever fails."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import minimize_scalar
from typer.testing import CliRunner
from typer.testing import Result as CliResult

from dalorra_core.artifact.store import load_artifact
from dalorra_core.bench import runs as runs_module
from dalorra_core.bench.grid import cells, read_grid
from dalorra_core.bench.keys import Job, plan_jobs
from dalorra_core.bench.store import (
    Record,
    Result,
    hold,
    read_record,
    read_results,
    read_scores,
    write_record,
)
from dalorra_core.bench.workers import run_in_workers
from dalorra_core.data.readers import read_jsonl
from dalorra_core.errors import DataError
from dalorra_core.predictive.predictor import Predictor, SamplingPlan
from dalorra_core.training import loop as loop_module
from server.cli import app
from tests.support.tiny_grid import tiny_grid, tiny_root, write_grid
from tests.support.tiny_models import save_tiny_base

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PATH": ""}
PLANS = (SamplingPlan(3), SamplingPlan(estimator="mean_mask"))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_root(tmp_path_factory.mktemp("root"))


def call(*arguments: object) -> CliResult:
    return CliRunner().invoke(app, ["bench", *(str(a) for a in arguments)])


def bench(root: Path, out: Path, grid: dict[str, Any], *options: str) -> CliResult:
    """Run a grid in this process: a worker takes seconds to import torch."""
    path = write_grid(out.with_suffix(".yaml"), grid)
    asked = ("--data-root", root, "-o", out, "--device", "cpu", "--workers", "0")
    return call("run", path, *asked, *options)


@pytest.fixture(scope="module")
def finished(base: Path, root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the directory of a bench of MLE, MLE+T and DALorRA; tests only read it."""
    out = tmp_path_factory.mktemp("finished") / "out"
    ended = bench(root, out, tiny_grid(base))
    assert ended.exit_code == 0, ended.output
    return out


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> Path:
    return shutil.copytree(finished, tmp_path / "out")


@pytest.fixture
def no_training(monkeypatch: pytest.MonkeyPatch) -> None:
    def trained_again(*_: object, **__: object) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr(runs_module, "run_training", trained_again)


def by_label(out: Path) -> dict[str, Result]:
    return {result.label: result for result in read_results(out)}


def without_times(record: Record) -> dict[str, Any]:
    """Return a record as JSON, without what a clock put there."""
    values = record.model_dump(mode="json")
    values["train_seconds"] = values["provenance"]["created_at"] = None
    values.pop("sha256", None)  # of a line of the results, times and all
    for one in values["evaluations"]:
        one["seconds"] = None
    return values


def jobs_of(root: Path, folder: Path, grid: dict[str, Any]) -> list[Job]:
    checked = read_grid(write_grid(folder / "jobs.yaml", grid))
    return plan_jobs(checked, cells(checked, root, "cpu"))[0]


# --- what a finished grid says ----------------------------------------------------------------


def test_every_cell_has_a_line_with_every_set_and_predictive(finished: Path) -> None:
    results = read_results(finished)
    assert [(r.label, r.task, r.seed, r.status) for r in results] == [
        (label, "sst2", 1, "done") for label in ("MLE", "MLE+T", "DALorRA")
    ]
    for result in results:
        shown = [(e.set, e.predictive) for e in result.evaluations]
        assert shown == [(s, p) for s in ("in", "trec") for p in ("monte_carlo", "mean_mask")]
        assert [e.tempered for e in result.evaluations] == [result.label == "MLE+T"] * 4
        assert result.sizes == {"train": 48, "held_out": 16, "evaluation": 12, "trec": 12}
    mle, tempered, dalorra = results
    assert mle.key == tempered.key != dalorra.key
    assert len(list((finished / "runs").iterdir())) == 2
    assert [e.num_samples for e in dalorra.evaluations] == [3, 1, 3, 1]
    assert {e.num_samples for e in mle.evaluations} == {1}
    # q_proj and v_proj of two layers and two rows of lm_head, r = 2; a gate for each rank
    factors = 2 * 2 * ((32 + 32) + (32 + 16)) + 2 * (32 + 2)
    assert (mle.trained_parameters, mle.extra_parameters) == (factors, 0)
    assert (dalorra.trained_parameters, dalorra.extra_parameters) == (factors + 10, 10)
    assert not list(finished.glob("runs/*/training/checkpoints"))


def test_metrics_are_those_of_the_stored_scores(finished: Path) -> None:
    for result in read_results(finished):
        for one in result.evaluations:
            scores = read_scores(finished / one.scores, one.scores_sha256)
            assert len(scores.ids) == one.rows == 12
            probs = scores.log_mean_probs.double().exp().numpy()
            np.testing.assert_allclose(probs.sum(1), 1, atol=1e-6)
            if one.set == "trec":
                assert set(scores.labels.tolist()) == {-1}
                assert {name[: len("auroc_oos_")] for name in one.metrics} == {"auroc_oos_"}
                assert one.ece_noise_floor is None
                continue
            labels = scores.labels.numpy()
            found = {name: one.metrics[name].value for name in ("accuracy", "nll", "brier")}
            hit = np.eye(2)[labels]
            expected = {
                "accuracy": (probs.argmax(1) == labels).mean(),
                "nll": -np.log(probs[np.arange(12), labels]).mean(),
                "brier": ((probs - hit) ** 2).sum(1).mean(),
            }
            assert found == pytest.approx(expected, rel=1e-5)
            interval = one.metrics["nll"]
            assert interval.low is not None
            assert interval.high is not None
            assert interval.low < expected["nll"] < interval.high


def test_shifted_rows_are_told_apart_by_counting_pairs(finished: Path) -> None:
    here, there = (by_label(finished)["DALorRA"].evaluations[i] for i in (0, 2))
    inside, outside = (
        read_scores(finished / one.scores, one.scores_sha256) for one in (here, there)
    )
    for name in ("predictive_entropy", "mutual_information"):
        a, b = outside.scores[name].numpy(), inside.scores[name].numpy()
        wins = (a[:, None] > b).mean() + (a[:, None] == b).mean() / 2
        assert there.metrics[f"auroc_oos_{name}"].value == pytest.approx(wins, abs=0.01)


def served(finished: Path, label: str, base: Path) -> Predictor:
    directory = finished / "runs" / by_label(finished)[label].key / "artifact"
    return Predictor.load(directory, base=str(base), device="cpu")


def answers(predictor: Predictor, file: Path, plan: SamplingPlan) -> tuple[np.ndarray, np.ndarray]:
    """Return (M, n, C) probabilities and labels of a file's rows."""
    rows = [predictor.encode(row) for row in read_jsonl(file)]
    log_probs = predictor.predict(rows, plan, calibrated=False).log_probs
    return log_probs.double().exp().numpy(), np.array([row.label for row in rows])


def test_the_scores_are_those_of_the_adapter_as_it_would_be_served(
    finished: Path, base: Path, root: Path
) -> None:
    predictor = served(finished, "DALorRA", base)
    for one, plan in zip(by_label(finished)["DALorRA"].evaluations[:2], PLANS, strict=True):
        probs, labels = answers(predictor, root / "sst2" / "test.jsonl", plan)
        scores = read_scores(finished / one.scores, one.scores_sha256)
        stored = scores.log_mean_probs.double().exp().numpy()
        np.testing.assert_allclose(stored, probs.mean(0)[::2], atol=1e-6)  # 12 of 24, spaced
        np.testing.assert_array_equal(scores.labels.numpy(), labels[::2])
        assert scores.ids == tuple(f"test-{i}" for i in range(0, 24, 2))


def test_the_temperature_is_fitted_on_held_out_rows_and_nothing_else(
    finished: Path, base: Path, root: Path
) -> None:
    one, plain = (by_label(finished)[label].evaluations[0] for label in ("MLE+T", "MLE"))
    predictor = served(finished, "MLE+T", base)
    probs, labels = answers(predictor, root / "sst2" / "validation.jsonl", PLANS[1])

    def held_out_nll(log_t: float) -> float:
        powered = probs[0] ** np.exp(-log_t)
        return float(-np.log((powered / powered.sum(1, keepdims=True))[range(16), labels]).mean())

    best: Any = minimize_scalar(held_out_nll, bounds=(-3, 3), method="bounded")
    assert one.temperature == pytest.approx(np.exp(best.x), rel=1e-2)
    assert one.fit is not None
    assert (one.fit.n, one.fit.nll_before) == (16, pytest.approx(held_out_nll(0), rel=1e-5))
    assert one.fit.nll_after == pytest.approx(best.fun, rel=1e-5)
    before, after = (
        read_scores(finished / e.scores, e.scores_sha256).log_mean_probs.double()
        for e in (plain, one)
    )
    expected = (before / one.temperature).log_softmax(1)
    torch.testing.assert_close(after, expected, rtol=1e-4, atol=1e-5)
    assert (plain.temperature, plain.fit) == (1.0, None)


def test_the_training_loss_is_over_all_training_rows(
    finished: Path, base: Path, root: Path
) -> None:
    result = by_label(finished)["DALorRA"]
    predictor = served(finished, "DALorRA", base)
    probs, labels = answers(predictor, root / "sst2" / "train.jsonl", PLANS[0])
    expected = -np.log(probs.mean(0)[range(48), labels]).mean()
    assert (result.train_nll, result.train_nll_rows) == (pytest.approx(expected, rel=1e-5), 48)


def test_a_record_names_versions_machine_and_digests_and_no_place(
    finished: Path, base: Path, root: Path
) -> None:
    result = by_label(finished)["DALorRA"]
    artifact = load_artifact(finished / "runs" / result.key / "artifact")
    known = result.provenance
    assert {"dalorra", "torch", "python", "hardware", "device", "dtype"} <= set(known)
    digests = known["digests"]
    assert isinstance(digests, dict)
    assert set(digests) == {
        *("train", "held_out", "evaluation", "trec", "base", "tokenizer", "adapter")
    }
    assert digests["adapter"] == artifact.sha256
    assert digests["base"] == artifact.manifest.base.fingerprint
    text = (finished / "results.jsonl").read_text(encoding="utf-8")
    assert str(base.parent) not in text
    assert str(root) not in text


# --- every run once ---------------------------------------------------------------------------


@pytest.mark.usefixtures("no_training")
def test_a_finished_grid_has_nothing_to_do(copied: Path, root: Path, base: Path) -> None:
    before = {p: p.read_bytes() for p in copied.rglob("*") if p.is_file()}
    ended = bench(root, copied, tiny_grid(base))
    assert ended.exit_code == 0, ended.output
    assert "begins" not in ended.output
    assert {p: p.read_bytes() for p in copied.rglob("*") if p.is_file()} == before


@pytest.mark.usefixtures("no_training")
def test_runs_of_several_machines_are_put_together_by_copying_them(
    finished: Path, root: Path, base: Path, tmp_path: Path
) -> None:
    for run in (finished / "runs").iterdir():
        shutil.copytree(run, tmp_path / "out" / "runs" / run.name)
    ended = bench(root, tmp_path / "out", tiny_grid(base))
    assert ended.exit_code == 0, ended.output
    results = "results.jsonl"
    assert (tmp_path / "out" / results).read_bytes() == (finished / results).read_bytes()


@pytest.mark.usefixtures("no_training")
def test_what_is_added_to_a_finished_run_is_scored_without_training(
    copied: Path, root: Path, base: Path
) -> None:
    grid = tiny_grid(base)
    grid["methods"]["DALorRA+T"] = {"of": "DALorRA", "temperature": True}
    added = [{"num_samples": 5}, {"num_samples": 3, "design": "stratified"}]
    grid["evaluation"]["predictives"] += added
    before = by_label(copied)
    ended = bench(root, copied, grid)
    assert ended.exit_code == 0, ended.output
    after = by_label(copied)
    assert list(after) == ["MLE", "MLE+T", "DALorRA", "DALorRA+T"]
    for label in before:
        old = {e.id: e for e in before[label].evaluations}
        assert {e.id: e for e in after[label].evaluations if e.id in old} == old
    assert [e.num_samples for e in after["DALorRA+T"].evaluations] == [3, 1, 5, 3] * 2
    assert after["DALorRA"].evaluations[3].predictive == "monte_carlo_3_stratified"
    iid, *_, stratified = (e.metrics["nll"] for e in after["DALorRA"].evaluations[:4])
    assert iid != stratified
    # one function answers whatever is asked for, as for num_samples
    assert after["MLE"].evaluations[3].metrics == after["MLE"].evaluations[0].metrics
    assert after["DALorRA+T"].key == after["DALorRA"].key
    assert all(e.fit is not None for e in after["DALorRA+T"].evaluations)


def test_a_grid_made_smaller_keeps_what_is_there_for_the_larger_one(
    copied: Path, root: Path, base: Path
) -> None:
    grid = tiny_grid(base)
    del grid["methods"]["MLE+T"]
    assert bench(root, copied, grid).exit_code == 0
    assert list(by_label(copied)) == ["MLE", "DALorRA"]
    ended = bench(root, copied, tiny_grid(base))
    assert "begins" not in ended.output
    assert list(by_label(copied)) == ["MLE", "MLE+T", "DALorRA"]


def test_a_dry_run_lists_costs_and_states_and_writes_nothing(
    copied: Path, root: Path, base: Path
) -> None:
    grid = tiny_grid(base, seeds=[1, 2])
    fresh = bench(root, copied.with_name("fresh"), grid, "--dry-run")
    assert fresh.exit_code == 0, fresh.output
    assert not copied.with_name("fresh").exists()
    assert "6 cells, 4 runs, 4 left: 160 rows x steps" in fresh.stdout
    key = by_label(copied)["MLE"].key
    ended = bench(root, copied, grid, "--dry-run").stdout.splitlines()
    line = next(one for one in ended if one.startswith(key))
    assert line.split(maxsplit=4)[1:] == ["done", "48", "48", "MLE / sst2 / 1 = MLE+T / sst2 / 1"]
    assert sum(" new " in one for one in ended) == 2
    assert "6 cells, 4 runs, 2 left: 80 rows x steps" in ended[-1]


# --- failures ---------------------------------------------------------------------------------


def test_a_failing_run_is_recorded_and_the_others_go_on(
    tmp_path: Path, root: Path, base: Path
) -> None:
    broken = {"method": "mle", "adapter": {"target_modules": ["no_such_proj"]}}
    grid = tiny_grid(base, methods={"Broken": broken, "MLE": "mle"})
    ended = bench(root, tmp_path / "out", grid)
    assert ended.exit_code == 1
    assert "1 of 2 runs failed" in ended.stderr
    assert "failed: Broken / sst2 / seed 1: ConfigError" in ended.stderr
    results = by_label(tmp_path / "out")
    assert [results[label].status for label in ("Broken", "MLE")] == ["failed", "done"]
    assert "no_such_proj" in (results["Broken"].error or "")
    log = (tmp_path / "out" / "runs" / results["Broken"].key / "log.txt").read_text()
    assert "Traceback" in log
    assert "no_such_proj" in log


def test_a_failed_run_is_done_again_when_asked(
    tmp_path: Path, root: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    grid = tiny_grid(base, methods={"MLE": "mle"})

    def out_of_memory(*_: object, **__: object) -> None:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patched:
        patched.setattr(runs_module, "run_training", out_of_memory)
        assert bench(root, tmp_path / "out", grid).exit_code == 1
    assert by_label(tmp_path / "out")["MLE"].error == "RuntimeError: out of memory"
    again = bench(root, tmp_path / "out", grid)
    assert again.exit_code == 1
    assert "begins" not in again.stderr
    assert bench(root, tmp_path / "out", grid, "--retry-failed").exit_code == 0
    result = by_label(tmp_path / "out")["MLE"]
    assert (result.status, result.error) == ("done", None)


@pytest.mark.usefixtures("no_training")
def test_lost_and_damaged_scores_are_made_again(copied: Path, root: Path, base: Path) -> None:
    one, two, *_ = by_label(copied)["DALorRA"].evaluations
    whole = {e.scores: (copied / e.scores).read_bytes() for e in (one, two)}
    (copied / one.scores).unlink()
    (copied / two.scores).write_bytes(whole[two.scores][:-4])
    listed = bench(root, copied, tiny_grid(base), "--dry-run").stdout
    assert "3 cells, 2 runs, 1 left" in listed
    assert Path(one.scores).name + " cannot be read" in listed
    before = read_record(copied, by_label(copied)["DALorRA"].key)
    ended = bench(root, copied, tiny_grid(base))
    assert ended.exit_code == 0, ended.output
    assert {name: (copied / name).read_bytes() for name in whole} == whole
    after = read_record(copied, by_label(copied)["DALorRA"].key)
    assert before is not None
    assert after is not None
    old, new = (
        sorted(without_times(record)["evaluations"], key=lambda e: e["id"])
        for record in (before, after)
    )
    assert new == old


def test_what_was_scored_of_another_adapter_is_scored_again(
    copied: Path, root: Path, base: Path
) -> None:
    """As on a machine where training again gives other last digits."""
    key = by_label(copied)["MLE"].key
    before = read_record(copied, key)
    assert before is not None
    stale = before.model_dump(mode="json")
    stale["provenance"]["digests"]["adapter"] = "0" * 64
    stale["train_nll"] = 9.0
    for one in stale["evaluations"]:
        one["temperature"] = 9.0
    write_record(copied, Record.model_validate(stale))
    shutil.rmtree(copied / "runs" / key / "artifact")
    grid = tiny_grid(base)
    grid["evaluation"]["predictives"].append({"num_samples": 5})
    ended = bench(root, copied, grid)
    assert ended.exit_code == 0, ended.output
    assert "all is scored again" in ended.stderr
    after = read_record(copied, key)
    assert after is not None
    assert after.train_nll == before.train_nll
    old = {one.id: one.temperature for one in before.evaluations}
    assert {one.id: one.temperature for one in after.evaluations if one.id in old} == old


def test_an_evaluation_that_fails_leaves_the_others(
    tmp_path: Path, root: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    grid = tiny_grid(base)
    del grid["methods"]["DALorRA"]

    def out_of_memory(*_: object) -> None:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patched:
        patched.setattr(runs_module, "fit_temperature", out_of_memory)
        ended = bench(root, tmp_path / "out", grid)
    assert ended.exit_code == 1
    results = by_label(tmp_path / "out")
    assert [(r.status, len(r.evaluations)) for r in results.values()] == [
        ("done", 4),
        ("failed", 0),
    ]
    assert "in, monte_carlo: RuntimeError: out of memory" in (results["MLE+T"].error or "")
    assert results["MLE"].error is None
    assert "Traceback" in (tmp_path / "out" / "runs" / results["MLE"].key / "log.txt").read_text()
    kept = {one.id: one.seconds for one in results["MLE"].evaluations}
    with monkeypatch.context() as patched:
        patched.setattr(runs_module, "run_training", out_of_memory)  # trained once is enough
        assert bench(root, tmp_path / "out", grid, "--retry-failed").exit_code == 0
    after = by_label(tmp_path / "out")
    assert [r.status for r in after.values()] == ["done", "done"]
    assert {one.id: one.seconds for one in after["MLE"].evaluations} == kept


def test_an_ensembles_checkpoints_go_when_it_is_done(
    tmp_path: Path, root: Path, base: Path
) -> None:
    both = {"method": {"name": "ensemble", "num_members": 2}, "optim": {"steps": 2}}
    assert bench(root, tmp_path / "out", tiny_grid(base, methods={"E": both})).exit_code == 0
    members = list((tmp_path / "out").glob("runs/*/training/member-*"))
    assert len(members) == 2
    assert not [member for member in members if (member / "checkpoints").exists()]


def test_an_interrupted_run_goes_on_when_data_and_base_have_moved(
    tmp_path: Path, root: Path, base: Path, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, save = tmp_path / "out", loop_module.save_checkpoint

    def killed(*arguments: Any) -> None:
        save(*arguments)
        raise KeyboardInterrupt

    grid = tiny_grid(base)
    del grid["methods"]["DALorRA"]
    with monkeypatch.context() as patched:
        patched.setattr(loop_module, "save_checkpoint", killed)
        assert bench(root, out, grid).exit_code == 130
    moved = shutil.copytree(root, tmp_path / "moved")
    grid["settings"]["base"] = str(shutil.copytree(base, tmp_path / "base"))
    grid["tasks"][0]["name"] = "movies"
    grid["out_of_distribution"] = {"movies": ["trec"]}
    assert "at step 4" in bench(moved, out, grid, "--dry-run").stdout
    ended = bench(moved, out, grid)
    assert ended.exit_code == 0, ended.output
    resumed, whole = by_label(out)["MLE"], by_label(finished)["MLE"]
    assert resumed.train_seconds is None  # it did go on
    assert resumed.key == whole.key
    assert resumed.train_nll == whole.train_nll


@pytest.mark.usefixtures("no_training")
def test_a_damaged_record_is_made_again_from_the_adapter(
    copied: Path, root: Path, base: Path
) -> None:
    key = by_label(copied)["DALorRA"].key
    path = copied / "runs" / key / "record.json"
    before = read_record(copied, key)
    assert before is not None
    path.write_bytes(path.read_bytes()[:700])
    with pytest.raises(DataError, match=r"record\.json, line \d+"):
        read_record(copied, key)
    listed = bench(root, copied, tiny_grid(base), "--dry-run").stdout
    assert "record.json, line" in listed
    ended = bench(root, copied, tiny_grid(base))
    assert ended.exit_code == 0, ended.output
    assert "made anew" in ended.stderr
    after = read_record(copied, key)
    assert after is not None
    assert without_times(after) == without_times(before)


def test_a_damaged_results_file_is_refused_by_report_and_rebuilt_by_run(
    copied: Path, root: Path, base: Path
) -> None:
    path = copied / "results.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    refused = call("report", copied)
    assert refused.exit_code == 1
    assert "results.jsonl, line 2" in refused.stderr
    assert bench(root, copied, tiny_grid(base)).exit_code == 0
    assert path.read_bytes() == whole


def test_a_damaged_adapter_is_trained_again_to_the_same_record(
    copied: Path, root: Path, base: Path
) -> None:
    key = by_label(copied)["MLE"].key
    before = read_record(copied, key)
    file = copied / "runs" / key / "artifact" / "adapter.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    (copied / "runs" / key / "record.json").unlink()
    ended = bench(root, copied, tiny_grid(base))
    assert ended.exit_code == 0, ended.output
    after = read_record(copied, key)
    assert before is not None
    assert after is not None
    assert without_times(after) == without_times(before)


def test_only_one_bench_works_in_a_directory(copied: Path, root: Path, base: Path) -> None:
    with hold(copied, wait=False):
        ended = bench(root, copied, tiny_grid(base))
    assert ended.exit_code == 1
    assert "another process works in" in ended.stderr


def test_an_interrupted_bench_says_so_and_keeps_its_results(
    copied: Path, root: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(runs_module, "run_training", interrupt)
    (copied / "results.jsonl").unlink()
    ended = bench(root, copied, tiny_grid(base, seeds=[1, 2]))
    assert ended.exit_code == 130
    assert "the same command goes on" in ended.stderr
    assert [r.seed for r in read_results(copied)] == [1, 1, 1]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"methods": {"A": "no_method"}}, ("methods.A", "no_method", "dalorra")),
        ({"tasks": ["no_task"]}, ("tasks.0.task", "must be one of", "no_task")),
        ({"seeds": [1, 1]}, ("seeds", "different")),
        ({"tasks": ["boolq"], "out_of_distribution": {}}, ("data.root", "boolq")),
        ({"settings": {"base": "no/such/../base"}}, ("base model", "no/such/../base")),
    ],
)
def test_what_cannot_work_is_said_before_the_first_run(
    tmp_path: Path, root: Path, base: Path, changes: dict[str, Any], said: tuple[str, ...]
) -> None:
    ended = bench(root, tmp_path / "out", tiny_grid(base) | changes)
    assert ended.exit_code == 1
    assert all(part in ended.stderr for part in said), ended.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("options", [("--workers", "-1"), ("--no-such-flag",)])
def test_unknown_options_are_wrong_usage(
    tmp_path: Path, root: Path, base: Path, options: tuple[str, ...]
) -> None:
    assert bench(root, tmp_path / "out", tiny_grid(base), *options).exit_code == 2


# --- reports ----------------------------------------------------------------------------------


def test_a_report_has_tables_of_every_predictive_and_figures(copied: Path) -> None:
    ended = call("report", copied)
    assert ended.exit_code == 0, ended.output
    text = (copied / "report" / "tables.md").read_text(encoding="utf-8")
    results = by_label(copied)
    sections = text.split("\n## ")
    headings = [part.partition("\n")[0] for part in sections[1:]]
    assert headings == ["monte_carlo", "mean_mask", "Runs"]
    for section, place in zip(sections[1:3], (0, 1), strict=True):
        for label, result in results.items():
            value = result.evaluations[place].metrics["nll"].value
            assert value is not None
            assert f"| {label} | {value:.3f} |" in section
    assert "| sst2 on trec |" in text
    assert "fewer than 3 seeds" in text
    trained = results["DALorRA"].trained_parameters
    assert f"| DALorRA | sst2 | 1 | {trained} | 10 |" in text
    shown = {path.name for path in (copied / "report").glob("*.png")}
    assert shown == {
        f"{name}.png"
        for name in (
            "overview",
            "reliability-sst2",
            "risk-coverage-sst2",
            "cost-training-sst2",
            "cost-prediction-sst2",
            "posterior-dalorra",
        )
    }


def test_differences_are_to_the_grids_first_method_and_missing_cells_are_named(
    copied: Path, root: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def out_of_memory(*_: object, **__: object) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(runs_module, "run_training", out_of_memory)
    first = {"Late": {"method": "mle", "optim": {"steps": 3}}}
    grid = tiny_grid(base)
    grid["methods"] = first | grid["methods"]
    assert bench(root, copied, grid).exit_code == 1
    assert call("report", copied).exit_code == 0
    text = (copied / "report" / "tables.md").read_text(encoding="utf-8")
    assert "## Missing cells\n\n- Late, sst2, seed 1: failed\n" in text
    assert "differences are to Late" in text
    assert "difference to" not in text
    values = json.loads((copied / "grid.json").read_text())
    (copied / "grid.json").write_text(json.dumps(values | {"seeds": [1, 2]}))
    assert call("report", copied).exit_code == 0
    text = (copied / "report" / "tables.md").read_text(encoding="utf-8")
    assert "- MLE, sst2, seed 2: not run\n" in text
    (copied / "grid.json").write_text("{")
    refused = call("report", copied)
    assert refused.exit_code == 1
    assert "grid.json cannot be read" in refused.stderr


def test_a_report_does_without_the_adapters_but_for_their_gates(copied: Path) -> None:
    for directory in copied.glob("runs/*/artifact"):
        shutil.rmtree(directory)
    assert call("report", copied).exit_code == 0
    assert not list((copied / "report").glob("posterior*"))
    assert (copied / "report" / "overview.png").is_file()


def test_a_report_needs_the_scores_as_they_were_written(copied: Path) -> None:
    scores = copied / by_label(copied)["MLE"].evaluations[0].scores
    scores.write_bytes(scores.read_bytes().replace(b"test-2", b"test-3", 1))
    ended = call("report", copied)
    assert ended.exit_code == 1
    assert "sha256" in ended.stderr


def test_a_report_names_failures_and_needs_one_run_that_is_done(
    tmp_path: Path, root: Path, base: Path
) -> None:
    broken = {"method": "mle", "adapter": {"target_modules": ["no_such_proj"]}}
    out = tmp_path / "out"
    assert bench(root, out, tiny_grid(base, methods={"Broken": broken})).exit_code == 1
    ended = call("report", out)
    assert ended.exit_code == 1
    assert "no run is done" in ended.stderr
    assert bench(root, out, tiny_grid(base, methods={"A": "mle", "B": broken})).exit_code == 1
    assert call("report", out).exit_code == 0
    text = (out / "report" / "tables.md").read_text(encoding="utf-8")
    assert "## Failed runs" in text
    assert "- B, sst2, seed 1: ConfigError" in text


@pytest.mark.parametrize("command", ["run", "report"])
def test_the_commands_explain_themselves(command: str) -> None:
    ended = call(command, "--help")
    assert ended.exit_code == 0
    assert "Exit status" in ended.output


# --- processes --------------------------------------------------------------------------------

KILLED = """
import os, signal, sys
import torch
torch.set_num_threads(1)
from typer.testing import CliRunner
from server.cli import app
written = 0
sync = os.fsync
def die_in_the_second_checkpoint(fd):
    global written
    name = os.readlink(f"/proc/self/fd/{fd}")
    written += ".writing-" in name and "/checkpoints/" in name
    if written == 5:  # three files each: the second file of the second checkpoint
        os.kill(os.getpid(), signal.SIGKILL)
    sync(fd)
os.fsync = die_in_the_second_checkpoint
CliRunner().invoke(app, sys.argv[1:])
"""


def test_a_killed_bench_goes_on_to_the_same_record(
    finished: Path, tmp_path: Path, root: Path, base: Path
) -> None:
    out, grid = tmp_path / "out", write_grid(tmp_path / "out.yaml", tiny_grid(base))
    asked = ["bench", "run", grid, "--data-root", root, "-o", out, "--workers", 0]
    process = subprocess.run(
        [sys.executable, "-c", KILLED, *(str(part) for part in asked), "--device", "cpu"],
        cwd=ROOT,
        check=False,
        capture_output=True,
        env=ENVIRONMENT,
    )
    assert process.returncode == -signal.SIGKILL, process.stderr.decode()
    key = by_label(finished)["MLE"].key
    left = [p.name for p in (out / "runs" / key / "training" / "checkpoints").glob("step-*")]
    assert left == ["step-00000004"]
    assert not (out / "results.jsonl").exists()
    listed = bench(root, out, tiny_grid(base), "--dry-run").stdout
    assert "at step 4" in listed
    ended = bench(root, out, tiny_grid(base))
    assert ended.exit_code == 0, ended.output
    for label, whole in by_label(finished).items():
        resumed = by_label(out)[label]
        assert without_times(resumed) == without_times(whole)
        for one, other in zip(resumed.evaluations, whole.evaluations, strict=True):
            assert (out / one.scores).read_bytes() == (finished / other.scores).read_bytes()
    assert by_label(out)["MLE"].train_seconds is None  # the time before the kill is not known
    assert by_label(out)["DALorRA"].train_seconds is not None


class Heard:
    """A listener that writes everything down and may act on the first note of a run."""

    def __init__(self, act: Callable[[Job], None]) -> None:
        self.events: list[tuple[str, str]] = []
        self.records: dict[str, Record] = {}
        self._act = act

    def started(self, job: Job, device: str) -> None:
        self.events.append((f"started on {device}", job.key))

    def note(self, job: Job, text: str) -> None:
        self.events.append((text, job.key))
        self._act(job)

    def ended(self, job: Job, record: Record) -> None:
        self.events.append(("ended", job.key))
        self.records[job.key] = record

    def tick(self) -> None:
        """Nothing is drawn."""


def children() -> set[int]:
    """Return the process ids of this process's children that run worker code."""
    found = set()
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                stat = (entry / "stat").read_text().rpartition(")")[2].split()
                command = (entry / "cmdline").read_text()
            except OSError:
                continue
            if int(stat[1]) == os.getpid() and "spawn_main" in command:
                found.add(int(entry.name))
    return found


def test_two_workers_share_the_runs_and_one_that_dies_fails_its_run_only(
    finished: Path, tmp_path: Path, root: Path, base: Path
) -> None:
    doomed, *others = jobs_of(root, tmp_path, tiny_grid(base, seeds=[2, 1]))
    before = children()
    killed = []

    def kill_the_first(job: Job) -> None:
        if job.key == doomed.key and not killed:
            (ours, *_) = sorted(children() - before)  # the first one that was started
            killed.append(ours)
            os.kill(ours, signal.SIGKILL)

    heard = Heard(kill_the_first)
    run_in_workers([doomed, *others], tmp_path / "out", heard, devices=("cpu", "cpu"))
    assert [e for e, _ in heard.events[:2]] == ["started on cpu"] * 2
    assert heard.records[doomed.key].status == "failed"
    assert "SIGKILL" in (heard.records[doomed.key].error or "")
    assert read_record(tmp_path / "out", doomed.key) == heard.records[doomed.key]
    assert {heard.records[job.key].status for job in others} == {"done"}
    assert children() == before
    whole = by_label(finished)["DALorRA"]
    record = heard.records[whole.key]
    theirs, ours = (without_times(r)["evaluations"] for r in (whole, record))
    assert [e["metrics"] for e in ours] == [e["metrics"] for e in theirs]
    log = (tmp_path / "out" / "runs" / whole.key / "log.txt").read_text()
    assert "step 8/8" in log


ORPHANED = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[4])
from dalorra_core.bench.workers import run_in_workers
from tests.integration.test_bench import Heard, children, jobs_of

def leave(job):
    print(*children(), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)

if __name__ == "__main__":
    import json
    folder = Path(sys.argv[2])
    jobs = jobs_of(Path(sys.argv[1]), folder, json.loads(sys.argv[3]))
    run_in_workers(jobs, folder / "out", Heard(leave), devices=("cpu",))
"""


def alive(process: int) -> bool:
    try:
        stat = Path(f"/proc/{process}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"


def test_the_workers_of_a_killed_bench_leave(tmp_path: Path, root: Path, base: Path) -> None:
    script = tmp_path / "orphaned.py"
    script.write_text(ORPHANED, encoding="utf-8")
    grid = tiny_grid(base, methods={"A": {"method": "mle", "optim": {"steps": 100_000}}})
    process = subprocess.run(
        [sys.executable, str(script), str(root), str(tmp_path), json.dumps(grid), str(ROOT)],
        check=False,
        capture_output=True,
        env=ENVIRONMENT,
        text=True,
    )
    assert process.returncode == -signal.SIGKILL, process.stderr
    (worker,) = (int(word) for word in process.stdout.split())
    deadline = time.monotonic() + 20
    while alive(worker) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive(worker)
