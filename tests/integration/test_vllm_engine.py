"""The vLLM engine against a server that computes with PEFT: our numbers, and every fault."""

import asyncio
import contextlib
import json
import math
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from fastapi import FastAPI
from starlette.responses import JSONResponse, Response
from typer.testing import CliRunner

from benchmarks.serving.vllm_parity import Parity, main
from dalorra_core.artifact.manifest import PromptRef
from dalorra_core.artifact.store import load_artifact
from dalorra_core.base_models.loading import load_tokenizer
from dalorra_core.cli import app as core_commands
from dalorra_core.data.prompts import CHOICE_TEMPLATES
from dalorra_core.methods.ensemble import EnsembleConfig
from server.app import create_app
from server.engines.local import LocalEngine
from server.engines.vllm import VllmEngine, VllmPlace
from server.ports import (
    AdapterBaseMismatchError,
    AdapterCard,
    AdapterLoadError,
    AdapterSelfTestError,
    BatchKey,
    BatchRow,
    ChoiceOption,
    ChoiceQuestion,
    Engine,
    EngineStoppedError,
    EngineUnavailableError,
    NotCalibratedError,
    Question,
    RowRejectedError,
    RowScores,
    Sampling,
    TextQuestion,
)
from server.settings import Settings
from tests.integration.test_api_bad_input import check_problem
from tests.integration.test_local_engine import base_of, train
from tests.integration.test_local_engine_calibrated import TEMPERATURE, calibrate_by_hand
from tests.support.api import async_test, until
from tests.support.fake_vllm import FakeVllm, VllmFlags, fake_vllm
from tests.support.tiny_artifacts import TEXTS, save_tiny_adapter
from tests.support.tiny_models import save_tiny_base

pytestmark = pytest.mark.filterwarnings(
    "ignore:.is_gradient_checkpointing:FutureWarning",  # PEFT's own
    "ignore:Model with `tie_word_embeddings=True`",  # and nothing is merged
    "ignore:Already found a `peft_config`",
)

QUESTIONS = tuple(TextQuestion(text) for text in TEXTS)
SAMPLING = Sampling(num_samples=3, seed=5, design="stratified")


def exported(adapter: Path, mask: str = "samples:3", *more: object) -> Path:
    """Export an adapter for vLLM beside it, and return the directory."""
    output = adapter.with_name(f"{adapter.name}-{mask.replace(':', '')}")
    arguments = ["export", adapter, "-o", output, "--mask", mask, "--engine", "vllm", *more]
    arguments += ["--device", "cpu", "--no-verify"]
    result = CliRunner().invoke(core_commands, [str(a) for a in arguments])
    assert result.exit_code == 0, result.output
    return output


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_base(tmp_path_factory.mktemp("vllm") / "base")


@pytest.fixture(scope="module")
def adapter(base: Path) -> Path:
    return save_tiny_adapter(base.parent / "tiny", base)


@pytest.fixture(scope="module")
def export(adapter: Path) -> Path:
    return exported(adapter, "samples:3", "--design", "stratified", "--seed", 5)


@pytest.fixture
def vllm(base: Path) -> Iterator[FakeVllm]:
    with fake_vllm(base) as server:
        yield server


def engine_on(vllm: FakeVllm, adapter: Path, export: Path, **place: Any) -> VllmEngine:
    values: dict[str, Any] = {"timeout_s": 10.0, "start_s": 0.0, "watch_s": 0.1}
    where = VllmPlace(url=vllm.url, export=export, **{**values, **place})
    return VllmEngine(adapter, where, base=str(vllm.flags.base))


@contextlib.contextmanager
def loaded(engine: Engine) -> Iterator[AdapterCard]:
    try:
        (card,) = engine.load()
        yield card
    finally:
        engine.close()


def refusal(engine: VllmEngine, kind: type[AdapterLoadError] = AdapterLoadError) -> str:
    """Return why an engine does not load."""
    try:
        with pytest.raises(kind) as told:
            engine.load()
        return str(told.value)
    finally:
        engine.close()


