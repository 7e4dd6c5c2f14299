"""dalorra replay: an answer of the real server comes out again, from its id and its question."""

import asyncio
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from pydantic import SecretStr
from typer.testing import CliRunner, Result

from dalorra_core.artifact.store import load_artifact, update_artifact
from server.app import create_app
from server.cli import app
from server.engines.local import LocalEngine
from server.feedback import PredictionSigner
from server.settings import Settings
from tests.integration.test_local_engine import base_of, train
from tests.support.api import async_test
from tests.support.feedback import make_claim

SECRET = "s" * 40
TEXTS = ["transfer to my account", "book a flight", "set an alarm to five", "book a hotel"]
QUESTION = {"question": "which is a word", "choices": ["yes", "no", "maybe"]}


@pytest.fixture(scope="module")
def text_adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("text"), "text", "dalorra")


@pytest.fixture(scope="module")
def choice_adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("choice"), "choice", "dalorra")


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    path = tmp_path / "secret"
    path.write_text(SECRET + "\n", "utf-8")
    return path


async def answered(
    adapter: Path, secret: Path, *bodies: dict[str, Any], deterministic: bool
) -> list[dict[str, Any]]:
    """Serve an adapter, send the bodies at the same time, and return all rows of the answers."""
    settings = Settings(
        secret_file=secret,
        feedback_url=SecretStr("off"),
        batch_wait_ms=20,
        deterministic=deterministic,
    )
    engine = LocalEngine(
        [adapter], base=base_of(adapter), device="cpu", deterministic=deterministic
    )
    fastapi_app = create_app(lambda: engine, settings)
    async with (
        fastapi_app.router.lifespan_context(fastapi_app),
        httpx.AsyncClient(
            transport=httpx.ASGITransport(fastapi_app), base_url="http://localhost"
        ) as client,
    ):
        await fastapi_app.state.service.lifecycle.loaded()
        answers = await asyncio.gather(
            *(client.post("/v1/classify", json=body, timeout=50) for body in bodies)
        )
    assert {answer.status_code for answer in answers} == {200}
    return [row for answer in answers for row in answer.json()["data"]]


def replayed(prediction_id: str, adapter: Path, secret: Path, *options: str) -> Result:
    arguments = ["replay", prediction_id, "-a", str(adapter), "--base", base_of(adapter)]
    return CliRunner().invoke(app, [*arguments, "--secret-file", str(secret), *options])


def found(result: Result) -> dict[str, Any]:
    values: dict[str, Any] = json.loads(result.stdout)
    return values


def test_the_command_explains_itself() -> None:
    result = CliRunner().invoke(app, ["replay", "--help"])
    assert result.exit_code == 0
    assert "Example" in result.output
    assert "Exit status" in result.output


@async_test
async def test_a_deterministic_answer_comes_out_bit_for_bit_in_another_process(
    text_adapter: Path, secret: Path
) -> None:
    """The server answered it beside other rows; replay answers it alone."""
    body = {"input": TEXTS, "num_samples": 10, "seed": 7, "policy": None}
    rows = await answered(text_adapter, secret, body, body, deterministic=True)
    for text, row in zip(TEXTS[:2], rows[:2], strict=True):
        done = await asyncio.to_thread(
            subprocess.run,
            [
                *(sys.executable, "-c", "from server.cli import main; main()"),
                *("replay", row["prediction_id"], "--adapter", str(text_adapter.parent)),
                *("--base", base_of(text_adapter), "--secret-file", str(secret)),
                *("--device", "cpu", "--text", text, "--json"),
            ],
            capture_output=True,
            text=True,
            timeout=50,
            check=False,
            env={"OMP_NUM_THREADS": "2"},  # the server had one
        )
        assert done.returncode == 0, done.stdout + done.stderr
        values = json.loads(done.stdout)
        assert (values["reproduced"], values["mode"], values["verified"]) == (True, "bitwise", True)
        assert values["confidence_difference"] < 1e-9  # an id keeps nine decimal places
        assert {line["same"] for line in values["compared"].values()} == {True}
        assert values["compared"]["label"]["recomputed"] == row["label"]
        assert text not in done.stdout


