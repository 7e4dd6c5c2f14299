"""Answers of the network linearised in its gates: from the predictor to the API and the plan."""

import json
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from typer.testing import CliRunner

from dalorra_core.artifact.store import load_artifact
from dalorra_core.config import PredictiveConfig
from dalorra_core.data.examples import TextExample
from dalorra_core.errors import ConfigError
from dalorra_core.metrics.uncertainty import summarise
from dalorra_core.predictive.predictor import Predictor, SamplingPlan
from server.cli import app
from tests.integration.test_local_engine import ask
from tests.support.api import async_test
from tests.support.tiny_artifacts import TEXTS, save_tiny_adapter
from tests.support.tiny_models import save_tiny_base

LINEARISED = SamplingPlan(seed=3, estimator="linearised")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("linearised")
    save_tiny_base(folder / "base")
    return folder


@pytest.fixture(scope="module")
def adapter(folder: Path) -> Path:
    """Return an adapter with gates on the last layer and the head, answering with six samples."""
    return tiny(folder, "adapter", "monte_carlo")


@pytest.fixture(scope="module")
def planned(folder: Path) -> Path:
    """Return the same adapter, whose own answers are linearised ones."""
    return tiny(folder, "planned", "linearised")


def tiny(folder: Path, name: str, estimator: Literal["monte_carlo", "linearised"]) -> Path:
    return save_tiny_adapter(
        folder / name,
        folder / "base",
        layers=(1, 1),
        predictive=PredictiveConfig(
            num_samples=6, seed=3, estimator=estimator, design="stratified"
        ),
        golden_predictive=PredictiveConfig(num_samples=3),
    )


@pytest.fixture(scope="module")
def predictor(adapter: Path, folder: Path) -> Predictor:
    return loaded(adapter, folder)


def loaded(adapter: Path, folder: Path) -> Predictor:
    return Predictor.load(adapter, base=str(folder / "base"), device="cpu")


def rows_of(predictor: Predictor) -> list[Any]:
    return [predictor.encode(TextExample(f"{i}", text)) for i, text in enumerate(TEXTS)]


def test_of_a_network_linear_in_its_gates_the_draws_have_the_moments_of_samples(
    folder: Path,
) -> None:
    place = save_tiny_adapter(folder / "head", folder / "base", targets=("lm_head",))
    predictor = loaded(place, folder)
    rows = rows_of(predictor)
    found = predictor.predict(rows, LINEARISED)
    assert found.log_probs.shape == (256, 4, 4)
    assert found.label_mass is not None
    ours = contrasts(found.log_probs)
    theirs = contrasts(
        torch.cat([predictor.predict(rows, SamplingPlan(256, s)).log_probs for s in range(16)])
    )
    assert float(theirs.std(0).min()) > 0.01
    assert_within_errors(ours, theirs)
    assert_within_errors((ours - ours.mean(0)) ** 2, (theirs - theirs.mean(0)) ** 2)


def contrasts(log_probs: torch.Tensor) -> torch.Tensor:
    """Return the label logits, (M, B, C - 1), over that of the first label."""
    return (log_probs[..., 1:] - log_probs[..., :1]).double()


def assert_within_errors(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """Hold two means over draws together, to five standard errors of their difference."""
    error = (ours.var(0) / len(ours) + theirs.var(0) / len(theirs)).sqrt()
    assert float(((ours.mean(0) - theirs.mean(0)).abs() / error).max()) < 5


def test_an_answer_depends_on_seed_and_question_alone(predictor: Predictor) -> None:
    rows = rows_of(predictor)
    together = predictor.predict(rows, LINEARISED).log_probs
    alone = torch.cat([predictor.predict([row], LINEARISED).log_probs for row in rows], dim=1)
    torch.testing.assert_close(alone, together, rtol=1e-4, atol=1e-4)
    other = predictor.predict(rows, SamplingPlan(seed=4, estimator="linearised")).log_probs
    assert not torch.equal(other, together)
    ids = [
        predictor.mask_set(plan)
        for plan in (
            LINEARISED,
            SamplingPlan(7, 3, "linearised"),
            SamplingPlan(seed=4, estimator="linearised"),
            SamplingPlan(256, 3),
            SamplingPlan(estimator="mean_mask"),
        )
    ]
    assert ids[0] == ids[1]
    assert len(set(ids)) == 4
    assert predictor.num_functions(LINEARISED) == 256
    assert predictor.passes(LINEARISED) == 5


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"method": "mle"}, "hard gates of method dalorra with test_masks hard, got method mle"),
        ({"method": "blob"}, "hard gates of method dalorra with test_masks hard, got method blob"),
        ({"gates": 40.0}, "every gate is always on or always off"),
        ({"most": 3}, "at most 3 are allowed, and there are 4"),
    ],
)
def test_what_cannot_be_linearised_says_why(
    folder: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], why: str
) -> None:
    place = folder / "-".join(f"{name}-{value}" for name, value in options.items())
    if "gates" in options:
        params = load_artifact(save_tiny_adapter(folder / "on", folder / "base")).tensors
        fixed = {n: torch.full_like(t, 40.0) if n == "phi" else t for n, t in params.items()}
        save_tiny_adapter(place, folder / "base", params=fixed)
    else:
        save_tiny_adapter(place, folder / "base", method=options.get("method", "dalorra"))
    if "most" in options:
        monkeypatch.setattr(
            "dalorra_core.predictive.linearised.MOST_LINEARISED_LABELS", options["most"]
        )
    found = loaded(place, folder)
    assert found.estimators == ("monte_carlo", "mean_mask")
    with pytest.raises(ConfigError, match=f"linearised is not to be had of this adapter: .*{why}"):
        found.predict(rows_of(found), LINEARISED)