def answers(
    engine: Engine, card: AdapterCard, questions: tuple[Question, ...], sampling: Sampling
) -> list[RowScores]:
    key = BatchKey(card.key, sampling)
    rows = [BatchRow(key, engine.encode(card.key, q, "none")) for q in questions]
    found = engine.run_batch(rows, lambda _place: True).rows
    return [scores for scores in found if scores is not None]


def check_same(ours: list[RowScores], theirs: list[RowScores]) -> None:
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        assert other.labels == one.labels
        assert other.probs == pytest.approx(one.probs, abs=1e-4)
        for mine, its in zip(one.samples, other.samples, strict=True):
            assert its == pytest.approx(mine, abs=1e-4)
        for name in ("confidence", "predictive_entropy", "variation_ratio", "combined"):
            assert getattr(other, name) == pytest.approx(getattr(one, name), abs=1e-4), name
        for name in ("expected_entropy", "mutual_information", "confidence_std"):
            assert getattr(other, name) == pytest.approx(getattr(one, name), abs=1e-4), name
        assert other.label_mass is None
        assert other.prediction_set == one.prediction_set


def check_as_local(
    vllm: FakeVllm,
    adapter: Path,
    export: Path,
    questions: tuple[Question, ...],
    sampling: Sampling | None = None,
) -> AdapterCard:
    """Compare both engines on some questions; return the card of the vLLM engine."""
    remote = engine_on(vllm, adapter, export)
    local = LocalEngine([adapter], base=str(vllm.flags.base), device="cpu")
    with loaded(remote) as card, loaded(local) as own:
        assert sampling in (None, card.defaults)
        check_same(
            answers(local, own, questions, card.defaults),
            answers(remote, card, questions, card.defaults),
        )
        own_set = local.mask_set(BatchKey(own.key, card.defaults))
        assert remote.mask_set(BatchKey(card.key, card.defaults)) == own_set == card.mask_set
        assert remote.self_test(card.key).passed
    return card


# -- the same numbers ---------------------------------------------------------------------------


def test_vllm_gives_the_local_engines_numbers(vllm: FakeVllm, adapter: Path, export: Path) -> None:
    card = check_as_local(vllm, adapter, export, QUESTIONS, SAMPLING)
    assert (card.name, card.method, card.base, card.dtype) == ("tiny", "dalorra", "base", "float32")
    assert card.selftest_max_abs_error is not None
    assert card.selftest_max_abs_error < 1e-5
    assert len(vllm.names) == 3
    body = vllm.asked[-1]
    tokenizer = load_tokenizer(vllm.flags.base)
    assert all(isinstance(token, int) for prompt in body["prompt"] for token in prompt)
    assert body["prompt"][0][0] == tokenizer.bos_token_id
    assert (body["max_tokens"], body["logprobs"], body["temperature"]) == (1, 4, 0.0)


def test_adapters_given_at_start_need_no_loading(base: Path, adapter: Path, export: Path) -> None:
    with fake_vllm(base) as first, loaded(engine_on(first, adapter, export)):
        names = first.names
    modules = {name: export / f"sample-{m:03d}" for m, name in enumerate(names)}
    with fake_vllm(base, runtime=False, modules=modules) as vllm:
        check_as_local(vllm, adapter, export, QUESTIONS)


