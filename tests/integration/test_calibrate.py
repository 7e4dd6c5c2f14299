"""`dalorra calibrate` and what `evaluate` and `inspect` make of it, on a tiny trained adapter."""

import itertools
import json
import random
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

from benchmarks.selective_coverage import scores_void
from dalorra_core.artifact.manifest import LabelsRef
from dalorra_core.artifact.store import load_artifact, update_artifact
from dalorra_core.calibration.decisions import decide
from dalorra_core.calibration.prediction_sets import members
from dalorra_core.calibration.scores import score_table
from dalorra_core.calibration.split import digests, parts
from dalorra_core.calibration.stored_rows import StoredRows
from dalorra_core.data.examples import gold_label
from dalorra_core.data.readers import read_jsonl
from dalorra_core.metrics.uncertainty import mean_probs
from dalorra_core.predictive.predictor import Predictor
from dalorra_core.training.run import run_training
from server.cli import app
from server.engines.cards import adapter_card, answering_of
from tests.support.tiny_artifacts import save_tiny_adapter
from tests.support.tiny_models import LABEL_TOKENS, write_jsonl
from tests.support.tiny_tasks import INTENTS, TinyTask, tiny_config

_FILLERS = ("the", "what", "is", "you")
_OTHER_WORDS = ("weather", "hotel")


def call(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments])


def texts(length: int) -> list[dict[str, Any]]:
    """Return a row for every word and every run of so many fillers, shuffled."""
    words = [*INTENTS.items(), *(("oos", word) for word in _OTHER_WORDS)]
    rows = [
        {"text": " ".join([*fillers, word]), "label": label}
        for fillers in itertools.product(_FILLERS, repeat=length)
        for label, word in words
    ]
    random.Random(0).shuffle(rows)
    return [{"id": f"row-{i}", **row} for i, row in enumerate(rows)]


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> TinyTask:
    """A task whose files are train, validation (in scope), oos (both kinds) and test."""
    task = TinyTask(tmp_path_factory.mktemp("task"), "text")
    rows = texts(4)
    inside = [row for row in rows if row["label"] != "oos"]
    outside = [row for row in rows if row["label"] == "oos"]
    write_jsonl(task.data / "oos.jsonl", inside[:300])
    write_jsonl(task.data / "validation.jsonl", inside[300:900])
    write_jsonl(task.data / "oos.jsonl", inside[:50] + outside[:300])
    write_jsonl(task.data / "test.jsonl", inside[900:] + outside[300:350])
    return task