@async_test
async def test_the_api_answers_linearised_beside_samples(adapter: Path, folder: Path) -> None:
    predictor = loaded(adapter, folder)
    expected = summarise(predictor.predict(rows_of(predictor), LINEARISED).log_probs)
    bodies: list[dict[str, Any]] = [
        {"input": TEXTS[0], "estimator": "linearised"},
        {"input": TEXTS[1], "estimator": "linearised", "num_samples": 256},
        {"input": TEXTS[0]},
        {"input": TEXTS[0], "estimator": "mean_mask"},
        {"input": TEXTS[0], "estimator": "linearised", "num_samples": 10},
        {"input": TEXTS[0], "estimator": "linearised", "design": "stratified"},
        {"input": TEXTS[0], "estimator": "linearised", "seed": 4},
    ]
    answers = await ask(adapter, *bodies)
    assert [answer.status_code for answer in answers] == [200, 200, 200, 200, 422, 422, 200]
    for place in (0, 1):
        body = answers[place].json()
        (row,) = body["data"]
        assert row["probs"] == pytest.approx(expected.mean_probs[place].tolist(), abs=1e-5)
        assert row["uncertainty"]["mutual_information"] > 0
        assert body["sampling"] == {
            "num_samples": 256,
            "seed": 3,
            "mask_set": predictor.mask_set(LINEARISED),
            "estimator": "linearised",
            "design": "iid",
        }
    assert answers[2].json()["sampling"]["num_samples"] == 6
    assert "num_samples must be 256 or left out: draws of the" in answers[4].json()["detail"]
    assert "design must be iid or left out" in answers[5].json()["detail"]
    assert answers[6].json()["sampling"]["seed"] == 4


@async_test
async def test_an_adapter_whose_own_answers_are_linearised_still_gives_samples(
    planned: Path, folder: Path
) -> None:
    predictor = loaded(planned, folder)
    assert predictor.self_test() < 1e-5  # by the predictive its probes were stored under
    bodies: list[dict[str, Any]] = [
        {"input": TEXTS[0]},
        {"input": TEXTS[0], "num_samples": "auto"},
        {"input": TEXTS[0], "num_samples": 5},
        {"input": TEXTS[0], "design": "iid"},
        {"input": TEXTS[0], "estimator": "monte_carlo"},
        {"input": TEXTS[0], "estimator": "mean_mask"},
    ]
    answers = await ask(planned, *bodies)
    found = [answer.json()["sampling"] for answer in answers]
    shown = [(s["estimator"], s["num_samples"], s["design"], s["seed"]) for s in found]
    assert shown == [
        ("linearised", 256, "iid", 3),
        ("linearised", 256, "iid", 3),
        ("monte_carlo", 5, "stratified", 3),
        ("monte_carlo", 6, "iid", 3),
        ("monte_carlo", 6, "stratified", 3),
        ("mean_mask", 1, "iid", None),
    ]
    plan = SamplingPlan(6, 3, "monte_carlo", "stratified")
    assert found[4]["mask_set"] == predictor.mask_set(plan)


@async_test
async def test_an_adapter_that_cannot_says_so(folder: Path) -> None:
    place = save_tiny_adapter(folder / "blob", folder / "base", method="blob")
    (answer,) = await ask(place, {"input": TEXTS[0], "estimator": "linearised"})
    assert answer.status_code == 422
    assert answer.json()["errors"] == [{"pointer": "#/estimator"}]
    assert "adapter blob is of method blob and has 4 labels" in answer.json()["detail"]


def call(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_the_commands_take_it(adapter: Path, planned: Path, folder: Path) -> None:
    base = ("--base", folder / "base", "--device", "cpu")
    asked = call("predict", adapter, TEXTS[0], *base, "--estimator", "linearised", "--seed", 3)
    own = call("predict", planned, TEXTS[0], *base)
    assert asked.exit_code == own.exit_code == 0, asked.output + own.output
    assert json.loads(asked.stdout)["probs"] == pytest.approx(json.loads(own.stdout)["probs"])
    for options, why in (
        (("--estimator", "linear"), "estimator must be monte_carlo or mean_mask or linearised"),
        (("--estimator", "linearised", "-M", 3), "num_samples must be left out with linearised"),
        (("--estimator", "linearised", "--design", "iid"), "design must be left out with"),
    ):
        refused = call("predict", adapter, TEXTS[0], *base, *options)
        assert refused.exit_code == 1
        assert why in refused.stderr