def test_calibration_that_came_after_the_export_is_used(vllm: FakeVllm, tmp_path: Path) -> None:
    """Temperature, combined score (made of the label mass, too) and policies, but no promises."""
    adapter = train(tmp_path, "text", "dalorra")
    out = exported(adapter, "samples:3", "--base", base_of(adapter))
    calibrate_by_hand(adapter)
    engine = VllmEngine(adapter, VllmPlace(vllm.url, out, start_s=0.0), base=base_of(adapter))
    local = LocalEngine([adapter], base=base_of(adapter), device="cpu")
    with loaded(engine) as card, loaded(local) as own:
        theirs = answers(engine, card, QUESTIONS, card.defaults)
        for mine, its in zip(answers(local, own, QUESTIONS, own.defaults), theirs, strict=True):
            assert its.probs == pytest.approx(mine.probs, abs=1e-4)
            assert its.combined == pytest.approx(mine.combined, abs=1e-3)
            assert its.label_mass == pytest.approx(mine.label_mass, rel=1e-2)
            assert its.prediction_set is None  # its coverage was measured elsewhere
            assert mine.prediction_set is not None
        assert card.calibration is not None
        assert card.calibration.temperature == TEMPERATURE
        assert card.calibration.void == "measured with engine local (here: vllm)"
        assert any(policy.guarantee is not None for policy in own.policies)
        assert all(policy.guarantee is None for policy in card.policies)
        assert [policy.accept for policy in card.policies] == [p.accept for p in own.policies]
        asked: dict[str, float] = {"out_of_scope_share": 0.0, "delta": 0.1}
        curve = engine.risk_coverage(card.key, "confidence", **asked)
        assert curve == local.risk_coverage(own.key, "confidence", **asked)
        found = engine.evaluate_policy(card.key, card.policies[0], **asked)
        assert found == local.evaluate_policy(own.key, own.policies[0], **asked)


@pytest.mark.parametrize("average", ["probabilities", "logits"])
def test_ensembles_are_averaged_as_they_were_trained(
    vllm: FakeVllm, base: Path, average: Any
) -> None:
    config = EnsembleConfig(num_members=3, average=average)
    adapter = save_tiny_adapter(base.parent / f"ensemble-{average}", base, config=config)
    card = check_as_local(vllm, adapter, exported(adapter), QUESTIONS)
    assert card.point_method == (average == "logits")
    assert len(vllm.names) == 3


def test_a_point_method_is_one_adapter(vllm: FakeVllm, base: Path) -> None:
    adapter = save_tiny_adapter(base.parent / "point", base, method="mle")
    card = check_as_local(vllm, adapter, exported(adapter, "mean"), QUESTIONS)
    assert (card.point_method, card.mask_set, card.fixed_sampling) == (True, None, None)
    assert len(vllm.names) == 1


def test_choices_are_normalised_over_their_own_labels(vllm: FakeVllm, base: Path) -> None:
    template = CHOICE_TEMPLATES["rl_fixed"]
    prompt = PromptRef(
        kind="choice",
        name=template.name,
        template=template.template,
        sha256=template.sha256,
        max_tokens=96,
    )
    adapter = save_tiny_adapter(base.parent / "choice", base, prompt=prompt, golden=())
    names = load_artifact(adapter).manifest.labels.labels
    questions = tuple(
        ChoiceQuestion("which", tuple(ChoiceOption(names[i], "x") for i in order))
        for order in ((2, 0), (3, 1, 0), (0, 1, 2, 3))
    )
    card = check_as_local(vllm, adapter, exported(adapter), questions)
    assert card.selftest_max_abs_error is None
    assert any(len(body["prompt"][0]) == 8 for body in vllm.asked)  # without probes, one row is