@pytest.fixture(scope="module")
def trained(task: TinyTask, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    config = tiny_config(task, optim={"steps": 150})
    return run_training(config, folder / "out", folder / "run", report=lambda _: None)


@pytest.fixture(scope="module")
def data(task: TinyTask) -> Path:
    return task.data


def calibrate(adapter: Path, task: TinyTask, data: Path, *options: object) -> Result:
    return call(
        *("calibrate", adapter, "--data", data, "--out-of-scope", data / "oos.jsonl"),
        *("--base", task.base, *options),
    )


@pytest.fixture(scope="module")
def calibrated(
    trained: Path, task: TinyTask, data: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Result]:
    folder = tmp_path_factory.mktemp("calibrated")
    adapter = shutil.copytree(trained, folder / "adapter")
    result = calibrate(
        *(adapter, task, data, "--report", folder / "report", "--scores", folder / "answers"),
        *("--per-label", 0.2, "--alpha", 0.1, "--alpha", 0.05, "--target-risk", 0.3),
        *("--target-risk", 0.05, "--target-risk", 0.0001, "--out-of-scope-share", 0.1),
    )
    assert result.exit_code == 0, result.output
    return adapter, result


def test_the_adapter_keeps_its_tensors_and_gains_the_record(
    calibrated: tuple[Path, Result], trained: Path
) -> None:
    before, after = load_artifact(trained), load_artifact(calibrated[0])
    assert after.sha256 == before.sha256
    record = after.manifest.calibration
    assert record is not None
    rows = record.rows
    assert (rows.n, rows.n_out_of_scope) == (900, 300)
    assert rows.n_fit + rows.n_select + rows.n_certify == 900
    assert rows.source == "data validation + oos.jsonl (out of scope)"
    assert record.measured_with.adapter_sha256 == after.sha256
    assert record.measured_with.temperature == record.temperature.value
    assert (record.temperature.nll_after < record.temperature.nll_before) == record.temperature.kept
    assert {(s.kind, s.alpha) for s in record.prediction_sets} == {
        (kind, alpha) for kind in ("aps", "lac") for alpha in (0.1, 0.05)
    }
    text = (calibrated[0] / "manifest.json").read_text("utf-8")
    assert "transfer" not in text.split('"golden"')[0]  # no row's text is stored
    assert str(calibrated[0].parent.parent) not in text


def test_certified_policies_have_receipts_and_hold_on_the_certify_rows(
    calibrated: tuple[Path, Result],
) -> None:
    artifact = load_artifact(calibrated[0])
    assert artifact.calibration_scores is not None
    held = StoredRows.from_tensors(artifact.calibration_scores).of_part("certify")
    policies = {p.name: p for p in artifact.manifest.policies}
    assert list(policies)[:2] == ["default", "risk-0.3"]
    assert policies["default"] == policies["risk-0.3"].model_copy(update={"name": "default"})
    for policy in policies.values():
        held_for = policy.guarantee
        assert held_for is not None
        assert held_for.risk_upper_bound <= held_for.target_risk == policy.target_selective_risk
        assert (held_for.delta, held_for.out_of_scope_share) == (0.1, 0.1)
        assert (held_for.n, held_for.n_out_of_scope) == (len(held), int(held.outside.sum()))
        decisions = decide(policy, held, artifact.manifest.labels.labels)
        accepted = decisions.accept
        # The abstain limit takes nothing away from what was certified.
        assert int((accepted & ~held.outside).sum()) == held_for.n_accepted
        assert int((accepted & held.outside).sum()) == held_for.n_out_of_scope_accepted
        assert decisions.abstain[~held.outside].double().mean() <= 0.05 + 0.02
    record = artifact.manifest.calibration
    assert record is not None
    targets = {u.target_risk for u in record.uncertified if not u.label}
    assert targets == {0.0001, 0.05}


def test_stored_scores_are_what_the_calibrated_predictor_says(
    calibrated: tuple[Path, Result], task: TinyTask
) -> None:
    predictor = Predictor.load(calibrated[0], base=str(task.base), device="cpu")
    assert predictor.artifact.calibration_scores is not None
    stored = StoredRows.from_tensors(predictor.artifact.calibration_scores)
    examples = read_jsonl(task.data / "validation.jsonl")
    inside = ~stored.table.outside
    assert torch.equal(stored.digest[inside], digests(examples))
    assert torch.equal(stored.part[inside], parts([e.id for e in examples]))
    names = predictor.labels
    assert [names[k] for k in stored.table.labels[inside]] == [gold_label(e) for e in examples]
    rows = [predictor.encode(example) for example in examples[:40]]
    answer = predictor.predict(rows)
    table = score_table(answer, torch.tensor([r.label for r in rows]), predictor.combined)
    assert set(table.scores) == set(stored.table.scores)
    for name, values in table.scores.items():
        torch.testing.assert_close(
            values, stored.table.scores[name][inside][:40], atol=1e-5, rtol=0
        )
    record = predictor.manifest.calibration
    assert record is not None
    rule = record.prediction_sets[0]
    assert bool(members(rule, mean_probs(answer.log_probs)).any(1).all())


def test_the_temperature_is_applied_and_the_self_test_is_raw(
    calibrated: tuple[Path, Result], task: TinyTask, tmp_path: Path
) -> None:
    adapter = shutil.copytree(calibrated[0], tmp_path / "adapter")
    manifest = load_artifact(adapter).manifest
    assert manifest.calibration is not None
    fit = manifest.calibration.temperature.model_copy(update={"value": 3.0})
    warm = manifest.calibration.model_copy(update={"temperature": fit})
    update_artifact(adapter, manifest.model_copy(update={"calibration": warm}))
    predictor = Predictor.load(adapter, base=str(task.base), device="cpu")  # golden probes hold
    assert predictor.self_test() < 1e-5
    rows = [predictor.encode(e) for e in read_jsonl(task.data / "test.jsonl")[:5]]
    raw, found = predictor.predict(rows, calibrated=False), predictor.predict(rows)
    torch.testing.assert_close(found.log_probs, (raw.log_probs / 3.0).log_softmax(-1))
    assert predictor.mask_set(predictor.default_plan) == Predictor.load(
        calibrated[0], base=str(task.base), device="cpu"
    ).mask_set(predictor.default_plan)


def test_the_summary_says_what_was_found(calibrated: tuple[Path, Result]) -> None:
    shown = calibrated[1].stdout
    for expected in (
        "calibrated on 900 rows",
        "temperature: ",
        "NLL of",
        "by confidence, ",
        " certify rows as they are: AURC 0.",
        ", AUGRC 0.",
        "at most 0.1 is out of scope",
        "risk-0.3",
        "target 0.05 not certified: no threshold",
        "prediction sets",
    ):
        assert expected in shown
    folder = calibrated[0].parent / "report"
    for name in ("risk-coverage", "reliability", "scores"):
        assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert "<svg" in (folder / f"{name}.svg").read_text("utf-8")


def test_inspect_shows_policies_and_calibration(calibrated: tuple[Path, Result]) -> None:
    result = call("inspect", calibrated[0])
    assert result.exit_code == 0, result.output
    for expected in (
        "risk <= 0.3 with confidence 0.9",
        "calibrated",
        "not certified: 0.0001, 0.05",
    ):
        assert expected in result.stdout


def test_a_dry_run_writes_nothing_and_stored_answers_are_read(
    calibrated: tuple[Path, Result], task: TinyTask, data: Path
) -> None:
    adapter, answers = calibrated[0], calibrated[0].parent / "answers"
    before = {p.name: p.read_bytes() for p in adapter.iterdir()}
    result = calibrate(adapter, task, data, "--dry-run", "--scores", answers)
    assert result.exit_code == 0, result.output
    assert "reading answers from" in result.stderr
    assert "scoring" not in result.stderr
    assert {p.name: p.read_bytes() for p in adapter.iterdir()} == before
    other = call(
        *("calibrate", adapter, "--data", data, "--base", task.base, "--dry-run"),
        *("--scores", answers),
    )
    assert other.exit_code == 1
    assert "were made with rows" in other.stderr


def test_calibrating_twice_gives_the_same_numbers(
    calibrated: tuple[Path, Result], task: TinyTask, data: Path, tmp_path: Path
) -> None:
    adapter = shutil.copytree(calibrated[0], tmp_path / "again")
    result = calibrate(
        *(adapter, task, data, "--scores", calibrated[0].parent / "answers", "--per-label", 0.2),
        *("--alpha", 0.1, "--alpha", 0.05, "--target-risk", 0.3, "--target-risk", 0.05),
        *("--target-risk", 0.0001, "--out-of-scope-share", 0.1),
    )
    assert result.exit_code == 0, result.output
    names = sorted(p.name for p in adapter.iterdir())
    assert names == sorted(p.name for p in calibrated[0].iterdir())


def test_evaluate_refuses_the_rows_that_calibrated(
    calibrated: tuple[Path, Result], task: TinyTask, data: Path, tmp_path: Path
) -> None:
    command = ("evaluate", calibrated[0], "--base", task.base, "--resamples", 0)
    refused = call(*command, "--data", data, "--split", "validation")
    assert refused.exit_code == 1
    first = read_jsonl(data / "validation.jsonl")[0].id
    assert f"600 of 600 rows calibrated this adapter, the first is '{first}'" in refused.stderr
    assert "--allow-calibration-rows" in refused.stderr
    allowed = call(*command, "--data", data, "--split", "validation", "--allow-calibration-rows")
    assert allowed.exit_code == 0, allowed.output
    output = tmp_path / "report.json"
    scores = tmp_path / "scores.safetensors"
    fresh = call(*command, "--data", data, "--split", "test", "-o", output, "--scores", scores)
    assert fresh.exit_code == 0, fresh.output
    assert "certified: risk <= 0.3 at <= 0.1 out of scope; here" in fresh.stdout
    report = json.loads(output.read_text("utf-8"))
    assert [p["policy"] for p in report["policies"]] == ["default", "risk-0.3", "per-label-0.2"]
    record = load_artifact(calibrated[0]).manifest.calibration
    assert record is not None
    assert report["temperature"] == record.temperature.value
    assert scores_void(scores, record) is None
    colder = record.measured_with.model_copy(update={"temperature": 0.5})
    other = record.model_copy(update={"measured_with": colder})
    assert (scores_void(scores, other) or "").startswith("measured with temperature 0.5 (here: ")
    point = call(
        *command, "--data", data, "--split", "test", "--estimator", "mean_mask", "-o", output
    )
    assert point.exit_code == 0, point.output  # without MI there is no combined score
    reseeded = call(*command, "--data", data, "--split", "test", "--seed", 7, "-o", output)
    assert reseeded.exit_code == 0, reseeded.output
    assert "certified:" not in reseeded.stdout
    assert "no certificate here: measured with seed 0 (here: 7)" in reseeded.stdout
    policies = json.loads(output.read_text("utf-8"))["policies"]
    assert {p["target_risk"] for p in policies} == {None}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--target-risk", 1.5), "target_risk must lie strictly between 0 and 1, got 1.5"),
        (("--delta", 0), "delta must lie strictly between 0 and 1, got 0.0"),
        (("--out-of-scope-share", 1), "out_of_scope_share must be in [0, 1), got 1.0"),
        (("--alpha", 2), "alpha must lie strictly between 0 and 1, got 2.0"),
        (("--max-abstained", 0), "max_abstained must lie strictly between 0 and 1, got 0.0"),
        (("--score", "luck"), "score must be one of auto, confidence"),
        (("--procedure", "hope"), "procedure must be one of fixed_sequence, bonferroni"),
        (("--alpha", 0.001), "needs at least 999 in-scope rows in the certify part"),
    ],
)
def test_settings_outside_their_domain_are_refused(
    calibrated: tuple[Path, Result],
    task: TinyTask,
    data: Path,
    options: tuple[object, ...],
    message: str,
) -> None:
    answers = calibrated[0].parent / "answers"
    result = calibrate(calibrated[0], task, data, "--dry-run", "--scores", answers, *options)
    assert result.exit_code == 1
    assert message in result.stderr


