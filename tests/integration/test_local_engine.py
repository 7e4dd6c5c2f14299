"""The real engine behind the real API, on tiny models trained for a moment."""

import asyncio
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from dalorra_core.data.examples import TextExample
from dalorra_core.metrics.uncertainty import summarise
from dalorra_core.predictive.predictor import Predictor, SamplingPlan
from dalorra_core.training.run import run_training
from dalorra_core.training.settings import load_config
from server.app import create_app
from server.engines.local import LocalEngine
from server.ports import EngineStoppedError, RowRejectedError, Sampling, TextQuestion
from server.settings import Settings
from tests.integration.test_api_bad_input import check_problem
from tests.support.api import async_test
from tests.support.tiny_artifacts import save_tiny_adapter
from tests.support.tiny_models import save_tiny_base, write_jsonl

TEXTS = ["transfer to my account", "book a flight", "set an alarm to five", "book a hotel"]
LABELS = ["transfer", "flight", "alarm", "hotel"]
QUESTION = {"question": "which is a word", "choices": ["yes", "no", "maybe"]}


def train(folder: Path, kind: str, method: str) -> Path:
    """Train a tiny adapter for two steps and return its directory."""
    base = save_tiny_base(folder / "base")
    rows: list[dict[str, Any]] = (
        [{"id": str(n), "text": TEXTS[n % 4], "label": LABELS[n % 4]} for n in range(12)]
        if kind == "text"
        else [
            {
                "id": str(n),
                "question": f"which is word {n}",
                "context": None,
                "choices": [{"label": label, "text": "x"} for label in "ABCD"],
                "answer": "ABCD"[n % 4],
            }
            for n in range(12)
        ]
    )
    for split in ("train", "validation"):
        write_jsonl(folder / "data" / f"{split}.jsonl", rows)
    overrides = [
        f"name=tiny-{kind}-{method}",
        f"base={base}",
        f"method={method}",
        f"data.source={folder / 'data'}",
        "data.max_tokens=96",
        "optim.steps=2",
        "run.device=cpu",
        "predictive.num_samples=3",
    ]
    config = load_config(None, overrides)
    return run_training(config, folder / "adapter", folder / "run", report=lambda _line: None)


@pytest.fixture(scope="module")
def text_adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("text"), "text", "dalorra")


@pytest.fixture(scope="module")
def choice_adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("choice"), "choice", "dalorra")


@pytest.fixture(scope="module")
def point_adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("point"), "text", "mle")


def base_of(adapter: Path) -> str:
    """Return the base model's directory, which the artifact names without its path."""
    return str(adapter.parent / "base")


async def ask(adapter: Path, *bodies: dict[str, Any]) -> list[httpx.Response]:
    """Serve an adapter and send every body at the same time."""
    engine = LocalEngine([adapter], base=base_of(adapter), device="cpu")
    app = create_app(lambda: engine, Settings(batch_wait_ms=20))
    transport = httpx.ASGITransport(app)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url="http://localhost") as client,
    ):
        await app.state.service.lifecycle.loaded()
        assert app.state.service.lifecycle.failure is None
        sent = [client.post("/v1/classify", json=body) for body in bodies]
        return list(await asyncio.gather(*sent))


@async_test
async def test_the_api_gives_the_predictors_numbers(text_adapter: Path) -> None:
    predictor = Predictor.load(text_adapter, base=base_of(text_adapter), device="cpu")
    row = predictor.encode(TextExample("row", TEXTS[0]))
    plan = SamplingPlan(num_samples=5, seed=2)
    prediction = predictor.predict([row], plan)
    summary = summarise(prediction.log_probs)
    body = {"input": TEXTS[0], "num_samples": 5, "seed": 2, "include": ["samples"]}
    (response,) = await ask(text_adapter, body)
    assert response.status_code == 200, response.text
    answer = response.json()
    (found,) = answer["data"]
    assert found["labels"] == list(predictor.labels)
    assert found["probs"] == pytest.approx(summary.mean_probs[0].tolist(), abs=1e-6)
    assert prediction.label_mass is not None
    assert found["label_mass"] == pytest.approx(prediction.label_mass[0].item(), abs=1e-6)
    unsure = found["uncertainty"]
    for name in (
        *("predictive_entropy", "expected_entropy", "mutual_information"),
        *("normalized_entropy", "variation_ratio", "confidence_std"),
    ):
        assert unsure[name] == pytest.approx(getattr(summary, name)[0].item(), abs=1e-6), name
    samples = torch.tensor(found["samples"], dtype=torch.float64)
    assert torch.allclose(samples, prediction.log_probs[:, 0].double().exp(), atol=1e-6)
    assert answer["sampling"]["mask_set"] == predictor.mask_set(plan)
    assert answer["usage"]["prompt_tokens"] == len(row.token_ids)


