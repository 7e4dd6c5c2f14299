"""A task by its name: trained, stored, and served by the same line as any other rows."""

import asyncio
import json
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from dalorra_core.artifact.store import load_artifact
from dalorra_core.base_models.loading import load_tokenizer
from dalorra_core.data.collate import EncodedExample, TokenBatch, collate
from dalorra_core.data.labels import LabelSet
from dalorra_core.data.tasks import load_task
from dalorra_core.predictive.predictor import Predictor
from dalorra_core.training import loop
from dalorra_core.training.prepare import evaluation_rows
from dalorra_core.training.run import run_training
from dalorra_core.training.settings import TrainConfig
from server.app import create_app
from server.engines.local import LocalEngine
from server.settings import Settings
from tests.support.api import async_test
from tests.support.tiny_data_sets import tiny_data_root
from tests.support.tiny_models import save_tiny_base

QUESTION = {"input": {"question": "which is word 7", "choices": ["the a7", "the b7", "the c7"]}}
WIDER = {"input": {"question": "which is word 7", "choices": list("vwxyz")}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("tasks")
    tiny_data_root(root / "data")
    save_tiny_base(root / "base")
    return root


def config_of(folder: Path, task: str, **groups: Any) -> TrainConfig:
    values: dict[str, Any] = {
        "data": {"source": f"task:{task}", "root": str(folder / "data"), "max_tokens": 120},
        "optim": {"lr": 3e-2, "steps": 5, "batch_size": 8},
        "run": {"device": "cpu", "eval_every": 5},
        "predictive": {"num_samples": 3},
    }
    merged = {**values, **{k: {**values.get(k, {}), **v} for k, v in groups.items()}}
    return TrainConfig.model_validate({"name": "tiny", "base": str(folder / "base"), **merged})


def trained(config: TrainConfig, folder: Path, name: str) -> Path:
    return run_training(
        config, folder / name, folder / f"{name}-run", report=lambda _: None, overwrite=True
    )


async def asked(adapter: Path, base: Path, *bodies: dict[str, Any]) -> list[dict[str, Any]]:
    engine = LocalEngine([adapter], base=str(base), device="cpu")
    app = create_app(lambda: engine, Settings(batch_wait_ms=1))
    transport = httpx.ASGITransport(app)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url="http://localhost") as client,
    ):
        await app.state.service.lifecycle.loaded()
        found = [client.post("/v1/classify", json=body) for body in bodies]
        responses = await asyncio.gather(*found)
    assert [response.status_code for response in responses] == [200] * len(bodies)
    return [response.json()["data"][0] for response in responses]


@async_test
async def test_a_task_is_served_as_any_other_rows(folder: Path) -> None:
    config = config_of(folder, "openbookqa")
    adapter = trained(config, folder, "own")
    manifest = load_artifact(adapter).manifest
    assert manifest.labels.labels == ("A", "B", "C", "D", "E")
    assert (manifest.labels.union, manifest.prompt.append_eos) == ((), False)
    assert str(folder) not in manifest.model_dump_json()
    (policy,) = manifest.policies
    assert policy.chosen_on.split == "held-out"
    (found,) = await asked(adapter, folder / "base", QUESTION)
    assert found["labels"] == ["A", "B", "C"]
    assert sum(found["probs"]) == pytest.approx(1)


@async_test
async def test_what_the_published_protocol_needs_is_kept_when_serving(folder: Path) -> None:
    settings = {"softmax": "union", "append_eos": True, "label_tokens": "bare"}
    config = config_of(folder, "openbookqa", data=settings)
    adapter = trained(config, folder, "published")
    manifest = load_artifact(adapter).manifest
    assert manifest.labels.union == ("A", "B", "C", "D")
    assert manifest.prompt.append_eos
    predictor = Predictor.load(adapter, base=str(folder / "base"), device="cpu")
    labels = LabelSet(manifest.labels.labels, manifest.labels.token_ids)
    tokenizer = load_tokenizer(folder / "base")
    rows = evaluation_rows(config.data, tokenizer, labels)
    log_probs = predictor.predict(rows).log_probs
    assert log_probs[..., 4].eq(float("-inf")).all()
    assert log_probs[..., :4].isfinite().all()
    arc = evaluation_rows(config.data, tokenizer, labels, of="arc_challenge")
    assert predictor.predict(arc).log_probs.isfinite().all()
    found, wider = await asked(adapter, folder / "base", QUESTION, WIDER)
    assert found["labels"] == ["A", "B", "C", "D"]
    assert sum(found["probs"]) == pytest.approx(1)
    assert wider["labels"] == ["A", "B", "C", "D", "E"]


def test_reserved_labels_are_not_trained(folder: Path) -> None:
    adapter = trained(config_of(folder, "openbookqa", method={"name": "mle"}), folder, "reserved")
    up = load_artifact(adapter).tensors["lm_head.lora_B"]
    assert up[4].eq(0).all()
    assert up[:4].abs().sum(1).gt(0).all()


def test_the_end_of_the_epoch_changes_no_parameter(folder: Path) -> None:
    """The learning rate is 0 there: published runs do it, and nothing but time is lost."""
    plain = trained(config_of(folder, "sst2", data={"train_rows": 20}), folder, "plain")
    optim = {"run_to_epoch_end": True}
    config = config_of(folder, "sst2", data={"train_rows": 20}, optim=optim)
    longer = trained(config, folder, "longer")
    steps = [load_artifact(a).manifest.provenance["steps"] for a in (plain, longer)]
    assert steps == [5, 6]
    first, second = (load_artifact(a).tensors for a in (plain, longer))
    assert all(torch.equal(first[name], second[name]) for name in first)
    lines = (folder / "longer-run" / "metrics.jsonl").read_text("utf-8").splitlines()
    assert [json.loads(line)["step"] for line in lines if "loss" in line] == [6]


def test_without_shuffling_a_run_reads_the_file_in_order_whatever_its_seed(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[str]] = []

    def noted(rows: list[EncodedExample], **values: Any) -> TokenBatch:
        seen.append([row.id for row in rows])
        return collate(rows, **values)

    monkeypatch.setattr(loop, "collate", noted)

    def order(seed: int, *, no_shuffle: bool) -> list[list[str]]:
        seen.clear()
        data = {"train_rows": 21, "no_shuffle": no_shuffle}
        config = config_of(folder, "sst2", data=data, run={"seed": seed}, method={"name": "mle"})
        trained(config, folder, f"order-{seed}-{no_shuffle}")
        return list(seen)

    rows = load_task("sst2", folder / "data", train_rows=21).train
    first, second = ([row.id for row in rows[k : k + 8]] for k in (0, 8))
    assert order(1, no_shuffle=True) == [first, second, first, second, first]
    assert order(2, no_shuffle=True) == [first, second, first, second, first]
    shuffled = order(1, no_shuffle=False)
    assert sorted(i for batch in shuffled[:3] for i in batch) == sorted(row.id for row in rows)
    assert shuffled[0] != first