def test_a_missing_package_is_named_before_anything_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.linear_model", None)
    command = ("calibrate", tmp_path / "nowhere", "--data", tmp_path)
    result = call(*command)
    assert result.exit_code == 1
    assert "needs scikit-learn: pip install 'dalorra[calibrate]'" in result.stderr
    assert "scikit-learn" not in call(*command, "--score", "confidence").stderr


def test_other_choices_of_score_and_test_are_made(
    calibrated: tuple[Path, Result], task: TinyTask, data: Path
) -> None:
    answers = calibrated[0].parent / "answers"
    result = calibrate(
        *(calibrated[0], task, data, "--dry-run", "--scores", answers, "--score", "confidence"),
        *("--procedure", "bonferroni", "--target-risk", 0.4, "--out-of-scope-share", 0.05),
    )
    assert result.exit_code == 0, result.output
    assert "risk-0.4" in result.stdout
    assert "combined" not in result.stdout


def test_a_share_without_out_of_scope_rows_is_refused(
    calibrated: tuple[Path, Result], task: TinyTask, data: Path
) -> None:
    result = call(
        *("calibrate", calibrated[0], "--data", data, "--base", task.base, "--dry-run"),
        *("--out-of-scope-share", 0.1),
    )
    assert result.exit_code == 1
    assert "needs out-of-scope rows" in result.stderr