@async_test
async def test_alone_equals_batched_equals_restarted(text_adapter: Path) -> None:
    alone = [(await ask(text_adapter, {"input": text}))[0].json()["data"][0] for text in TEXTS[:2]]
    together = await ask(text_adapter, *({"input": [text, "x " * 30]} for text in TEXTS))
    for one, response in zip(alone, together, strict=False):
        assert response.json()["data"][0]["probs"] == pytest.approx(one["probs"], abs=1e-5)


@async_test
async def test_a_policy_of_the_artifact_decides(text_adapter: Path) -> None:
    manifest = Predictor.load(text_adapter, base=base_of(text_adapter), device="cpu").manifest
    (response,) = await ask(text_adapter, {"input": TEXTS})
    answer = response.json()
    if manifest.policies:
        assert answer["policy"]["name"] == manifest.policies[0].name
        assert answer["policy"]["guarantee"] is None
        assert all(row["calibrated"] for row in answer["data"])
    assert {row["decision"] for row in answer["data"]} <= {"accept", "review", "abstain"}


@async_test
async def test_mean_mask_and_point_methods(text_adapter: Path, point_adapter: Path) -> None:
    (mean,) = await ask(text_adapter, {"input": TEXTS[0], "estimator": "mean_mask"})
    (point,) = await ask(point_adapter, {"input": TEXTS[0]})
    for response in (mean, point):
        assert response.status_code == 200, response.text
        body = response.json()
        assert body["data"][0]["uncertainty"]["mutual_information"] is None
        assert (body["sampling"]["num_samples"], body["sampling"]["mask_set"]) == (1, None)


@async_test
async def test_one_sample_has_a_mutual_information_of_zero(text_adapter: Path) -> None:
    body: dict[str, Any] = {"input": TEXTS[0], "num_samples": 1}
    (response,) = await ask(text_adapter, body)
    if response.status_code == 422:  # the artifact's policy may limit mutual information
        check_problem(response, 422, "policy_not_applicable")
    else:
        unsure = response.json()["data"][0]["uncertainty"]
        assert unsure["mutual_information"] == 0


@async_test
async def test_choices_keep_the_clients_order(choice_adapter: Path) -> None:
    labelled = [{"label": label, "text": "x"} for label in "CAB"]
    bodies = [{"input": QUESTION}, {"input": [{"question": "which", "choices": labelled}]}]
    strings, objects = await ask(choice_adapter, *bodies)
    assert strings.status_code == objects.status_code == 200, strings.text
    (row,) = strings.json()["data"]
    assert row["labels"] == ["A", "B", "C"]
    assert sum(row["probs"]) == pytest.approx(1)
    (row,) = objects.json()["data"]
    assert row["labels"] == ["C", "A", "B"]
    assert row["label"] == row["labels"][row["probs"].index(max(row["probs"]))]


@async_test
async def test_input_the_adapter_cannot_take(text_adapter: Path, choice_adapter: Path) -> None:
    long = "word " * 300
    refused, cut = await ask(text_adapter, {"input": long}, {"input": [long], "truncate": "start"})
    body = check_problem(refused, 422, "input_too_long")
    assert body["errors"][0]["limit"] == 96
    assert body["errors"][0]["actual"] > 300
    (row,) = cut.json()["data"]
    assert row["truncated"]
    assert row["decision"] != "accept"
    strange = [{"label": label, "text": "x"} for label in ("A", "Q")]
    (unknown,) = await ask(choice_adapter, {"input": {"question": "q", "choices": strange}})
    check_problem(unknown, 422, "input_rejected")


def test_the_card_names_the_base_without_its_path(text_adapter: Path) -> None:
    engine = LocalEngine([text_adapter], base=base_of(text_adapter), device="cpu")
    (card,) = engine.load()
    assert card.base == "base"
    assert (card.kind, card.method, card.defaults.num_samples) == ("text", "dalorra", 3)
    assert card.selftest_max_abs_error is None or card.selftest_max_abs_error < 1e-3
    assert engine.preferred_batch_tokens >= 1
    with pytest.raises(RowRejectedError):
        engine.encode("another", TextQuestion("x"), "none")
    engine.close()
    with pytest.raises(EngineStoppedError, match="before load"):
        engine.encode(card.key, TextQuestion("x"), "none")


@pytest.mark.parametrize(("method", "unpadded"), [("dalorra", True), ("amortised_prompt", False)])
def test_rows_go_without_padding_where_the_method_treats_them_alike(
    text_adapter: Path, tmp_path: Path, method: str, *, unpadded: bool
) -> None:
    base = base_of(text_adapter)
    place = save_tiny_adapter(tmp_path / "a", Path(base), method=method)
    engine = LocalEngine([place], base=str(base), device="cpu")
    (card,) = engine.load()
    assert card.unpadded == unpadded
    assert card.batch_key(Sampling(3)).unpadded == unpadded
    assert not card.batch_key(Sampling(256, estimator="linearised")).unpadded
    engine.close()


def test_padding_is_dear_on_a_cpu(text_adapter: Path) -> None:
    engine = LocalEngine([text_adapter], base=str(base_of(text_adapter)), device="cpu")
    assert engine.worthwhile_padding == 0.1