def test_the_comparison_with_a_real_vllm_holds_with_this_one(
    vllm: FakeVllm, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "parity.json"
    arguments = ["--url", vllm.url, "--adapter", str(adapter), "--samples", "3"]
    assert main([*arguments, "--output", str(output)]) == 0
    found = json.loads(output.read_text("utf-8"))
    assert json.loads(capsys.readouterr().out) == found
    assert (found["rows"], found["num_samples"], found["label_mass"]) == (12, 3, None)
    assert found["probabilities"] < 1e-5
    assert not replace(Parity(**found), probabilities=math.nan).holds


# -- what cannot be loaded ----------------------------------------------------------------------


def test_a_server_that_is_not_there(base: Path, adapter: Path, export: Path) -> None:
    with fake_vllm(base) as vllm:
        pass
    text = refusal(engine_on(vllm, adapter, export, start_s=0.3))
    assert f"vLLM at {vllm.url} cannot be reached (ConnectError)" in text
    assert "vllm_start_s (0.3 s) have passed" in text
    assert "--max-loras 3 --max-cpu-loras 3 --max-lora-rank 8 --max-logprobs 4" in text


def test_a_server_that_comes_late_is_waited_for(base: Path, adapter: Path, export: Path) -> None:
    vllm = FakeVllm(VllmFlags(base))
    vllm.start()
    vllm.stop()
    late = threading.Timer(0.5, vllm.start)
    late.start()
    try:
        with loaded(engine_on(vllm, adapter, export, start_s=60.0)) as card:
            assert card.name == "tiny"
    finally:
        late.join()
        vllm.stop()


def test_closing_ends_the_waiting(base: Path, adapter: Path, export: Path) -> None:
    with fake_vllm(base) as vllm:
        pass
    engine = engine_on(vllm, adapter, export, start_s=600.0)
    threading.Timer(0.5, engine.close).start()
    with pytest.raises(EngineStoppedError):
        engine.load()
    with pytest.raises(EngineStoppedError, match="before load"):
        engine.encode("tiny", QUESTIONS[0], "none")


def _stopped(engine: VllmEngine) -> bool:
    """Return whether loading ends because the engine was closed."""
    try:
        engine.load()
    except EngineStoppedError:
        return True
    return False


def test_closing_ends_a_question(vllm: FakeVllm, adapter: Path, export: Path) -> None:
    vllm.delay_s = 60.0
    engine = engine_on(vllm, adapter, export, timeout_s=120.0)
    told: list[bool] = []
    loading = threading.Thread(target=lambda: told.append(_stopped(engine)))
    loading.start()
    end_s = time.monotonic() + 60
    while not vllm.asked:  # the golden probes
        assert time.monotonic() < end_s
        time.sleep(0.01)
    engine.close()
    loading.join(30)
    assert told == [True]


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (
            {"runtime": False},
            "loads no adapters at run time, and 3 of 3 samples are not there: tiny-000-",
        ),
        ({"runtime": False}, "--lora-modules tiny-000-"),
        ({"max_logprobs": 3}, "sample logprobs of 4, which is greater than max allowed: 3"),
        ({"max_logprobs": 3}, "Start vLLM with --enable-lora"),
        (
            {"logprobs_mode": "raw_logprobs"},
            "of 4 label tokens (the first is 17): start vLLM with --logprobs-mode processed",
        ),
        ({"max_model_len": 64}, "--max-model-len of at least 65"),
        ({"api_key": "k"}, "answers 401: vllm_api_key must be the --api-key"),
    ],
)
def test_a_server_with_the_wrong_flags(
    base: Path, adapter: Path, export: Path, flags: dict[str, Any], says: str
) -> None:
    with fake_vllm(base, **flags) as vllm:
        text = refusal(engine_on(vllm, adapter, export, start_s=600.0))  # and nobody waits
    assert says.replace("(the first is 17)", "") in text.replace(_first(text), "")


def _first(text: str) -> str:
    """Return the part that names the first missing token, which depends on the model."""
    start = text.find("(the first is")
    return "" if start < 0 else text[start : text.find(")", start) + 1]


def test_the_key_is_sent(base: Path, adapter: Path, export: Path) -> None:
    with (
        fake_vllm(base, api_key="k") as vllm,
        loaded(engine_on(vllm, adapter, export, api_key="k")) as card,
    ):
        assert card.name == "tiny"


def test_another_base_model_is_found_by_the_golden_probes(
    base: Path, adapter: Path, export: Path
) -> None:
    other = save_tiny_base(base.parent / "other-base", seed=1)
    with fake_vllm(other) as vllm:
        engine = engine_on(vllm, adapter, export)
        text = refusal(engine, AdapterBaseMismatchError)  # the files here are others, too
        vllm_of_other = VllmPlace(url=vllm.url, export=export, start_s=0.0)
        text = refusal(VllmEngine(adapter, vllm_of_other, base=str(base)), AdapterSelfTestError)
    assert "differ from the export's golden probes by" in text
    assert "the limit in float32 is 0.0001" in text
    assert "vLLM must serve" in text


