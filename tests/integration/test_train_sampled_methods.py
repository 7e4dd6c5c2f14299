"""map, rank_dropout, frozen_gates, mc_dropout, ensemble: from files to answers, on a tiny model."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from dalorra_core.artifact.store import load_artifact
from dalorra_core.data.examples import TextExample
from dalorra_core.methods import METHODS as ALL
from dalorra_core.predictive.predictor import Predictor, SamplingPlan
from dalorra_core.training import loop, members
from dalorra_core.training.run import run_training
from dalorra_core.training.settings import TrainConfig
from tests.support.tiny_tasks import TinyTask, tiny_config

METHODS: dict[str, dict[str, Any]] = {
    "map": {"name": "map"},
    "rank_dropout": {"name": "rank_dropout", "num_dropped": 1},
    "frozen_gates": {"name": "frozen_gates", "prior_prob": 0.7},
    "mc_dropout": {"name": "mc_dropout"},
    "mc_dropout_tied": {"name": "mc_dropout", "noise": "tied"},
}
SHORT = {"steps": 12}
OFTEN = {"checkpoint_every": 4}


def run(config: TrainConfig, folder: Path, **options: Any) -> Path:
    return run_training(config, folder / "out", folder / "run", report=lambda _: None, **options)


def tensors_of(directory: Path) -> dict[str, torch.Tensor]:
    return dict(load_artifact(directory).tensors)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> TinyTask:
    return TinyTask(tmp_path_factory.mktemp("text"), "text")


@pytest.mark.parametrize("case", METHODS)
def test_a_task_is_learnt_and_answered(case: str, text: TinyTask, tmp_path: Path) -> None:
    config = METHODS[case]
    directory = run(tiny_config(text, method=config), tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    nll = [line["nll"] for line in lines if "nll" in line]
    assert sum(nll[-2:]) / 2 < 0.35 * math.log(4)
    assert ("neg_log_prior" in lines[0]) == (case == "map")
    predictor = Predictor.load(directory, base=str(text.base), device="cpu")  # checks its probes
    plan = SamplingPlan(num_samples=6, seed=3)
    rows = [predictor.encode(TextExample("q", "transfer the")) for _ in range(2)]
    answer = predictor.predict(rows, plan)
    assert len(answer.log_probs) == (6 if ALL[config["name"]].stochastic else 1)
    assert torch.allclose(answer.log_probs[:, 0], answer.log_probs[:, 1], atol=1e-5)


def test_frozen_gates_are_stored_as_they_started(text: TinyTask, tmp_path: Path) -> None:
    directory = run(tiny_config(text, method=METHODS["frozen_gates"], optim=SHORT), tmp_path)
    phi = tensors_of(directory)["phi"]
    assert torch.equal(phi, torch.full_like(phi, math.log(0.7) - math.log1p(-0.7)))


@pytest.mark.parametrize("case", ["mc_dropout", "rank_dropout"])
def test_a_resumed_run_ends_where_an_unbroken_one_does(
    case: str, text: TinyTask, tmp_path: Path
) -> None:
    config = tiny_config(text, method=METHODS[case], optim=SHORT, run=OFTEN)
    whole, broken = run(config, tmp_path / "whole"), tmp_path / "broken"
    shutil.copytree(tmp_path / "whole" / "run", broken / "run")
    for newest in (broken / "run" / "checkpoints").glob("step-00000012"):
        shutil.rmtree(newest)
    found = tensors_of(run(config, broken, resume=True))
    assert all(torch.equal(found[name], value) for name, value in tensors_of(whole).items())


def test_evaluations_during_training_keep_no_graph(
    text: TinyTask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    computed: list[bool] = []  # with gradients; views of the parameters themselves are none
    score_rows = loop.score_rows

    def watched(model: Any, pack: Any, rows: Any, **options: Any) -> Any:
        owners = [t._base if t._is_view() else t for t in pack.tensors()]
        computed.append(any(t.requires_grad and not t.is_leaf for t in owners))
        return score_rows(model, pack, rows, **options)

    monkeypatch.setattr(loop, "score_rows", watched)
    for name in ("dalorra", "blob"):
        run(tiny_config(text, method={"name": name}, optim={"steps": 1}), tmp_path / name)
    assert computed == [False] * 4


# --- ensembles ------------------------------------------------------------------------------


ENSEMBLE = {"name": "ensemble", "num_members": 2}


@pytest.fixture(scope="module")
def ensemble(text: TinyTask, tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = tiny_config(text, method=ENSEMBLE, optim=SHORT, run=OFTEN)
    return run(config, tmp_path_factory.mktemp("ensemble"))


def test_the_first_member_is_the_run_of_plain_lora(
    ensemble: Path, text: TinyTask, tmp_path: Path
) -> None:
    found = tensors_of(ensemble)
    config = tiny_config(text, method={"name": "mle"}, optim=SHORT, run=OFTEN)
    alone = tensors_of(run(config, tmp_path))
    assert set(found) == set(alone) | {f"member.1.{name}" for name in alone}
    for name, value in alone.items():
        assert torch.equal(found[name], value)
        assert not torch.equal(found[f"member.1.{name}"], value)
        assert found[f"member.1.{name}"].abs().max() > 0


def test_nothing_of_a_member_is_held_on_to_when_the_next_one_trains(
    text: TinyTask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[int] = []
    train = members.train

    def watched(
        module: Any, data: Any, config: Any, folder: Any, accelerator: Any, **kw: Any
    ) -> Any:
        held.append(len(accelerator._models) + len(accelerator._optimizers))
        return train(module, data, config, folder, accelerator, **kw)

    monkeypatch.setattr(members, "train", watched)
    run(tiny_config(text, method=ENSEMBLE, optim={"steps": 1}), tmp_path)
    assert held == [0, 0]


def test_an_ensemble_has_as_many_functions_as_members(ensemble: Path, text: TinyTask) -> None:
    predictor = Predictor.load(ensemble, base=str(text.base), device="cpu")
    row = predictor.encode(TextExample("q", "transfer the"))
    plans = [SamplingPlan(8, 4), SamplingPlan(1, 0)]
    answers = [predictor.predict([row], plan).log_probs for plan in plans]
    assert [len(answer) for answer in answers] == [2, 2]
    assert torch.equal(*answers)
    assert [predictor.num_functions(plan) for plan in plans] == [2, 2]
    assert predictor.mask_set(plans[0]) == predictor.mask_set(plans[1])
    mean = predictor.predict([row], SamplingPlan(8, 4, "mean_mask")).log_probs
    assert torch.allclose(mean[0], answers[0][0], atol=1e-5)
    (policy,) = predictor.manifest.policies
    assert policy.chosen_on.num_samples == 2
    stored = sum(value.nbytes for value in predictor.artifact.tensors.values())
    assert predictor.memory_bytes < 4 * stored  # the members and one pack of them


def test_a_broken_run_trains_only_the_members_that_are_missing(
    ensemble: Path, text: TinyTask, tmp_path: Path
) -> None:
    config = tiny_config(text, method=ENSEMBLE, optim=SHORT, run=OFTEN)
    shutil.copytree(ensemble.parent / "run", tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "member-1")
    finished = tmp_path / "run" / "member-0" / "metrics.jsonl"
    before = finished.read_text()
    found = tensors_of(run(config, tmp_path, resume=True))
    assert finished.read_text() == before
    assert all(torch.equal(found[name], value) for name, value in tensors_of(ensemble).items())