def test_a_point_method_is_calibrated_without_mutual_information(
    task: TinyTask, tmp_path: Path
) -> None:
    config = tiny_config(task, method={"name": "mle"}, optim={"steps": 40})
    adapter = run_training(config, tmp_path / "out", tmp_path / "run", report=lambda _: None)
    lines = (task.data / "validation.jsonl").read_text("utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    rows = [*rows[:250], {"id": "long", "text": "what " * 900, "label": rows[0]["label"]}]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    command = ("calibrate", adapter, "--data", path, "--base", task.base)
    planned = call(*command, "--plan")
    assert planned.exit_code == 1
    assert "no sampling plan to choose for method mle: it does not sample" in planned.stderr
    result = call(*command)
    assert result.exit_code == 0, result.output
    assert "left out 1 rows with more than" in result.stderr
    artifact = load_artifact(adapter)
    record, stored = artifact.manifest.calibration, artifact.calibration_scores
    assert record is not None
    assert stored is not None
    assert record.rows.n == 250
    assert (record.measured_with.num_samples, record.measured_with.estimator) == (1, "mean_mask")
    assert "mutual_information" not in stored
    assert "mutual_information" not in record.reference.scores
    assert artifact.manifest.policies[0].name == "default"
    answer = json.loads(call("predict", adapter, rows[0]["text"], "--base", task.base).stdout)
    index = artifact.manifest.labels.labels.index(answer["label"])
    assert int(stored["predicted"][0]) == index
    assert answer["confidence"] == pytest.approx(float(stored["confidence"][0]), abs=1e-5)
    only_long = write_jsonl(tmp_path / "long.jsonl", rows[-1:])
    refused = call(
        *("calibrate", adapter, "--data", only_long, "--base", task.base),
        "--allow-missing-labels",
    )
    assert refused.exit_code == 1
    assert "all 1 rows have more than" in refused.stderr


def with_a_plan(adapter: Path, task: TinyTask, data: Path) -> Result:
    result = calibrate(
        *(adapter, task, data, "--plan", "--plan-rows", 40, "--plan-reference", 128),
        *("--target-risk", 0.3, "--out-of-scope-share", 0.1),
    )
    assert result.exit_code == 0, result.output
    return result


@pytest.fixture(scope="module")
def planned(
    calibrated: tuple[Path, Result], task: TinyTask, data: Path, tmp_path_factory: Any
) -> tuple[Path, Result]:
    """Return an adapter with a plan of samples: as if it had too many labels for another."""
    adapter = shutil.copytree(calibrated[0], tmp_path_factory.mktemp("planned") / "adapter")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dalorra_core.predictive.linearised.MOST_LINEARISED_LABELS", 1)
        return adapter, with_a_plan(adapter, task, data)


def test_a_linearised_plan_is_measured_chosen_and_certified(
    task: TinyTask, data: Path, tmp_path: Path
) -> None:
    """With gates on the head alone the network is linear in them."""
    labels = LabelsRef(
        labels=tuple(INTENTS),
        token_ids=LABEL_TOKENS[: len(INTENTS)],
        out_of_scope_label="oos",
    )
    adapter = save_tiny_adapter(
        *(tmp_path / "adapter", task.base), targets=("lm_head",), r=6, labels=labels
    )
    before = load_artifact(adapter).manifest
    result, shown = with_a_plan(adapter, task, data), call("inspect", adapter)
    after = load_artifact(adapter).manifest
    record = after.calibration
    assert record is not None
    plan = record.plan
    assert plan is not None
    passes = 128 + 8 * (54 + 10 + 1 + len(after.labels.labels)) + 1
    assert f"measuring: {passes * 40} of {passes * 40} row passes" in result.stderr
    assert plan.estimator == "linearised"
    assert (plan.chosen.estimator, plan.chosen.num_samples) == ("linearised", 256)
    assert plan.chosen.good_enough
    assert after.predictive == before.predictive.model_copy(update={"estimator": "linearised"})
    assert (record.measured_with.estimator, record.measured_with.num_samples) == ("linearised", 256)
    assert after.golden_predictive == before.predictive
    assert {policy.chosen_on.estimator for policy in after.policies} <= {"linearised"}
    assert "plan: linearised, 256 draws: squared error of the mean" in result.stdout
    assert "\npredictive linearised (samples: M = " in shown.stdout
    predictor = Predictor.load(adapter, base=str(task.base), device="cpu")
    card = adapter_card(predictor.artifact, answering_of(predictor), 0.0)
    assert (card.defaults.estimator, card.defaults.num_samples) == ("linearised", 256)
    assert card.sampled is not None
    assert card.sampled.num_samples == before.predictive.num_samples
    assert card.calibration is not None
    assert card.calibration.void is None
    assert card.calibration.plan is not None
    assert card.calibration.plan.estimator == "linearised"


def test_the_chosen_plan_is_what_is_served_and_certified(
    planned: tuple[Path, Result], calibrated: tuple[Path, Result], task: TinyTask
) -> None:
    before, after = load_artifact(calibrated[0]), load_artifact(planned[0])
    record = after.manifest.calibration
    assert record is not None
    plan = record.plan
    assert plan is not None
    served = after.manifest.predictive
    assert (served.num_samples, served.design) == (plan.num_samples, plan.design)
    assert served.seed == before.manifest.predictive.seed
    assert plan.num_samples <= 10
    assert plan.chosen.good_enough
    measured = record.measured_with
    assert (measured.num_samples, measured.design) == (plan.num_samples, plan.design)
    for policy in after.manifest.policies:
        assert policy.chosen_on.num_samples == plan.num_samples
    assert (plan.n, plan.reference, plan.packs) == (40, 128, 8)
    assert plan.n_out_of_scope > 0
    assert [c.estimator for c in plan.candidates[:2]] == ["mean_mask", "monte_carlo"]
    names = {(c.design, c.num_samples) for c in plan.candidates[1:]}
    assert names == {(d, m) for d in ("iid", "stratified", "antithetic") for m in range(2, 11)}
    # the masks that were there are still the same, and so is what the probes were stored under
    assert after.sha256 == before.sha256
    predictor = Predictor.load(planned[0], base=str(task.base), device="cpu")
    assert predictor.self_test() < 1e-5
    old = Predictor.load(calibrated[0], base=str(task.base), device="cpu")
    assert predictor.mask_set(old.default_plan) == old.mask_set(old.default_plan)
    card = adapter_card(predictor.artifact, answering_of(predictor), 0.0)
    assert (card.defaults.num_samples, card.defaults.design) == (plan.num_samples, plan.design)
    assert card.calibration is not None
    assert card.calibration.void is None
    assert card.calibration.plan is not None
    assert card.calibration.plan.mean_error == plan.chosen.mean_error
    assert card.calibration.plan.peer_num_samples == 10
    if served != before.manifest.predictive:
        assert after.manifest.golden_predictive == before.manifest.predictive


def test_what_the_plan_costs_and_why_it_was_chosen_is_shown(
    planned: tuple[Path, Result],
) -> None:
    result, shown = planned[1], call("inspect", planned[0])
    passes = 128 + 8 * (54 + 10) + 1
    assert f"measuring the plan: {passes} passes over 40 rows, what 6410 answers" in result.stderr
    assert f"measuring: {passes * 40} of {passes * 40} row passes" in result.stderr
    assert "sampling plan: squared errors" in result.stdout
    assert "mean_mask" in result.stdout
    for text in (result.stdout, shown.stdout):
        assert "squared error of the mean probability" in text
        assert "40 rows (" in text
    assert "\nplan       M = " in shown.stdout


def test_calibrating_without_a_plan_keeps_the_stored_one(
    planned: tuple[Path, Result], task: TinyTask, data: Path, tmp_path: Path
) -> None:
    adapter = shutil.copytree(planned[0], tmp_path / "again")
    result = calibrate(adapter, task, data, "--target-risk", 0.3, "--out-of-scope-share", 0.1)
    assert result.exit_code == 0, result.output
    before, after = load_artifact(planned[0]).manifest, load_artifact(adapter).manifest
    assert before.calibration is not None
    assert after.calibration is not None
    assert after.calibration.plan == before.calibration.plan is not None
    assert after.predictive == before.predictive
    assert after.golden_predictive == before.golden_predictive
    assert after.calibration.measured_with == before.calibration.measured_with


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--plan", "--plan-reference", 63), "plan_reference must be at least 64, got 63"),
        (("--plan", "--plan-rows", 7), "plan_rows must be at least 8, got 7"),
        (("--plan", "--plan-packs", 2), "plan_packs must be at least 8, got 2"),
        (("--plan-rows", 64), "plan_rows has no effect without --plan"),
        (("--plan", "--plan-rows", 600), "a plan on 600 rows needs as many in the fit part, got"),
    ],
)
def test_a_plan_that_cannot_be_measured_is_refused(
    calibrated: tuple[Path, Result],
    task: TinyTask,
    data: Path,
    options: tuple[object, ...],
    message: str,
) -> None:
    result = calibrate(calibrated[0], task, data, "--dry-run", *options)
    assert result.exit_code == 1
    assert message in result.stderr