def test_an_export_that_vllm_does_not_see(vllm: FakeVllm, adapter: Path, export: Path) -> None:
    text = refusal(engine_on(vllm, adapter, export, export_there="/elsewhere"))
    assert "answers 404" in text
    assert "No adapter found" in text


def test_something_else_that_listens(vllm: FakeVllm, adapter: Path, export: Path) -> None:
    place = VllmPlace(url=f"{vllm.url}/nothing", export=export, start_s=0.0)
    engine = VllmEngine(adapter, place, base=str(vllm.flags.base))
    assert "answers 404: Not Found" in refusal(engine)


def test_exports_that_do_not_belong_to_the_adapter(
    vllm: FakeVllm, base: Path, adapter: Path, export: Path
) -> None:
    other = save_tiny_adapter(base.parent / "other", base, seed=3)
    assert "must be an export of other with sha256" in refusal(engine_on(vllm, other, export))
    mean = exported(adapter, "mean")
    assert "must hold what is served of tiny, got mask mean" in refusal(
        engine_on(vllm, adapter, mean)
    )
    assert "dalorra-export.json" in refusal(engine_on(vllm, adapter, base))
    assert vllm.names == []


# -- faults while it runs -----------------------------------------------------------------------


@contextlib.asynccontextmanager
async def serving(
    engine: VllmEngine, **settings: Any
) -> AsyncIterator[tuple[FastAPI, httpx.AsyncClient]]:
    """Serve the engine behind the whole API."""
    app = create_app(lambda: engine, Settings(feedback_url="off", batch_wait_ms=0, **settings))  # type: ignore[arg-type]
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(
            transport=httpx.ASGITransport(app), base_url="http://localhost", timeout=60
        ) as client,
    ):
        await app.state.service.lifecycle.loaded()
        assert app.state.service.lifecycle.failure is None, app.state.service.lifecycle.failure
        yield app, client


async def classify(client: httpx.AsyncClient, **more: Any) -> httpx.Response:
    headers = more.pop("headers", {})
    return await client.post("/v1/classify", json={"input": TEXTS[0], **more}, headers=headers)


async def readiness(client: httpx.AsyncClient, status: int) -> str:
    """Wait until readiness has this status, and return what it says."""
    end_s = time.monotonic() + 30
    while (response := await client.get("/health/ready")).status_code != status:
        assert time.monotonic() < end_s, response.text
        await asyncio.sleep(0.02)
    return response.text


async def check_well(client: httpx.AsyncClient, before: httpx.Response) -> None:
    """Ready, and the same numbers as before."""
    await readiness(client, 200)
    response = await classify(client)
    assert response.status_code == 200, response.text
    (row,), (then,) = response.json()["data"], before.json()["data"]
    assert row["probs"] == pytest.approx(then["probs"], abs=1e-6)


@async_test
async def test_the_api_serves_one_sampling(vllm: FakeVllm, adapter: Path, export: Path) -> None:
    async with serving(engine_on(vllm, adapter, export)) as (_, client):
        response = await classify(client)
        assert response.status_code == 200, response.text
        body = response.json()
        assert (body["sampling"]["num_samples"], body["sampling"]["seed"]) == (3, 5)
        assert body["sampling"]["design"] == "stratified"
        assert body["data"][0]["label_mass"] is None
        assert body["data"][0]["uncertainty"]["mutual_information"] > 0
        for name, value in {
            "num_samples": 2,
            "seed": 0,
            "estimator": "mean_mask",
            "design": "iid",
        }.items():
            refused = check_problem(await classify(client, **{name: value}), 422, "invalid_request")
            assert "vLLM, which holds these exported samples only" in refused["detail"]
        card = (await client.get("/v1/models/tiny")).json()
        assert card["limits"]["max_num_samples"] == 3


