"""blob, scalabl and mask_weight from files to an artifact to answers, on a tiny model."""

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
from dalorra_core.predictive.matching import state_of
from dalorra_core.predictive.predictor import Predictor, SamplingPlan
from dalorra_core.training.run import run_training
from dalorra_core.training.settings import TrainConfig
from tests.support.tiny_tasks import TinyTask, tiny_config

METHODS: dict[str, dict[str, Any]] = {
    "blob": {"name": "blob", "test_noise": "flipout"},
    "scalabl": {"name": "scalabl"},
    "mask_weight": {
        "name": "mask_weight",
        "mask_lr": 3e-2,
        "sigma_lr": 3e-2,
        "weight_kl_weight": 1e-3,
    },
}
OWN = {"blob": "sigma_root", "scalabl": "log_sigma", "mask_weight": "log_sigma"}
DIVERGENCES = {"blob": "weight_kl", "scalabl": "scale_kl", "mask_weight": "weight_kl"}


def run(config: TrainConfig, folder: Path, **options: Any) -> Path:
    return run_training(config, folder / "out", folder / "run", report=lambda _: None, **options)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> TinyTask:
    return TinyTask(tmp_path_factory.mktemp("text"), "text")


@pytest.fixture(scope="module", params=METHODS)
def trained(
    request: pytest.FixtureRequest, text: TinyTask, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path]:
    name: str = request.param
    return name, run(tiny_config(text, method=METHODS[name]), tmp_path_factory.mktemp(name))


def test_a_task_is_learnt_and_the_divergence_is_logged(trained: tuple[str, Path]) -> None:
    name, directory = trained
    text = (directory.with_name("run") / "metrics.jsonl").read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    nll = [line["nll"] for line in lines if "nll" in line]
    assert sum(nll[-2:]) / 2 < 0.35 * math.log(4)
    validation = load_artifact(directory).manifest.provenance["validation"]
    assert isinstance(validation, dict)
    accuracy = validation["accuracy"]
    assert isinstance(accuracy, float)
    assert accuracy >= 0.8
    divergence = [line[DIVERGENCES[name]] for line in lines if "nll" in line]
    assert all(value > 0 for value in divergence)
    assert abs(divergence[-1] - divergence[0]) > 0.1


def test_the_spread_is_learnt_and_stored_in_full_precision(trained: tuple[str, Path]) -> None:
    name, directory = trained
    artifact = load_artifact(directory)
    state, config = state_of(artifact), artifact.manifest.method
    start = ALL[name].init(state.specs, state.r, 1, config)  # the run's seed
    own = [key for key in start if key.endswith(OWN[name])]
    assert own
    for key in own:
        assert state.params[key].dtype == torch.float32
        moved = (state.params[key] - start[key]).abs()
        assert (moved > 1e-4).float().mean() > 0.8


def test_it_answers_after_loading(trained: tuple[str, Path], text: TinyTask) -> None:
    _, directory = trained
    predictor = Predictor.load(directory, base=str(text.base), device="cpu")  # checks the probes
    rows = [
        predictor.encode(TextExample(f"q{i}", words))
        for i, words in enumerate(("transfer the", "is a flight to you", "what"))
    ]
    four = predictor.predict(rows, SamplingPlan(4, seed=3)).log_probs
    assert four.shape == (4, 3, 4)
    assert four.std(0).max() > 1e-4
    two = predictor.predict(rows, SamplingPlan(2, seed=3)).log_probs
    torch.testing.assert_close(two, four[:2], rtol=1e-4, atol=1e-5)
    mean = predictor.predict(rows, SamplingPlan(4, 3, "mean_mask")).log_probs
    again = predictor.predict(rows, SamplingPlan(9, 8, "mean_mask")).log_probs
    assert torch.equal(mean, again)
    assert mean.shape == (1, 3, 4)
    assert (mean - four).abs().amax((1, 2)).min() > 1e-4  # it is none of the samples


@pytest.mark.parametrize("name", METHODS)
def test_a_resumed_run_ends_in_the_same_bytes(name: str, text: TinyTask, tmp_path: Path) -> None:
    """Bursts, signs and noise are named by the step, and SGD has nothing to remember."""
    config = tiny_config(
        text,
        method={**METHODS[name], "num_train_samples": 2},
        optim={"steps": 14, "batch_size": 3, "gradient_accumulation": 2},
        run={"checkpoint_every": 5, "eval_every": 14},
    )
    whole = (run(config, tmp_path) / "adapter.safetensors").read_bytes()
    shutil.rmtree(tmp_path / "out")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000014")
    resumed = run(config, tmp_path, resume=True)
    assert load_artifact(resumed).manifest.provenance["resumed_at"] == 10
    assert (resumed / "adapter.safetensors").read_bytes() == whole
