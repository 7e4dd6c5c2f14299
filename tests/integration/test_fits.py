"""Methods that are fitted after training, from files to answers, on tiny models."""

import asyncio
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from typer.testing import CliRunner

from dalorra_core.artifact.store import load_artifact
from dalorra_core.cli import app as core_app
from dalorra_core.data.examples import TextExample
from dalorra_core.errors import BaseMismatchError, ConfigError
from dalorra_core.methods.laplace import PRIOR_PRECISION
from dalorra_core.methods.tfb import SIGMA
from dalorra_core.metrics.uncertainty import summarise
from dalorra_core.predictive.predictor import Predictor, SamplingPlan
from dalorra_core.predictive.shared_base import SharedBase, identify
from dalorra_core.predictive.together import Share, predict_together
from dalorra_core.training.run import run_training
from dalorra_core.training.settings import TrainConfig
from server.app import create_app
from server.engines.local import LocalEngine
from server.ports import BatchKey, BatchRow, Sampling, TextQuestion
from server.settings import Settings
from tests.support.api import async_test
from tests.support.tiny_models import assert_near, save_tiny_base
from tests.support.tiny_tasks import TinyTask, tiny_config

TEXTS = ("transfer the", "is a flight to you", "what", "how to order and alarm of the my")
TFB: dict[str, Any] = {"name": "tfb", "search_steps": 4, "anchor_rows": 20, "search_samples": 3}
METHODS: dict[str, dict[str, Any]] = {
    "laplace": {"name": "laplace", "trained_as": "mle"},
    "last_layer": {"name": "laplace", "trained_as": "mle", "subset": "last_layer"},
    "low_rank": {"name": "laplace", "trained_as": "mle", "kfac_rank": 4},
    "tfb": TFB | {"tolerance": 1.0, "high": 0.5},
    "faithful": TFB | {"search": "faithful", "high": 0.5},
}
TRAINED_AS: dict[str, dict[str, Any]] = {
    "mle": {"name": "mle"},
    "dalorra": {"name": "dalorra", "mask_lr": 3e-2},
    "blob": {"name": "blob"},
}


def settings(task: TinyTask, method: dict[str, Any], **groups: Any) -> TrainConfig:
    """Return the tiny run with exactly this method."""
    config = tiny_config(task, **({"optim": {"steps": 50}} | groups))
    values = config.model_dump(mode="json") | {"method": method}
    return TrainConfig.model_validate(values)


def run(config: TrainConfig, folder: Path, name: str, **options: Any) -> Path:
    silent: Callable[[str], None] = lambda _: None  # noqa: E731
    return run_training(config, folder / name, folder / f"{name}-run", report=silent, **options)


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> TinyTask:
    return TinyTask(tmp_path_factory.mktemp("fits"), "text")