@async_test
async def test_a_server_that_dies_and_comes_back(
    vllm: FakeVllm, adapter: Path, export: Path
) -> None:
    async with serving(engine_on(vllm, adapter, export)) as (_, client):
        before = await classify(client)
        await asyncio.to_thread(vllm.stop)
        told = await readiness(client, 503)  # without any request
        assert "vLLM cannot be reached" in told
        assert vllm.url not in told
        response = await classify(client, input=list(TEXTS))
        check_problem(response, 503, "engine_unavailable")
        assert response.headers["retry-after"] == "5"
        assert vllm.url not in response.text
        assert (await client.get("/health/live")).status_code == 200
        await asyncio.to_thread(vllm.start)  # and has forgotten every adapter
        await check_well(client, before)
        assert len(vllm.names) == 3


@async_test
async def test_a_server_that_comes_back_with_another_model_is_not_asked(
    base: Path, vllm: FakeVllm, adapter: Path, export: Path
) -> None:
    engine = VllmEngine(
        adapter, VllmPlace(vllm.url, export, start_s=0.0, watch_s=0.1), base=str(base)
    )
    async with serving(engine) as (_, client):
        before = await classify(client)
        await asyncio.to_thread(vllm.stop)
        vllm.flags = replace(vllm.flags, base=save_tiny_base(base.parent / "changed", seed=2))
        await asyncio.to_thread(vllm.start)
        end_s = time.monotonic() + 30
        while "golden probes" not in await readiness(client, 503):
            assert time.monotonic() < end_s
        check_problem(await classify(client), 503, "engine_unavailable")
        await asyncio.to_thread(vllm.stop)
        vllm.flags = replace(vllm.flags, base=base)
        await asyncio.to_thread(vllm.start)
        await check_well(client, before)


@async_test
async def test_an_adapter_that_was_unloaded_is_loaded_again(
    vllm: FakeVllm, adapter: Path, export: Path
) -> None:
    async with serving(engine_on(vllm, adapter, export, watch_s=30.0)) as (_, client):
        before = await classify(client)
        vllm.forget(vllm.names[1])
        check_problem(await classify(client), 503, "engine_unavailable")
        await check_well(client, before)  # long before the next regular look


@pytest.mark.parametrize(
    ("fault", "status", "code"),
    [
        (lambda: JSONResponse({"error": {"message": "slow down"}}, 429), 503, "engine_unavailable"),
        (lambda: Response("upstream is gone", 502), 503, "engine_unavailable"),
        (lambda: JSONResponse({"error": "Unauthorized"}, 401), 503, "engine_unavailable"),
        (lambda: Response("<html>", 200), 500, "internal_error"),
        (lambda: JSONResponse({"choices": []}), 500, "internal_error"),
        (lambda: JSONResponse({"error": {"message": "no"}}, 400), 500, "internal_error"),
    ],
    ids=["busy", "bad gateway", "key", "no json", "no answer", "refused"],
)
@async_test
async def test_an_answer_that_is_none_fails_its_request_only(
    base: Path,
    adapter: Path,
    export: Path,
    fault: Callable[[], Response],
    status: int,
    code: str,
) -> None:
    with fake_vllm(base) as vllm:
        async with serving(engine_on(vllm, adapter, export)) as (app, client):
            before = await classify(client)
            vllm.fault = fault()
            check_problem(await classify(client), status, code)
            vllm.fault = None
            await check_well(client, before)
            assert app.state.service.lifecycle.phase == "serving"


