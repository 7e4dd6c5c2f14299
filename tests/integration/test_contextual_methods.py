"""Methods whose noise or gates depend on the input: trained, stored, loaded, asked, served."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from dalorra_core.adapters.inject import TargetSpec
from dalorra_core.artifact.store import load_artifact
from dalorra_core.data.examples import TextExample
from dalorra_core.methods import METHODS as ALL_METHODS
from dalorra_core.metrics.uncertainty import mean_probs
from dalorra_core.predictive.gates import gate_entropy, gate_probs
from dalorra_core.predictive.predictor import Predictor, SamplingPlan
from dalorra_core.training.run import run_training
from dalorra_core.training.settings import TrainConfig
from server.app import create_app
from server.engines.local import LocalEngine
from server.settings import Settings
from tests.support.api import async_test
from tests.support.tiny_models import assert_near
from tests.support.tiny_tasks import TinyTask, tiny_config

METHODS: dict[str, dict[str, Any]] = {
    "c_lora": {"name": "c_lora", "net_lr": 0.1},
    "c_lora_tied": {"name": "c_lora", "noise": "tied", "net_lr": 0.1},
    "prompt": {"name": "amortised_prompt", "mask_lr": 3e-2, "net_lr": 3e-2},
    "prompt_learned": {
        "name": "amortised_prompt",
        "projection": "learned",
        "mask_lr": 3e-2,
        "net_lr": 3e-2,
    },
    "token": {"name": "amortised_token", "mask_lr": 3e-2, "net_lr": 3e-2},
}
TEXTS = ["transfer the", "is a flight to you", "what", "how to order and alarm of the my"]


def run(config: TrainConfig, folder: Path, **options: Any) -> Path:
    """Train into ``folder/out`` with ``folder/out-run`` as run directory."""
    return run_training(
        config, folder / "out", folder / "out-run", report=lambda _: None, **options
    )


def metrics_of(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def optim_of(key: str) -> dict[str, float]:
    return {"steps": 100, "lr": 1e-2} if key.startswith("c_lora") else {"steps": 80}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> TinyTask:
    return TinyTask(tmp_path_factory.mktemp("text"), "text")


@pytest.fixture(scope="module", params=METHODS)
def trained(
    request: pytest.FixtureRequest, text: TinyTask, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    config = tiny_config(text, method=METHODS[request.param], optim=optim_of(request.param))
    return run(config, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def predictor(trained: Path, text: TinyTask) -> Predictor:
    return Predictor.load(trained, base=str(text.base), device="cpu")  # its probes are checked


def test_the_task_is_learnt(trained: Path) -> None:
    nll = [line["nll"] for line in metrics_of(trained.with_name("out-run")) if "nll" in line]
    assert sum(nll[-2:]) / 2 < 0.5 * math.log(4)
    validation = load_artifact(trained).manifest.provenance["validation"]
    assert isinstance(validation, dict)
    accuracy = validation["accuracy"]
    assert isinstance(accuracy, float)
    assert accuracy > 0.8


def test_divergences_are_logged(trained: Path) -> None:
    lines = [line for line in metrics_of(trained.with_name("out-run")) if "nll" in line]
    names = {"core_kl"} if "core_kl" in lines[0] else {"mask_kl", "local_kl"}
    for line in lines:
        assert names <= set(line)
        assert all(math.isfinite(line[name]) for name in names)
    moved = "core_kl" if "core_kl" in names else "local_kl"
    assert lines[-1][moved] > 0


def test_samples_differ_and_do_not_depend_on_company(predictor: Predictor) -> None:
    rows = [predictor.encode(TextExample(f"q{i}", t)) for i, t in enumerate(TEXTS)]
    whole = predictor.predict(rows, SamplingPlan(5, seed=3))
    assert (whole.log_probs[0] - whole.log_probs[1]).abs().max() > 1e-3
    for b, row in enumerate(rows):
        alone = predictor.predict([row], SamplingPlan(5, seed=3))
        assert_near(alone.log_probs[:, 0], whole.log_probs[:, b])
    mean = predictor.predict(rows, SamplingPlan(estimator="mean_mask"))
    assert len(mean.log_probs) == 1
    assert predictor.memory_bytes > 0


def test_gates_react_to_the_input(predictor: Predictor) -> None:
    if predictor.method.name == "c_lora":
        pytest.skip("C-LoRA has no gates")
    pack = predictor.pack(SamplingPlan(estimator="mean_mask"))
    rows = [predictor.encode(TextExample(f"q{i}", t)) for i, t in enumerate(TEXTS)]
    found = gate_probs(predictor.model, pack, rows, max_padded_tokens=512)
    assert found.shape == (4, len(predictor.manifest.modules), 4)
    assert (found[0] - found[1]).abs().max() > 1e-4
    entropy = gate_entropy(found)
    assert ((entropy > 0) & (entropy <= math.log(2))).all()
    whole = predictor.gate_entropy(rows)
    assert whole is not None
    assert torch.allclose(whole, entropy, atol=1e-6)


@async_test
async def test_the_server_gives_the_predictors_numbers(trained: Path, text: TinyTask) -> None:
    predictor = Predictor.load(trained, base=str(text.base), device="cpu")
    engine = LocalEngine([trained], base=str(text.base), device="cpu")
    app = create_app(lambda: engine, Settings(batch_wait_ms=20))
    transport = httpx.ASGITransport(app)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url="http://localhost") as client,
    ):
        await app.state.service.lifecycle.loaded()
        assert app.state.service.lifecycle.failure is None
        body = {"input": TEXTS, "num_samples": 5, "seed": 2}
        response = await client.post("/v1/classify", json=body)
    assert response.status_code == 200, response.text
    rows = [predictor.encode(TextExample(f"q{i}", t)) for i, t in enumerate(TEXTS)]
    expected = mean_probs(predictor.predict(rows, SamplingPlan(5, seed=2)).log_probs)
    for answer, probs in zip(response.json()["data"], expected, strict=True):
        assert answer["probs"] == pytest.approx(probs.tolist(), abs=1e-5)


@pytest.mark.parametrize("key", ["c_lora", "prompt_learned"])
def test_a_resumed_run_ends_in_the_same_tensors(key: str, text: TinyTask, tmp_path: Path) -> None:
    config = tiny_config(
        text, method=METHODS[key], optim={"steps": 12}, run={"checkpoint_every": 4}
    )
    whole = load_artifact(run(config, tmp_path)).tensors
    shutil.rmtree(tmp_path / "out-run" / "checkpoints" / "step-00000012")
    resumed = load_artifact(run(config, tmp_path, resume=True, overwrite=True)).tensors
    assert sorted(whole) == sorted(resumed)
    assert all(torch.equal(resumed[name], value) for name, value in whole.items())
    manifest = load_artifact(tmp_path / "out").manifest
    specs = [TargetSpec(m.name, m.d_in, m.d_out, m.layer) for m in manifest.modules]
    start = ALL_METHODS[manifest.method.name].init(
        specs, manifest.r, config.run.seed, manifest.method
    )
    nets = [name for name in whole if "net_" in name or "gate_" in name]
    assert nets
    assert all(not torch.equal(start[name], whole[name]) for name in nets)