@pytest.fixture(scope="module")
def trained(task: TinyTask, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return artifacts of the methods that others are fitted on."""
    folder = tmp_path_factory.mktemp("trained")
    return {n: run(settings(task, m), folder, n) for n, m in TRAINED_AS.items()}


@pytest.fixture(scope="module")
def fitted(
    task: TinyTask, trained: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("fitted")
    return {
        name: run(settings(task, method), folder, name, from_adapter=trained["mle"])
        for name, method in METHODS.items()
    }


@pytest.fixture(scope="module")
def base(task: TinyTask) -> SharedBase:
    return SharedBase.load(identify(task.base), device="cpu")


def rows_of(predictor: Predictor) -> list[Any]:
    return [predictor.encode(TextExample(f"q{i}", text)) for i, text in enumerate(TEXTS)]


# --- the artifact -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
def test_a_fit_after_training_is_the_fit_from_the_stored_adapter(
    task: TinyTask, fitted: dict[str, Path], tmp_path: Path, name: str
) -> None:
    """Bit for bit: a fit sees the factors as they are stored."""
    whole = load_artifact(run(settings(task, METHODS[name]), tmp_path, "whole"))
    from_there = load_artifact(fitted[name])
    assert whole.tensors.keys() == from_there.tensors.keys()
    for key, value in whole.tensors.items():
        assert torch.equal(value, from_there.tensors[key]), key
    assert "from_adapter" not in whole.manifest.provenance


@pytest.mark.parametrize("name", METHODS)
def test_the_trained_factors_stay_as_they_are(
    trained: dict[str, Path], fitted: dict[str, Path], name: str
) -> None:
    before, after = load_artifact(trained["mle"]), load_artifact(fitted[name])
    for key, value in before.tensors.items():
        assert torch.equal(value, after.tensors[key])
    made = after.manifest.provenance
    assert made["from_adapter"] == {"name": "tiny", "sha256": before.sha256}
    assert made["steps"] == 0
    assert after.manifest.policies


@pytest.mark.parametrize("name", METHODS)
def test_the_mean_is_the_trained_adapter_and_samples_are_not(
    trained: dict[str, Path], fitted: dict[str, Path], base: SharedBase, name: str
) -> None:
    plain = Predictor.on(base, load_artifact(trained["mle"]))
    predictor = Predictor.on(base, load_artifact(fitted[name]))
    rows = rows_of(predictor)
    mean = predictor.predict(rows, SamplingPlan(estimator="mean_mask"))
    assert_near(mean.log_probs, plain.predict(rows).log_probs)
    drawn = predictor.predict(rows, SamplingPlan(5, seed=1))
    assert drawn.log_probs.shape == (5, len(TEXTS), 4)
    assert summarise(drawn.log_probs).mutual_information.max() > 1e-4
    assert drawn.label_mass is not None
    assert mean.label_mass is not None
    if name not in {"tfb", "faithful"}:
        assert_near(drawn.label_mass, mean.label_mass)


def test_tfb_keeps_the_gates_of_dalorra_and_the_mean_of_blob(
    task: TinyTask, trained: dict[str, Path], base: SharedBase, tmp_path: Path
) -> None:
    for name in ("dalorra", "blob"):
        method = TFB | {"trained_as": TRAINED_AS[name], "tolerance": 1.0, "high": 0.5}
        directory = run(settings(task, method), tmp_path, name, from_adapter=trained[name])
        artifact = load_artifact(directory)
        before = Predictor.on(base, load_artifact(trained[name]))
        after = Predictor.on(base, artifact)
        rows, plan = rows_of(after), SamplingPlan(estimator="mean_mask")
        assert artifact.tensors[SIGMA].item() > 0
        assert ("phi" in artifact.tensors) == (name == "dalorra")
        assert not any("sigma_root" in key for key in artifact.tensors)
        assert_near(after.predict(rows, plan).log_probs, before.predict(rows, plan).log_probs)


def test_the_fit_moves_its_own_numbers(fitted: dict[str, Path]) -> None:
    laplace = load_artifact(fitted["laplace"])
    assert 0 < laplace.tensors[PRIOR_PRECISION].item() != 1.0
    assert laplace.tensors["lm_head.lora_A.in_values"].max() > 0.01
    low_rank = load_artifact(fitted["low_rank"]).tensors
    assert low_rank["lm_head.lora_A.in_vectors"].shape == (32, 32)  # too small to be cut
    assert "model.layers.0.self_attn.q_proj.lora_A.in_values" in laplace.tensors
    only = load_artifact(fitted["last_layer"]).tensors
    assert "model.layers.0.self_attn.q_proj.lora_A.in_values" not in only
    assert 0 < load_artifact(fitted["tfb"]).tensors[SIGMA].item() < 0.5


# --- answers ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
def test_company_changes_no_answer_and_deterministic_ones_are_bitwise(
    fitted: dict[str, Path], base: SharedBase, name: str
) -> None:
    artifact = load_artifact(fitted[name])
    predictor, exact = (Predictor.on(base, artifact, deterministic=d) for d in (False, True))
    rows = rows_of(predictor)
    together = predictor.predict(rows).log_probs
    strict = exact.predict(rows).log_probs
    for b, row in enumerate(rows):
        alone = predictor.predict([row]).log_probs[:, 0]
        torch.testing.assert_close(alone, together[:, b], rtol=1e-4, atol=1e-4)
        assert torch.equal(exact.predict([row]).log_probs[:, 0], strict[:, b])
    assert torch.equal(exact.predict(rows[::-1]).log_probs.flip(1), strict)
    given_up = exact.predict(rows, wanted=lambda n: n != 1)
    assert given_up.answered_rows == [0, 2, 3]
    assert torch.equal(given_up.log_probs[:, [0, 2, 3]], strict[:, [0, 2, 3]])


def test_a_laplace_adapter_answers_beside_others(
    trained: dict[str, Path], fitted: dict[str, Path], base: SharedBase
) -> None:
    names = ("laplace", "tfb", "last_layer")
    found = {n: Predictor.on(base, load_artifact(fitted[n])) for n in names}
    found["dalorra"] = Predictor.on(base, load_artifact(trained["dalorra"]))
    plan = SamplingPlan(3, seed=2)
    shares = [Share(p, plan, rows_of(p)) for p in found.values()]
    asked: list[int] = []
    together = predict_together(shares, wanted=lambda n: asked.append(n) is None and n % 4 != 3)
    assert set(asked) == set(range(16))
    for share, prediction in zip(shares, together, strict=True):
        alone = share.predictor.predict(share.rows, plan)
        assert prediction.answered_rows == [0, 1, 2]
        kept = prediction.of_answered()
        torch.testing.assert_close(kept.log_probs, alone.log_probs[:, :3], rtol=1e-4, atol=1e-4)
        assert kept.label_mass is not None
        assert alone.label_mass is not None
        assert_near(kept.label_mass, alone.label_mass[:3])


@async_test
async def test_the_server_answers_with_all_draws(task: TinyTask, fitted: dict[str, Path]) -> None:
    engine = LocalEngine([fitted["laplace"]], base=str(task.base), device="cpu")
    app = create_app(lambda: engine, Settings(batch_wait_ms=20))
    transport = httpx.ASGITransport(app)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url="http://localhost") as client,
    ):
        await app.state.service.lifecycle.loaded()
        assert app.state.service.lifecycle.failure is None
        bodies: list[dict[str, Any]] = [
            {"input": list(TEXTS), "num_samples": 7, "seed": 3, "include": ["samples"]},
            {"input": TEXTS[0], "num_samples": 64},
            {"input": TEXTS[0], "estimator": "mean_mask"},
        ]
        posts = [client.post("/v1/classify", json=body) for body in bodies]
        many, more, mean = await asyncio.gather(*posts)
    predictor = Predictor.load(fitted["laplace"], base=str(task.base), device="cpu")
    rows = rows_of(predictor)
    for response, plan, count in (
        (many, SamplingPlan(7, 3), 4),
        (more, SamplingPlan(64), 1),
        (mean, SamplingPlan(estimator="mean_mask"), 1),
    ):
        assert response.status_code == 200, response.text
        expected = summarise(predictor.predict(rows[:count], plan).log_probs)
        for b, answer in enumerate(response.json()["data"]):
            assert answer["probs"] == pytest.approx(expected.mean_probs[b].tolist(), abs=1e-4)
            information = answer["uncertainty"]["mutual_information"]
            if response is mean:
                assert information is None
            else:
                assert information == pytest.approx(float(expected.mutual_information[b]), abs=1e-4)
    assert len(many.json()["data"][0]["samples"]) == 7
    assert many.json()["sampling"]["mask_set"] == predictor.mask_set(SamplingPlan(7, 3))


def test_a_batch_of_the_engine_holds_rows_of_any_method(
    task: TinyTask, trained: dict[str, Path], fitted: dict[str, Path]
) -> None:
    engine = LocalEngine([], base=str(task.base), device="cpu")
    engine.load()
    places = {"laplace": fitted["laplace"], "last": fitted["last_layer"], "tfb": fitted["tfb"]}
    cards = [
        engine.load_adapter(directory, name)
        for name, directory in (places | {"dalorra": trained["dalorra"]}).items()
    ]
    batches = [
        [
            BatchRow(BatchKey(c.key, Sampling(3)), engine.encode(c.key, TextQuestion(t), "none"))
            for t in TEXTS
        ]
        for c in cards
    ]
    mixed = [row for rows in zip(*batches, strict=True) for row in rows]
    found = engine.run_batch(mixed, lambda place: place != 5).rows
    for n, batch in enumerate(batches):
        alone = engine.run_batch(batch, lambda _: True).rows
        for b, (one, other) in enumerate(zip(found[n::4], alone, strict=True)):
            if (n, b) == (1, 1):
                assert one is None
                continue
            assert one is not None
            assert other is not None
            assert one.probs == pytest.approx(other.probs, abs=1e-4)
            assert one.mutual_information == pytest.approx(other.mutual_information, abs=1e-4)
            assert len(one.samples) == 3
    engine.close()


# --- what is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"adapter": {"r": 2}}, r"adapter\.r: 4 there, 2 here"),
        ({"adapter": {"lora_alpha": 4}}, r"adapter\.lora_alpha: 8\.0 there, 4\.0 here"),
        ({"adapter": {"target_modules": ["q_proj"]}}, r"5 modules \(.*there, 2 modules \(.* here"),
        ({"data": {"max_tokens": 77}}, r"data\.max_tokens: 300 there, 77 here"),
        ({"data": {"prompt": "Say {text}:"}}, r"data\.prompt: '.*there, 'Say \{text\}:' here"),
        ({"data": {"append_eos": True}}, r"data\.append_eos: False there, True here"),
    ],
)
def test_another_adapter_than_the_run_would_train_is_refused(
    task: TinyTask,
    trained: dict[str, Path],
    tmp_path: Path,
    changes: dict[str, Any],
    said: str,
) -> None:
    config = settings(task, METHODS["tfb"], **changes)
    with pytest.raises(ConfigError, match=said):
        run(config, tmp_path, "out", from_adapter=trained["mle"])
    assert not (tmp_path / "out").exists()


def test_other_labels_and_their_tokens_are_refused(
    task: TinyTask, trained: dict[str, Path], tmp_path: Path
) -> None:
    other = tmp_path / "data"
    shutil.copytree(task.data, other)
    for split in other.iterdir():
        split.write_text(split.read_text("utf-8").replace('"food"', '"weather"'), "utf-8")
    config = settings(task, METHODS["tfb"], data={"source": str(other)})
    with pytest.raises(
        ConfigError, match=r"labels: \('food', .*there, \('money', .* here"
    ) as found:
        run(config, tmp_path, "out", from_adapter=trained["mle"])
    assert "label tokens: (" in str(found.value)


def test_another_method_or_its_settings_are_refused(
    task: TinyTask, trained: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"method\.name: 'dalorra' there, 'mle' here"):
        run(settings(task, TFB), tmp_path, "out", from_adapter=trained["dalorra"])
    method = TFB | {"trained_as": {"name": "dalorra", "mask_lr": 0.5}}
    with pytest.raises(ConfigError, match=r"method\.mask_lr: 0\.03 there, 0\.5 here"):
        run(settings(task, method), tmp_path, "out", from_adapter=trained["dalorra"])
    with pytest.raises(
        ConfigError, match=r"for methods that are fitted .*laplace, tfb.* got .*mle"
    ):
        run(settings(task, {"name": "mle"}), tmp_path, "out", from_adapter=trained["mle"])


def test_another_base_model_is_refused(trained: dict[str, Path], tmp_path: Path) -> None:
    other = TinyTask(tmp_path / "other", "text")
    shutil.rmtree(other.base)
    save_tiny_base(other.base, seed=1)
    with pytest.raises(BaseMismatchError, match="fingerprint"):
        run(settings(other, METHODS["tfb"]), tmp_path, "out", from_adapter=trained["mle"])


def test_a_posterior_of_a_layer_that_is_not_adapted_is_refused_before_training(
    task: TinyTask, tmp_path: Path
) -> None:
    config = settings(task, METHODS["last_layer"], adapter={"target_modules": ["q_proj"]})
    with pytest.raises(ConfigError, match="last_layer needs lm_head"):
        run(config, tmp_path, "out")
    assert not (tmp_path / "out-run").exists()


def test_the_command_line_starts_from_an_adapter(
    task: TinyTask, trained: dict[str, Path], fitted: dict[str, Path], tmp_path: Path
) -> None:
    config = tmp_path / "tfb.json"
    config.write_text(settings(task, METHODS["tfb"]).model_dump_json(), encoding="utf-8")
    arguments = ["train", "-c", str(config), "-o", str(tmp_path / "out")]
    arguments += ["--run-dir", str(tmp_path / "run"), "--from-adapter", str(trained["mle"])]
    found = CliRunner().invoke(core_app, arguments)
    assert found.exit_code == 0, found.output
    assert load_artifact(tmp_path / "out").sha256 == load_artifact(fitted["tfb"]).sha256
    shown = CliRunner().invoke(core_app, ["inspect", str(tmp_path / "out")])
    assert "sigma_q" in shown.output