@pytest.mark.parametrize(
    ("fault", "problem"),
    [
        (lambda: JSONResponse({"error": {"message": "slow down"}}, 429), None),
        (lambda: JSONResponse({"error": {"message": "The engine is currently busy"}}, 503), None),
        (lambda: Response("no healthy upstream", 503), "vLLM answers 503"),
        (
            lambda: JSONResponse({"error": "The model is currently scaling"}, 503),
            "vLLM answers 503",
        ),
    ],
    ids=["busy", "full", "proxy", "scaling"],
)
def test_a_full_queue_is_no_outage(
    vllm: FakeVllm, adapter: Path, export: Path, fault: Callable[[], Response], problem: str | None
) -> None:
    engine = engine_on(vllm, adapter, export, watch_s=30.0)
    with loaded(engine) as card:
        vllm.fault = fault()
        with pytest.raises(EngineUnavailableError):
            answers(engine, card, QUESTIONS, card.defaults)
        assert engine.problem == problem


@async_test
async def test_a_server_that_is_too_slow(vllm: FakeVllm, adapter: Path, export: Path) -> None:
    async with serving(engine_on(vllm, adapter, export, timeout_s=1.0)) as (_, client):
        before = await classify(client)
        vllm.delay_s = 30.0
        check_problem(await classify(client), 503, "engine_unavailable")
        assert "within vllm_timeout_s (1 s)" in await readiness(client, 503)
        vllm.delay_s = 0.0
        await check_well(client, before)


@async_test
async def test_what_nobody_waits_for_is_aborted_in_vllm(
    vllm: FakeVllm, adapter: Path, export: Path
) -> None:
    async with serving(engine_on(vllm, adapter, export, timeout_s=60.0)) as (_, client):
        before = await classify(client)
        vllm.delay_s = 30.0
        late = await classify(client, headers={"X-Request-Timeout-Ms": "300"})
        check_problem(late, 504, "deadline_exceeded")
        await until(lambda: vllm.aborted == 3)  # one of each sample
        vllm.delay_s = 0.0
        await check_well(client, before)


def test_an_engine_that_was_never_loaded_can_be_closed(adapter: Path, export: Path) -> None:
    engine = VllmEngine(adapter, VllmPlace("http://127.0.0.1:1", export, api_key="hush"))
    assert "hush" not in repr(engine._place)
    assert engine.problem is None
    engine.close()
    engine.close()


def test_what_an_engine_of_one_adapter_refuses(vllm: FakeVllm, adapter: Path, export: Path) -> None:
    engine = engine_on(vllm, adapter, export)
    with loaded(engine) as card:
        assert engine.problem is None
        assert not engine.mixes_adapters
        with pytest.raises(AdapterLoadError, match="tiny cannot be loaded: engine vllm serves the"):
            engine.load_adapter(adapter)
        engine.unload_adapter(card.key)
        with pytest.raises(RowRejectedError):
            engine.encode("another", QUESTIONS[0], "none")
        with pytest.raises(TypeError, match=r"sampling must be .* got"):
            answers(engine, card, QUESTIONS, Sampling(num_samples=9))
        with pytest.raises(NotCalibratedError):
            engine.risk_coverage(card.key, "confidence", out_of_scope_share=0.0, delta=0.1)
        encoded = engine.encode(card.key, QUESTIONS[0], "none")
        row = BatchRow(BatchKey(card.key, card.defaults), encoded)
        assert engine.run_batch([row], lambda _place: False).rows == (None,)
        other = engine_on(vllm, adapter, export)
        with loaded(other), pytest.raises(TypeError, match="another engine"):
            other.run_batch([row], lambda _place: True)
        vllm.stop()
        with pytest.raises(EngineUnavailableError):
            engine.run_batch([row], lambda _place: True)


def test_the_exported_probes_are_held_to_a_tenth_in_bfloat16(
    vllm: FakeVllm, adapter: Path, export: Path
) -> None:
    place = VllmPlace(vllm.url, export, start_s=0.0)
    engine = VllmEngine(adapter, place, base=str(vllm.flags.base), dtype="bfloat16")
    with loaded(engine) as card:
        assert card.dtype == "bfloat16"
        assert engine.self_test(card.key).limit == 0.1
    assert torch.get_default_dtype() == torch.float32