@async_test
async def test_a_batched_answer_comes_out_within_the_tolerance(
    text_adapter: Path, secret: Path
) -> None:
    bodies = [{"input": TEXTS, "num_samples": 10}, {"input": [f"{t} now" for t in TEXTS]}]
    rows = await answered(text_adapter, secret, *bodies, deterministic=False)
    for text, row in zip(TEXTS, rows, strict=False):
        result = replayed(
            row["prediction_id"], text_adapter, secret, "--text", text, "--json", "--device", "cpu"
        )
        assert result.exit_code == 0, result.output
        values = found(result)
        assert (values["mode"], values["tolerance"]) == ("tolerance", 1e-5)
        assert values["confidence_difference"] <= 1e-5


@async_test
async def test_another_text_is_not_the_answer(text_adapter: Path, secret: Path) -> None:
    body = {"input": TEXTS[0], "num_samples": 3}
    (row,) = await answered(text_adapter, secret, body, deterministic=True)
    result = replayed(row["prediction_id"], text_adapter, secret, "--text", TEXTS[0] + ".")
    assert result.exit_code == 1
    assert "NOT reproduced (to the bit)" in result.output


@async_test
async def test_an_answer_by_another_design_comes_out_by_that_design(
    text_adapter: Path, secret: Path
) -> None:
    asked = {"input": TEXTS[0], "num_samples": 4, "design": "stratified"}
    rows = [
        (await answered(text_adapter, secret, body, deterministic=True))[0]
        for body in (asked, {**asked, "design": "iid"})
    ]
    assert rows[0]["probs"] != rows[1]["probs"]
    for row in rows:
        result = replayed(row["prediction_id"], text_adapter, secret, "--text", TEXTS[0], "--json")
        assert result.exit_code == 0, result.output
        assert {line["same"] for line in found(result)["compared"].values()} == {True}


@async_test
async def test_a_question_with_its_choices_is_given_as_json(
    choice_adapter: Path, secret: Path
) -> None:
    (row,) = await answered(choice_adapter, secret, {"input": QUESTION}, deterministic=True)
    result = replayed(
        row["prediction_id"], choice_adapter, secret, "--row", json.dumps(QUESTION), "--json"
    )
    assert result.exit_code == 0, result.output
    other = {**QUESTION, "choices": ["no", "yes", "maybe"]}
    for question in (other, {**QUESTION, "context": "words"}):
        result = replayed(
            row["prediction_id"], choice_adapter, secret, "--row", json.dumps(question)
        )
        assert result.exit_code == 1
    result = replayed(row["prediction_id"], choice_adapter, secret, "--text", "which is a word")
    assert result.exit_code == 2
    assert "answers choice input: give --row" in result.output


@async_test
async def test_an_adapter_that_was_changed_since_is_found_and_said(
    text_adapter: Path, secret: Path, tmp_path: Path
) -> None:
    (row,) = await answered(
        text_adapter, secret, {"input": TEXTS[0], "estimator": "mean_mask"}, deterministic=True
    )
    changed = tmp_path / "root" / "changed"
    shutil.copytree(text_adapter, changed)
    manifest = load_artifact(changed).manifest
    update_artifact(changed, manifest.model_copy(update={"description": "another"}))
    options = ("--base", base_of(text_adapter), "--text", TEXTS[0], "--json")
    arguments = ["replay", row["prediction_id"], "-a", str(changed.parent), *options]
    result = CliRunner().invoke(app, [*arguments, "--secret-file", str(secret)])
    assert result.exit_code == 0, result.output
    assert found(result)["compared"]["calibration"]["same"] is False
    assert found(result)["compared"]["mask set"]["recorded"] is None  # nothing was sampled
    # where the one that answered lies beside it, that one is taken
    shutil.copytree(text_adapter, tmp_path / "root" / "z-original")
    result = CliRunner().invoke(app, [*arguments, "--secret-file", str(secret)])
    assert found(result)["compared"]["calibration"]["same"] is True


@async_test
async def test_an_id_needs_its_secret_or_is_called_unverified(
    text_adapter: Path, secret: Path, tmp_path: Path
) -> None:
    body = {"input": TEXTS[0], "num_samples": 2}
    (row,) = await answered(text_adapter, secret, body, deterministic=True)
    other = tmp_path / "other"
    other.write_text("o" * 40, "utf-8")
    options = ("--text", TEXTS[0])
    result = replayed(row["prediction_id"], text_adapter, other, *options)
    assert result.exit_code == 1
    assert "is not signed with this secret" in result.output
    result = replayed(row["prediction_id"], text_adapter, tmp_path / "none", *options)
    assert result.exit_code == 2
    assert "--unverified" in result.output
    result = replayed(row["prediction_id"], text_adapter, other, *options, "--unverified", "--json")
    assert result.exit_code == 0, result.output
    assert found(result)["verified"] is False
    assert "anyone may have made it" in result.stderr


