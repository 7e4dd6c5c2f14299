"""The core's commands as a person meets them: what they print, write and refuse."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.distributions import Bernoulli
from typer.testing import CliRunner, Result

from dalorra_core.artifact.store import ADAPTER_FILE, MANIFEST_FILE
from server.cli import app
from tests.support.tiny_models import save_tiny_base, write_jsonl
from tests.support.tiny_tasks import INTENTS, TinyTask, tiny_config

LABELS = sorted(INTENTS)

pytestmark = pytest.mark.usefixtures("in_folder")


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> TinyTask:
    return TinyTask(tmp_path_factory.mktemp("task"), "text")


@pytest.fixture
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def call(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments])


def config_file(task: TinyTask, folder: Path) -> Path:
    path = folder / "run.json"
    path.write_text(json.dumps(tiny_config(task).model_dump(mode="json")), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def adapter(task: TinyTask, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapter")
    result = call(
        "train", "-c", config_file(task, folder), "-o", folder / "out", "--run-dir", folder / "run"
    )
    assert result.exit_code == 0, result.output
    return folder / "out"


@pytest.mark.parametrize(
    "command",
    ["train", "evaluate", "calibrate", "predict", "inspect", "export", "import", "serve"],
)
def test_every_command_explains_itself(command: str) -> None:
    result = call(command, "--help")
    assert result.exit_code == 0
    assert "Example" in result.output
    assert len(result.output.splitlines()) > 20


def test_training_says_what_it_does(task: TinyTask, tmp_path: Path) -> None:
    result = call(
        *("train", "-c", config_file(task, tmp_path), "-s", "optim.steps=2"),
        *("-s", "name=other", "-s", "method=mle"),
    )
    assert result.exit_code == 0, result.output
    assert "mle on" in result.stderr
    assert "step 2/2" in result.stderr
    assert (tmp_path / "adapters" / "other" / MANIFEST_FILE).is_file()
    assert (tmp_path / "runs" / "other" / "metrics.jsonl").is_file()


def test_a_wrong_setting_names_domain_and_value(task: TinyTask, tmp_path: Path) -> None:
    result = call("train", "-c", config_file(task, tmp_path), "-s", "method.tau=-1")
    assert result.exit_code == 1
    assert "method.dalorra.tau" in result.stderr
    assert "greater than 0" in result.stderr
    assert "-1" in result.stderr


def test_a_bad_row_stops_before_training(task: TinyTask, tmp_path: Path) -> None:
    rows = [
        {"id": "1", "text": "fine", "label": LABELS[0]},
        {"id": "2", "text": " ", "label": "x"},
    ]
    bad = write_jsonl(tmp_path / "bad.jsonl", rows)
    result = call(
        *("train", "-c", config_file(task, tmp_path), "-s", f"data.source={bad}"),
        *("-s", "data.validation_split=null"),
    )
    assert result.exit_code == 1
    assert "bad.jsonl" in result.stderr
    assert "2" in result.stderr
    assert "text" in result.stderr
    assert not (tmp_path / "runs").exists()


def test_inspect_shows_the_posterior(adapter: Path) -> None:
    result = call("inspect", adapter)
    assert result.exit_code == 0, result.output
    for shown in ("dalorra", "sha256:", "expected rank", "quantiles", "q_proj", LABELS[0]):
        assert shown in result.output


def test_inspect_as_json_is_complete(adapter: Path) -> None:
    values = json.loads(call("inspect", adapter, "--json").stdout)
    assert values["labels"]["labels"] == LABELS
    kept = values["posterior"]["keep_prob"]
    ranks = values["posterior"]["expected_rank"]
    assert {name: pytest.approx(sum(p)) for name, p in kept.items()} == ranks
    assert values["sizes_bytes"][ADAPTER_FILE] == (adapter / ADAPTER_FILE).stat().st_size


def flip(name: str, position: int) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        content = bytearray((folder / name).read_bytes())
        content[position] ^= 1
        (folder / name).write_bytes(bytes(content))

    return change


def newer(folder: Path) -> None:
    path = folder / MANIFEST_FILE
    values = json.loads(path.read_text("utf-8"))
    path.write_text(json.dumps(values | {"format_version": 3}), encoding="utf-8")


@pytest.mark.parametrize(
    ("damage", "error"),
    [
        (flip(ADAPTER_FILE, -1), "ArtifactCorruptError"),
        (flip(MANIFEST_FILE, 200), "ArtifactCorruptError"),
        (newer, "ArtifactVersionError"),
        (lambda folder: (folder / ADAPTER_FILE).unlink(), "ArtifactMissingFileError"),
        (lambda folder: (folder / "adapter_model.bin").write_bytes(b"x"), "ArtifactUnsafeError"),
    ],
)
def test_a_damaged_artifact_is_refused_by_name(
    adapter: Path, tmp_path: Path, damage: Callable[[Path], None], error: str
) -> None:
    copy = shutil.copytree(adapter, tmp_path / "copy")
    damage(copy)
    result = call("inspect", copy)
    assert result.exit_code == 1
    assert error in result.stderr


def test_another_base_model_is_refused_with_both_fingerprints(
    adapter: Path, tmp_path: Path
) -> None:
    other = save_tiny_base(tmp_path / "base", seed=7)
    result = call("predict", adapter, "hello", "--base", other)
    assert result.exit_code == 1
    assert "BaseMismatchError" in result.stderr
    assert result.stderr.count("sha256:") == 2


def test_predict_answers_one_json_line_a_text(adapter: Path, task: TinyTask) -> None:
    result = call("predict", adapter, "one two", "three", "--base", task.base)
    assert result.exit_code == 0, result.output
    answers = [json.loads(line) for line in result.stdout.splitlines()]
    assert [a["id"] for a in answers] == ["0", "1"]
    for answer in answers:
        assert sum(answer["probs"]) == pytest.approx(1)
        assert answer["confidence"] == max(answer["probs"])
        assert answer["label"] == LABELS[answer["probs"].index(max(answer["probs"]))]
        parts = answer["uncertainty"]
        assert parts["predictive_entropy"] == pytest.approx(
            parts["expected_entropy"] + parts["mutual_information"], abs=1e-9
        )


def test_predict_gives_the_same_answer_from_a_file(adapter: Path, task: TinyTask) -> None:
    rows = write_jsonl(Path("rows.jsonl"), [{"id": "a", "text": "one two"}])
    from_file = json.loads(call("predict", adapter, "-i", rows, "--base", task.base).stdout)
    direct = json.loads(call("predict", adapter, "one two", "--base", task.base).stdout)
    assert from_file["probs"] == direct["probs"]


def test_the_mean_mask_has_no_epistemic_part(adapter: Path, task: TinyTask) -> None:
    result = call("predict", adapter, "x", "--base", task.base, "--estimator", "mean_mask")
    assert json.loads(result.stdout)["uncertainty"]["mutual_information"] is None


def test_a_design_is_followed_and_part_of_the_report(adapter: Path, task: TinyTask) -> None:
    ask = ("predict", adapter, "one two", "--base", task.base, "-M", 3)
    probs = {
        design: json.loads(call(*ask, "--design", design).stdout)["probs"]
        for design in ("iid", "stratified", "antithetic")
    }
    assert probs["iid"] == json.loads(call(*ask).stdout)["probs"]
    assert len({tuple(p) for p in probs.values()}) == 3
    evaluated = call(
        *("evaluate", adapter, "--data", task.data, "--split", "validation", "--base", task.base),
        *("--resamples", 0, "--design", "stratified", "-o", "designs.json"),
    )
    assert evaluated.exit_code == 0, evaluated.output
    report = json.loads(Path("designs.json").read_text("utf-8"))
    assert report["design"] == "stratified"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "either texts or --input"),
        (("x", "--truncate", "middle"), "'middle'"),
        (("x", "--estimator", "median"), "'median'"),
        (("x", "--design", "sobol"), "design must be iid or stratified or antithetic, got 'sobol'"),
        (
            ("x", "--design", "iid", "--estimator", "mean_mask"),
            "design must be left out with mean_mask, got 'iid'",
        ),
        (("x", "--device", "tpu"), "'tpu'"),
        (("x", "--dtype", "int8"), "'int8'"),
        (("word " * 500,), "the limit is"),
    ],
)
def test_predict_refuses_what_it_cannot_do(
    adapter: Path, task: TinyTask, arguments: tuple[str, ...], message: str
) -> None:
    result = call("predict", adapter, *arguments, "--base", task.base)
    assert result.exit_code == 1
    assert message in result.stderr


def test_evaluate_reports_and_stores_what_it_scored(adapter: Path, task: TinyTask) -> None:
    result = call(
        *("evaluate", adapter, "--data", task.data, "--split", "validation"),
        *("--base", task.base, "--resamples", 50, "-o", "report.json"),
        *("--scores", "scores.safetensors"),
    )
    assert result.exit_code == 0, result.output
    report = json.loads(Path("report.json").read_text("utf-8"))
    scores = load_file("scores.safetensors")
    inside = scores["labels"] >= 0
    hits = (scores["predicted"] == scores["labels"])[inside].double()
    accuracy = report["metrics"]["accuracy"]
    assert accuracy["value"] == pytest.approx(float(hits.mean()))
    assert accuracy["low"] <= accuracy["value"] <= accuracy["high"]
    assert report["num_in_scope"] == int(inside.sum())
    assert f"{accuracy['value']:.4f}" in result.stdout
    phi = load_file(adapter / "adapter.safetensors")["phi"].double()
    expected = Bernoulli(logits=phi).entropy().mean()
    assert report["gate_entropy"]["in_scope"] == pytest.approx(float(expected), rel=1e-5)
    assert f"gate_entropy_in_scope{' ' * 12}{float(expected):.4f}" in result.stdout
    (policy,) = report["policies"]
    assert policy["accepted"] + policy["reviewed"] + policy["abstained"] == pytest.approx(1)
    assert torch.isfinite(scores["mutual_information"]).all()


def test_evaluate_refuses_labels_the_adapter_does_not_know(adapter: Path, task: TinyTask) -> None:
    rows = write_jsonl(Path("rows.jsonl"), [{"id": "odd", "text": "x", "label": "unheard"}])
    result = call("evaluate", adapter, "--data", rows, "--base", task.base)
    assert result.exit_code == 1
    assert "unheard" in result.stderr
    assert "odd" in result.stderr
