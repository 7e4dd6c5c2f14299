"""Structured posteriors from files to answers: mask mixtures, Markov masks, Bayesian-LoRA."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from dalorra_core.artifact.store import load_artifact
from dalorra_core.data.examples import TextExample
from dalorra_core.predictive.predictor import Predictor, SamplingPlan
from dalorra_core.training.run import run_training
from tests.support.tiny_tasks import TinyTask, tiny_config

SETTINGS: dict[str, dict[str, Any]] = {
    "mask_mixture": {
        "method": {"name": "mask_mixture", "mask_lr": 3e-2, "num_components": 2, "diversity": 1.0}
    },
    "mask_markov": {"method": {"name": "mask_markov", "mask_lr": 3e-2}},
    "bayesian_lora": {
        "method": {"name": "bayesian_lora", "prior_sd": 1.0, "inducing_lr": 3e-2}
        | {"label_smoothing": 0.02, "bayesian_modules": ["q_proj", "lm_head"]},
    },
    "bayesian_lora with a flow": {
        "method": {"name": "bayesian_lora", "prior_sd": 1.0, "inducing_lr": 3e-2, "flow": True},
        "optim": {"steps": 60},
    },
}


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> TinyTask:
    return TinyTask(tmp_path_factory.mktemp("text"), "text")


@pytest.mark.parametrize("name", SETTINGS)
def test_a_task_is_learnt_and_answered(name: str, task: TinyTask, tmp_path: Path) -> None:
    config = tiny_config(task, **SETTINGS[name])
    directory = run_training(config, tmp_path / "out", tmp_path / "run", report=lambda _: None)
    lines = [json.loads(x) for x in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    nll = [line["nll"] for line in lines if "nll" in line]
    assert sum(nll[-2:]) / 2 < 0.35 * math.log(4)
    assert nll[0] > 3 * nll[-1]
    validation: Any = load_artifact(directory).manifest.provenance["validation"]
    assert validation["accuracy"] >= 0.8
    predictor = Predictor.load(directory, base=str(task.base), device="cpu")
    assert predictor.self_test() < 1e-6
    row = predictor.encode(TextExample("q", "is a flight to you"))
    found = predictor.predict([row], SamplingPlan(6, seed=3)).log_probs
    assert found.shape == (6, 1, 4)
    fewer = predictor.predict([row], SamplingPlan(3, seed=3)).log_probs
    torch.testing.assert_close(fewer, found[:3], rtol=1e-5, atol=1e-5)
    assert found.exp().std(0).max() > 1e-5  # the samples are different functions


@pytest.mark.parametrize("layer", [0, 1])
def test_a_chain_of_one_layer_has_no_links_and_trains(
    layer: int, task: TinyTask, tmp_path: Path
) -> None:
    config = tiny_config(
        task,
        method={"name": "mask_markov"},
        adapter={"layers": (layer, layer)},
        optim={"steps": 4},
        run={"checkpoint_every": 2},
    )
    directory = run_training(config, tmp_path / "out", tmp_path / "run", report=lambda _: None)
    assert load_artifact(directory).tensors["links"].shape == (0, 4, 4)
    Predictor.load(directory, base=str(task.base), device="cpu")  # checks the stored answers


def test_the_structured_parts_move(task: TinyTask, tmp_path: Path) -> None:
    for name, tensor in (("mask_mixture", "component_logits"), ("mask_markov", "links")):
        config = tiny_config(task, **SETTINGS[name], optim={"steps": 30})
        place = tmp_path / name
        directory = run_training(config, place, tmp_path / f"{name}-run", report=lambda _: None)
        assert load_artifact(directory).tensors[tensor].abs().max() > 0.01