@async_test
async def test_an_id_of_version_1_is_replayed_as_far_as_it_goes(
    text_adapter: Path, secret: Path
) -> None:
    body = {"input": TEXTS[0], "num_samples": 3}
    (row,) = await answered(text_adapter, secret, body, deterministic=False)
    signer = PredictionSigner([SECRET])
    old = signer.sign(replace(signer.verify(row["prediction_id"]), reproduction=None))
    result = replayed(old, text_adapter, secret, "--text", TEXTS[0], "--dtype", "float32")
    assert result.exit_code == 0, result.output
    assert "an id of version 1" in " ".join(result.output.split())


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        (("--text", "x", "--row", "{}"), "give --text or --row, not both"),
        (("--row", "{"), "--row must be one JSON object"),
        (("--row", '["a", "b"]'), "must be one row, got 2"),
        (("--row", '{"words": 1}'), "the question cannot be read"),
        (("--text", ""), "the question cannot be read"),
        (("--text", "x", "--truncate", "middle"), "--truncate must be one of none, start, end"),
        (("--text", "x", "--dtype", "int8"), "--dtype must be one of float32, bfloat16"),
        (("--text", "x", "--device", "tpu"), "device must be auto"),
    ],
)
def test_wrong_usage_is_said_and_exits_with_2(
    options: tuple[str, ...], fault: str, text_adapter: Path, secret: Path
) -> None:
    claim = PredictionSigner([SECRET]).sign(_claim(text_adapter))
    result = replayed(claim, text_adapter, secret, *options)
    assert result.exit_code == 2, result.output
    assert fault in result.output


def test_a_place_without_adapters_is_said(text_adapter: Path, secret: Path, tmp_path: Path) -> None:
    claim = PredictionSigner([SECRET]).sign(_claim(text_adapter))
    for place, fault in ((tmp_path, "it holds no adapter"), (tmp_path / "x", "cannot be read")):
        arguments = ["replay", claim, "-a", str(place), "--text", "x"]
        result = CliRunner().invoke(app, [*arguments, "--secret-file", str(secret)])
        assert result.exit_code == 2
        assert fault in result.output


def test_the_secret_is_the_servers_by_its_settings(text_adapter: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text(SECRET, "utf-8")
    claim = PredictionSigner([SECRET]).sign(_claim(text_adapter))
    arguments = ["replay", claim, "-a", str(tmp_path), "--text", "x"]
    state = {"DALORRA_STATE_DIR": str(tmp_path)}
    assert "is not in" in CliRunner().invoke(app, arguments, env=state).output
    wrong = CliRunner().invoke(app, arguments, env={**state, "DALORRA_PORT": "99999"})
    assert wrong.exit_code == 2
    assert "settings outside their domain: port; give --secret-file" in wrong.output
    homeless = {
        "DALORRA_STATE_DIR": "",
        "HOME": "",
        "DALORRA_SECRET_FILE": str(tmp_path / "secret"),
    }
    assert "is not in" in CliRunner().invoke(app, arguments, env=homeless).output


def test_an_adapter_of_another_revision_is_not_taken(
    text_adapter: Path, choice_adapter: Path, secret: Path
) -> None:
    claim = PredictionSigner([SECRET]).sign(_claim(text_adapter))
    result = replayed(claim, choice_adapter, secret, "--text", "x")
    assert result.exit_code == 2
    assert f"revision {load_artifact(text_adapter).revision} is not in" in result.output
    assert load_artifact(choice_adapter).revision in result.output


def test_the_question_may_come_from_standard_input(text_adapter: Path, secret: Path) -> None:
    """And its last line end is left out."""
    claim = PredictionSigner([SECRET]).sign(_claim(text_adapter))
    results = [
        CliRunner().invoke(
            app,
            [
                *("replay", claim, "-a", str(text_adapter), "--secret-file", str(secret)),
                *("--base", base_of(text_adapter), "--json"),
            ],
            input=text,
        )
        for text in ("book a hotel", "book a hotel\n", "book a hotel\n\n")
    ]
    confidences = [found(r)["compared"]["confidence"]["recomputed"] for r in results]
    assert confidences[0] == confidences[1]
    assert {r.exit_code for r in results} == {1}


def _claim(adapter: Path) -> Any:
    """Return a claim of an adapter with a confidence that no answer has."""
    return make_claim(
        revision=load_artifact(adapter).revision, num_samples=2, confidence=2.0, policy=None
    )
