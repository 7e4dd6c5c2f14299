"""From files to an artifact to answers, on tiny models: the whole line of one training run."""

import json
import math
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode

from dalorra_core.artifact.store import load_artifact, pack_tensors, save_artifact
from dalorra_core.base_models.fingerprint import fingerprint
from dalorra_core.base_models.loading import pick_dtype
from dalorra_core.config import AdapterConfig, OptimConfig
from dalorra_core.data.examples import Choice, ChoiceExample, TextExample
from dalorra_core.errors import (
    ArtifactCorruptError,
    ArtifactError,
    BaseMismatchError,
    ConfigError,
    DalorraError,
    DataError,
    GoldenProbeError,
    InputTooLongError,
)
from dalorra_core.methods.dalorra import DalorraConfig
from dalorra_core.predictive import shared_base as shared_base_module
from dalorra_core.predictive.matching import tokenizer_sha256
from dalorra_core.predictive.predictor import Predictor, SamplingPlan
from dalorra_core.training.checkpoint import Checkpoint, latest_checkpoint, load_checkpoint
from dalorra_core.training.run import run_training
from dalorra_core.training.settings import TrainConfig
from dalorra_core.training.step import TrainStep
from tests.support.tiny_models import (
    VOCABULARY,
    assert_near,
    batch_of,
    random_rows,
    save_tiny_base,
    tiny_adapter,
    write_jsonl,
)
from tests.support.tiny_tasks import INTENTS, TinyTask, tiny_config

ROOT = Path(__file__).parents[2]


def numpy_state() -> list[int]:
    """Return the state of NumPy's global generator."""
    state: Any = np.random.get_state()  # noqa: NPY002
    return state[1].tolist()


def silent(_: str) -> None:
    """Swallow what a run reports."""


def run(config: TrainConfig, folder: Path, name: str = "out", **options: Any) -> Path:
    """Train into ``folder/name`` with ``folder/name-run`` as run directory."""
    return run_training(config, folder / name, folder / f"{name}-run", report=silent, **options)


def stored_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint whatever run it belongs to."""
    identity = json.loads((path / "checkpoint.json").read_text("utf-8"))["config"]
    return load_checkpoint(path, identity)


def metrics_of(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def plain_json(text: str) -> Any:
    """Parse JSON as every other program does: NaN is no number."""

    def refuse(token: str) -> None:
        pytest.fail(f"{token} is not JSON, in {text}")

    return json.loads(text, parse_constant=refuse)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> TinyTask:
    return TinyTask(tmp_path_factory.mktemp("text"), "text")


@pytest.fixture(scope="module")
def choice(tmp_path_factory: pytest.TempPathFactory) -> TinyTask:
    return TinyTask(tmp_path_factory.mktemp("choice"), "choice")


@pytest.fixture(scope="module")
def trained(text: TinyTask, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(tiny_config(text), tmp_path_factory.mktemp("trained"))


@pytest.fixture(scope="module")
def trained_mle(text: TinyTask, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(tiny_config(text, method={"name": "mle"}), tmp_path_factory.mktemp("mle"))


@pytest.fixture(scope="module")
def trained_choice(choice: TinyTask, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(tiny_config(choice), tmp_path_factory.mktemp("choice"))


@pytest.fixture(scope="module")
def predictor(trained: Path, text: TinyTask) -> Predictor:
    return Predictor.load(trained, base=str(text.base), device="cpu")


def questions(predictor: Predictor) -> list[Any]:
    texts = ["transfer the", "is a flight to you", "what", "how to order and alarm of the my"]
    return [predictor.encode(TextExample(f"q{i}", t)) for i, t in enumerate(texts)]


# --- learning -------------------------------------------------------------------------------


@pytest.mark.parametrize("artifact", ["trained", "trained_mle", "trained_choice"])
def test_a_task_is_learnt(artifact: str, request: pytest.FixtureRequest) -> None:
    directory: Path = request.getfixturevalue(artifact)
    lines = metrics_of(directory.with_name("out-run"))
    nll = [line["nll"] for line in lines if "nll" in line]
    num_labels = len(load_artifact(directory).manifest.labels.labels)
    assert sum(nll[-2:]) / 2 < 0.35 * math.log(num_labels)
    assert nll[0] > 3 * nll[-1]
    validation = load_artifact(directory).manifest.provenance["validation"]
    assert isinstance(validation, dict)
    accuracy = validation["accuracy"]
    assert isinstance(accuracy, float)
    assert accuracy >= 0.8
    evaluated = [line["validation"] for line in lines if "validation" in line]
    assert len(evaluated) == 2
    expected = {"mean"} if artifact == "trained_mle" else {"mean", "mc"}
    assert {name.partition("/")[0] for name in evaluated[-1]} == expected


def test_the_gates_move_from_their_prior_and_the_log_says_so(trained: Path) -> None:
    lines = [m for m in metrics_of(trained.with_name("out-run")) if "mask_kl" in m]
    assert [line["step"] for line in lines] == [10, 20, 30, 40, 50, 60, 70, 80]
    for line in lines:
        assert line["loss"] == pytest.approx(line["nll"] + line["mask_kl"] / 64, rel=1e-5)
    assert lines[-1]["mask_kl"] > 0.05
    phi = load_artifact(trained).tensors["phi"]
    assert phi.std() > 0.05
    assert lines[-1]["keep_prob"] == pytest.approx(float(phi.sigmoid().mean()), abs=1e-6)


def test_mle_goes_through_the_same_code_without_gates(trained_mle: Path, text: TinyTask) -> None:
    assert "phi" not in load_artifact(trained_mle).tensors
    point = Predictor.load(trained_mle, base=str(text.base), device="cpu")
    assert point.point_method
    answer = point.predict(questions(point), SamplingPlan(num_samples=8, seed=4))
    assert answer.log_probs.shape[0] == point.num_functions(SamplingPlan(8, 4)) == 1
    assert point.mask_set(SamplingPlan(8, 4)) == point.mask_set(SamplingPlan(2, 0, "mean_mask"))
    (policy,) = point.manifest.policies
    assert (policy.chosen_on.num_samples, policy.chosen_on.estimator) == (1, "mean_mask")


@pytest.mark.parametrize("family", ["qwen2", "gemma2", "gemma3"])
def test_other_families_train_and_answer(tmp_path: Path, family: str) -> None:
    task = TinyTask(tmp_path, "text", family)
    config = tiny_config(task, optim={"steps": 30, "lr": 1e-2})
    directory = run(config, tmp_path)
    nll = [m["nll"] for m in metrics_of(tmp_path / "out-run") if "nll" in m]
    assert nll[-1] < 0.8 * nll[0]
    assert Predictor.load(directory, base=str(task.base), device="cpu").self_test() < 1e-5


# --- the artifact ---------------------------------------------------------------------------


def test_the_manifest_says_how_it_was_made(trained: Path, text: TinyTask) -> None:
    values = plain_json((trained / "manifest.json").read_text("utf-8"))
    assert values["base"]["fingerprint"] == fingerprint(text.base)
    assert values["labels"]["labels"] == sorted(INTENTS)
    assert values["labels"]["out_of_scope_label"] == "oos"
    assert [m["name"] for m in values["modules"]][-1] == "lm_head"
    assert values["modules"][-1]["d_out"] == 4  # label rows only
    made = values["provenance"]
    assert (made["steps"], made["resumed_at"]) == (80, 0)
    assert made["data"]["train"]["rows"] == 64
    assert made["data"]["validation"]["rows"] == 20
    (policy,) = values["policies"]
    assert (policy["chosen_on"]["n"], policy["chosen_on"]["n_out_of_scope"]) == (20, 4)
    assert (policy["chosen_on"]["num_samples"], policy["guarantee"]) == (4, None)
    assert len(values["golden"]) == 4
    everything = (trained / "manifest.json").read_text("utf-8")
    assert str(text.data.parent) not in everything  # names, not places on a disk
    assert sorted(p.name for p in trained.iterdir()) == ["adapter.safetensors", "manifest.json"]


def test_every_line_of_the_log_is_json(trained: Path, trained_choice: Path) -> None:
    """A perfect validation score leaves the AUROC of errors undefined: null, not NaN."""
    for directory in (trained, trained_choice):
        plain_json((directory / "manifest.json").read_text("utf-8"))
        for line in (directory.with_name("out-run") / "metrics.jsonl").read_text().splitlines():
            plain_json(line)


def test_stored_probes_are_reproduced(predictor: Predictor) -> None:
    assert len(predictor.manifest.golden) == 4
    assert predictor.self_test() < 1e-6


def test_probes_of_cut_questions_are_reproduced(text: TinyTask, tmp_path: Path) -> None:
    config = tiny_config(text, data={"max_tokens": 6, "truncate": "end"}, optim={"steps": 2})
    directory = run(config, tmp_path)
    cut = Predictor.load(directory, base=str(text.base), device="cpu")
    assert any(
        len(cut.encode(TextExample("p", str(p.row["text"])), "end").token_ids) == 6
        for p in cut.manifest.golden
    )
    assert cut.self_test() < 1e-6
    with pytest.raises(InputTooLongError):
        cut.encode(TextExample("long", "how " * 20))


def test_probes_are_stored_in_float32_wherever_the_run_answers_in_bfloat16(
    text: TinyTask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run on CUDA answers its held-out rows in bfloat16; its probes must hold on every device."""

    def as_on_cuda(dtype: str, device: torch.device) -> torch.dtype:
        return torch.bfloat16 if dtype == "auto" else pick_dtype(dtype, device)

    monkeypatch.setattr(shared_base_module, "pick_dtype", as_on_cuda)
    directory = run(tiny_config(text, optim={"steps": 20}), tmp_path)
    monkeypatch.undo()
    (policy,) = load_artifact(directory).manifest.policies
    assert policy.chosen_on.dtype == "bfloat16"
    assert Predictor.load(directory, base=str(text.base), device="cpu").self_test() < 1e-6
    rounded = Predictor.load(
        directory, base=str(text.base), device="cpu", dtype="bfloat16", verify_golden=False
    )
    assert rounded.self_test() > 1e-4


def test_a_run_without_validation_has_probes_and_no_policy(text: TinyTask, tmp_path: Path) -> None:
    config = tiny_config(text, data={"validation_split": None}, optim={"steps": 2})
    manifest = load_artifact(run(config, tmp_path)).manifest
    assert (manifest.policies, len(manifest.golden)) == ((), 4)
    assert not any("validation" in line for line in metrics_of(tmp_path / "out-run"))


def test_an_adapter_that_answers_otherwise_is_refused(
    trained: Path, text: TinyTask, tmp_path: Path
) -> None:
    stored = load_artifact(trained)
    probe = stored.manifest.golden[0]
    wrong = probe.model_copy(update={"probs": tuple(p + 0.01 for p in probe.probs)})
    manifest = stored.manifest.model_copy(update={"golden": (wrong,)})
    save_artifact(tmp_path / "bad", manifest, (trained / "adapter.safetensors").read_bytes())
    with pytest.raises(GoldenProbeError, match=r"off by 0\.01; the limit in float32 is 0\.001"):
        Predictor.load(tmp_path / "bad", base=str(text.base), device="cpu")
    Predictor.load(tmp_path / "bad", base=str(text.base), device="cpu", verify_golden=False)


def test_another_base_model_is_refused_with_both_fingerprints(
    trained: Path, text: TinyTask, tmp_path: Path
) -> None:
    other = save_tiny_base(tmp_path / "other", seed=1)
    with pytest.raises(BaseMismatchError) as caught:
        Predictor.load(trained, base=str(other), device="cpu")
    assert fingerprint(other) in str(caught.value)
    assert fingerprint(text.base) in str(caught.value)


def test_another_tokenizer_is_refused_with_both_hashes(
    trained: Path, text: TinyTask, tmp_path: Path
) -> None:
    other = save_tiny_base(tmp_path / "other")
    path = other / "tokenizer.json"
    path.write_text(path.read_text("utf-8") + " ", "utf-8")
    with pytest.raises(BaseMismatchError) as caught:
        Predictor.load(trained, base=str(other), device="cpu")
    assert tokenizer_sha256(other) in str(caught.value)
    assert tokenizer_sha256(text.base) in str(caught.value)


def test_a_tokenizer_of_several_files_is_hashed_whole(tmp_path: Path) -> None:
    (tmp_path / "vocab.json").write_text("{}")
    (tmp_path / "merges.txt").write_text("a b")
    before = tokenizer_sha256(tmp_path)
    (tmp_path / "merges.txt").write_text("a c")
    assert tokenizer_sha256(tmp_path) != before


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("phi", torch.zeros(5, 3), r"tensor phi has shape \(5, 3\), expected \(5, 4\)"),
        ("lm_head.lora_B", torch.zeros(480, 4), r"shape \(480, 4\), expected \(4, 4\)"),
        ("phi", None, r"do not match the manifest's modules: \['phi'\]"),
        ("extra", torch.zeros(1), r"do not match the manifest's modules: \['extra'\]"),
    ],
)
def test_tensors_that_do_not_fit_the_manifest_are_refused(
    trained: Path,
    text: TinyTask,
    tmp_path: Path,
    name: str,
    value: torch.Tensor | None,
    said: str,
) -> None:
    stored = load_artifact(trained)
    tensors = {**stored.tensors, name: value}
    kept = {k: v for k, v in tensors.items() if v is not None}
    save_artifact(tmp_path / "bad", stored.manifest, pack_tensors(kept))
    with pytest.raises(ArtifactCorruptError, match=said):
        Predictor.load(tmp_path / "bad", base=str(text.base), device="cpu")


# --- answers --------------------------------------------------------------------------------


def test_a_restart_gives_the_same_answers(
    predictor: Predictor, trained: Path, text: TinyTask
) -> None:
    rows, plan = questions(predictor), SamplingPlan(5, seed=2)
    fresh = Predictor.load(trained, base=str(text.base), device="cpu")
    first, second = predictor.predict(rows, plan), fresh.predict(rows, plan)
    assert torch.equal(first.log_probs, second.log_probs)
    assert first.label_mass is not None
    assert second.label_mass is not None
    assert torch.equal(first.label_mass, second.label_mass)
    assert predictor.mask_set(plan) == fresh.mask_set(plan)
    assert predictor.revision == load_artifact(trained).sha256[:12]


def test_a_deterministic_predictor_is_bitwise_whatever_shares_its_batch(
    trained: Path, text: TinyTask
) -> None:
    exact = Predictor.load(trained, base=str(text.base), device="cpu", deterministic=True)
    rows = questions(exact)
    together = exact.predict(rows)
    backwards = exact.predict(rows[::-1])
    assert torch.equal(backwards.log_probs.flip(1), together.log_probs)
    assert together.label_mass is not None
    for b, row in enumerate(rows):
        alone = exact.predict([row])
        assert torch.equal(alone.log_probs[:, 0], together.log_probs[:, b])
        assert alone.label_mass is not None
        assert torch.equal(alone.label_mass, together.label_mass[b : b + 1])
    assert exact.predict(rows, label_mass=False).label_mass is None


def test_alone_equals_batched(predictor: Predictor) -> None:
    rows = questions(predictor)
    together = predictor.predict(rows).log_probs
    for b, row in enumerate(rows):
        alone = predictor.predict([row]).log_probs[:, 0]
        assert_near(alone, together[:, b])


def test_saving_and_loading_keeps_every_bit(
    predictor: Predictor, trained: Path, text: TinyTask, tmp_path: Path
) -> None:
    stored = load_artifact(trained)
    save_artifact(tmp_path / "copy", stored.manifest, pack_tensors(stored.tensors))
    copy = Predictor.load(tmp_path / "copy", base=str(text.base), device="cpu")
    rows = questions(predictor)
    assert torch.equal(copy.predict(rows).log_probs, predictor.predict(rows).log_probs)


def test_renaming_or_a_new_policy_changes_no_mask(
    predictor: Predictor, trained: Path, text: TinyTask, tmp_path: Path
) -> None:
    stored = load_artifact(trained)
    manifest = stored.manifest.model_copy(update={"name": "renamed", "policies": ()})
    save_artifact(tmp_path / "n", manifest, (trained / "adapter.safetensors").read_bytes())
    renamed = Predictor.load(tmp_path / "n", base=str(text.base), device="cpu")
    rows = questions(predictor)
    assert torch.equal(renamed.predict(rows).log_probs, predictor.predict(rows).log_probs)
    assert renamed.mask_set(SamplingPlan()) == predictor.mask_set(SamplingPlan())


def test_plans_pick_their_mask_sets(predictor: Predictor) -> None:
    rows = questions(predictor)
    ten, four = predictor.predict(rows, SamplingPlan(10)), predictor.predict(rows, SamplingPlan(4))
    assert_near(ten.log_probs[:4], four.log_probs)  # prefixes
    other = predictor.predict(rows, SamplingPlan(4, seed=1))
    assert (other.log_probs - four.log_probs).abs().max() > 0.01
    mean = predictor.predict(rows, SamplingPlan(4, 7, "mean_mask"))
    assert mean.log_probs.shape[0] == 1
    one = predictor.predict(rows, SamplingPlan(1))
    assert (one.log_probs - mean.log_probs).abs().max() > 0.01  # one hard mask is not the mean
    ids = [
        predictor.mask_set(plan)
        for plan in (
            SamplingPlan(10),
            SamplingPlan(4),
            SamplingPlan(4, seed=1),
            SamplingPlan(4, 7, "mean_mask"),
        )
    ]
    assert len(set(ids)) == 4
    assert predictor.mask_set(SamplingPlan(9, 1, "mean_mask")) == ids[3]
    assert predictor.default_plan == SamplingPlan(4, 0)
    with pytest.raises(ConfigError, match="num_samples must be at least 1, got 0"):
        SamplingPlan(0)


def test_packs_are_drawn_once_and_only_a_few_are_kept(predictor: Predictor) -> None:
    first = predictor.pack(SamplingPlan(2, seed=50))
    assert predictor.pack(SamplingPlan(2, seed=50)) is first
    for seed in range(51, 60):
        predictor.pack(SamplingPlan(2, seed=seed))
    again = predictor.pack(SamplingPlan(2, seed=50))
    assert again is not first
    z, old = again.modules["lm_head"].z, first.modules["lm_head"].z
    assert z is not None
    assert old is not None
    assert torch.equal(z, old)


def test_questions_are_answered_among_their_own_choices(
    trained_choice: Path, choice: TinyTask
) -> None:
    asked = Predictor.load(trained_choice, base=str(choice.base), device="cpu")
    assert (asked.kind, asked.labels) == ("choice", ("A", "B", "C"))
    row = asked.encode(
        ChoiceExample("q", "a speed of", None, (Choice("A", "the"), Choice("B", "my")), None)
    )
    log_probs = asked.predict([row]).log_probs
    assert torch.equal(log_probs[:, 0, 2], torch.full((4,), -math.inf))
    torch.testing.assert_close(log_probs[:, 0, :2].exp().sum(-1), torch.ones(4))


# --- resume, and what a run refuses ---------------------------------------------------------

KILLED = """
import os, signal, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from dalorra_core.training.settings import TrainConfig
from dalorra_core.training import checkpoint, run
written = 0
sync = os.fsync
def die_in_the_third_checkpoint(fd):
    global written
    written += 1
    if written == 8:  # three files each: the second file of the third checkpoint
        os.kill(os.getpid(), signal.SIGKILL)
    sync(fd)
os.fsync = die_in_the_third_checkpoint
config = TrainConfig.model_validate_json(sys.argv[1])
run.run_training(config, Path(sys.argv[2]), Path(sys.argv[3]), report=lambda _: None)
"""


def test_a_killed_run_resumes_to_the_same_tensors(text: TinyTask, tmp_path: Path) -> None:
    """SIGKILL in the middle of writing the checkpoint of step 21; the run goes on from step 14."""
    config = tiny_config(
        text,
        method={"num_train_samples": 2},
        optim={"steps": 26, "batch_size": 3, "gradient_accumulation": 2},
        run={"checkpoint_every": 7},
    )
    whole = run(config, tmp_path, "whole")
    arguments = [config.model_dump_json(), str(tmp_path / "out"), str(tmp_path / "out-run")]
    process = subprocess.run(
        [sys.executable, "-c", KILLED, *arguments],
        cwd=ROOT,
        check=False,
        capture_output=True,
        env={"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PATH": ""},
    )
    assert process.returncode == -signal.SIGKILL, process.stderr.decode()
    left = sorted(p.name for p in (tmp_path / "out-run" / "checkpoints").iterdir())
    assert left[-2:] == ["step-00000007", "step-00000014"]
    assert left[0].startswith(".writing-")
    assert not (tmp_path / "out").exists()
    resumed = run(config, tmp_path, resume=True)
    assert load_artifact(resumed).manifest.provenance["resumed_at"] == 14
    assert (resumed / "adapter.safetensors").read_bytes() == (
        whole / "adapter.safetensors"
    ).read_bytes()
    steps = [m["step"] for m in metrics_of(tmp_path / "out-run") if "nll" in m]
    assert steps[-2:] == [20, 26]


@pytest.fixture(scope="module")
def started(text: TinyTask, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("started")
    run(tiny_config(text, optim={"steps": 4}, run={"checkpoint_every": 2}), folder)
    return folder


def test_a_run_with_changed_rows_does_not_resume(
    text: TinyTask, started: Path, tmp_path: Path
) -> None:
    rows = [json.loads(line) for line in (text.data / "train.jsonl").read_text().splitlines()]
    rows[0]["text"] += " more"
    changed = tmp_path / "data"
    changed.mkdir()
    write_jsonl(changed / "train.jsonl", rows)
    write_jsonl(changed / "validation.jsonl", rows[:4])
    settings = tiny_config(text, optim={"steps": 4}, run={"checkpoint_every": 2})
    data = settings.data.model_copy(update={"source": str(changed)})
    with pytest.raises(ConfigError, match=r"train_rows\.sha256"):
        run(settings.model_copy(update={"data": data}), started, resume=True, overwrite=True)


def test_a_run_with_changed_settings_does_not_resume(text: TinyTask, started: Path) -> None:
    changed = tiny_config(text, optim={"steps": 4, "lr": 0.5}, run={"checkpoint_every": 2})
    with pytest.raises(ConfigError, match=r"optim\.lr was 0\.03, now 0\.5"):
        run(changed, started, resume=True, overwrite=True)


def test_a_used_run_directory_is_refused_without_resume(text: TinyTask, started: Path) -> None:
    config = tiny_config(text, optim={"steps": 4}, run={"checkpoint_every": 2})
    with pytest.raises(ConfigError, match="already holds step-00000004: pass --resume"):
        run(config, started, overwrite=True)


def test_an_existing_output_is_refused_before_anything_else(text: TinyTask, started: Path) -> None:
    with pytest.raises(ConfigError, match="already exists; pass --overwrite"):
        run(tiny_config(text, data={"source": "nowhere"}), started)


def test_an_output_that_is_no_artifact_is_never_replaced(text: TinyTask, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("years of work")
    with pytest.raises(ArtifactError, match="is not an adapter directory"):
        run(tiny_config(text, optim={"steps": 1}), tmp_path, overwrite=True)
    assert (tmp_path / "out" / "thesis.txt").exists()


def test_a_finished_run_resumes_to_its_artifact(text: TinyTask, started: Path) -> None:
    config = tiny_config(text, optim={"steps": 4}, run={"checkpoint_every": 2})
    before = (started / "out" / "adapter.safetensors").read_bytes()
    again = run(config, started, resume=True, overwrite=True)
    assert (again / "adapter.safetensors").read_bytes() == before


def test_a_bad_row_stops_the_run_before_training(text: TinyTask, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in (text.data / "train.jsonl").read_text().splitlines()]
    del rows[2]["label"]
    write_jsonl(tmp_path / "data" / "train.jsonl", rows)
    config = tiny_config(text, data={"source": str(tmp_path / "data"), "validation_split": None})
    with pytest.raises(DataError, match=r"train\.jsonl.*3.*label"):
        run(config, tmp_path)
    assert not (tmp_path / "out-run").exists()


@pytest.mark.parametrize(
    ("every", "said"), [(1, "a parameter is not finite"), (1000, "step 10: the loss is not finite")]
)
def test_a_run_that_diverges_stops_and_keeps_its_last_checkpoint(
    text: TinyTask, tmp_path: Path, every: int, said: str
) -> None:
    config = tiny_config(
        text,
        optim={"steps": 40, "lr": 1e30, "warmup_ratio": 0.3},
        run={"checkpoint_every": every},
    )
    with pytest.raises(DalorraError, match=said):
        run(config, tmp_path)
    if every > 1:
        assert not (tmp_path / "out").exists()
        return
    newest = latest_checkpoint(tmp_path / "out-run" / "checkpoints")
    assert newest is not None
    kept = stored_checkpoint(newest)
    assert all(value.isfinite().all() for value in kept.params.values())


# --- the optimiser --------------------------------------------------------------------------


@pytest.fixture
def optimiser_steps() -> Iterator[list[list[dict[str, Any]]]]:
    """Record the groups of every optimiser step, by torch's own hook."""
    seen: list[list[dict[str, Any]]] = []

    def record(optimizer: Optimizer, _: Any, __: Any) -> None:
        keys = ("lr", "weight_decay", "eps", "betas")
        groups = [{key: group[key] for key in keys} for group in optimizer.param_groups]
        for group, full in zip(groups, optimizer.param_groups, strict=True):
            group["sizes"] = sorted(p.numel() for p in full["params"])
        seen.append(groups)

    handle = register_optimizer_step_pre_hook(record)
    yield seen
    handle.remove()


def test_rates_rise_linearly_then_fall_to_zero_in_both_groups(
    text: TinyTask, tmp_path: Path, optimiser_steps: list[list[dict[str, Any]]]
) -> None:
    config = tiny_config(
        text,
        method={"name": "dalorra", "mask_lr": 0.05},
        optim={"steps": 20, "lr": 0.01, "warmup_ratio": 0.25, "weight_decay": 0.1},
    )
    run(config, tmp_path)
    assert len(optimiser_steps) == 20
    for k, (factors, gates) in enumerate(optimiser_steps):
        share = k / 5 if k < 5 else (20 - k) / 15
        assert factors["lr"] == pytest.approx(0.01 * share)
        assert gates["lr"] == pytest.approx(0.05 * share)
        assert (factors["weight_decay"], gates["weight_decay"]) == (0.1, 0.0)
        assert gates["sizes"] == [5 * 4]
        assert len(factors["sizes"]) == 10
        assert (factors["eps"], factors["betas"]) == (1e-6, (0.9, 0.999))


def test_a_resumed_run_continues_the_schedule(
    text: TinyTask, tmp_path: Path, optimiser_steps: list[list[dict[str, Any]]]
) -> None:
    config = tiny_config(text, optim={"steps": 12}, run={"checkpoint_every": 4})
    run(config, tmp_path)
    shutil.rmtree(tmp_path / "out-run" / "checkpoints" / "step-00000012")
    first = list(optimiser_steps)
    optimiser_steps.clear()
    run(config, tmp_path, resume=True, overwrite=True)
    assert optimiser_steps == first[8:]


@pytest.mark.parametrize("method", ["dalorra", "mle"])
def test_two_accumulated_batches_of_four_equal_one_of_eight(
    text: TinyTask, tmp_path: Path, method: str
) -> None:
    """Eight rows of equal length are one step either way, whatever their order."""
    words = ("transfer", "flight", "alarm", "order")
    labels = ("money", "travel", "time", "food")
    rows = [
        {"id": str(i), "text": f"{['the', 'a', 'of', 'is'][i // 2]} {words[i % 4]}"}
        | {"label": labels[i % 4]}
        for i in range(8)
    ]
    write_jsonl(tmp_path / "data" / "train.jsonl", rows)
    data = {"source": str(tmp_path / "data"), "validation_split": None, "prompt": "{text} Intent:"}
    tensors = []
    for size, accumulation in ((8, 1), (4, 2)):
        config = tiny_config(
            text,
            method={"name": method},
            data=data,
            optim={"batch_size": size, "gradient_accumulation": accumulation, "steps": 6}
            | {"eps": 1e-3},
        )
        run(config, tmp_path, f"by-{size}")
        newest = latest_checkpoint(tmp_path / f"by-{size}-run" / "checkpoints")
        assert newest is not None
        tensors.append(stored_checkpoint(newest).params)
    for name, value in tensors[0].items():
        torch.testing.assert_close(tensors[1][name], value, rtol=1e-6, atol=1e-6)
    assert tensors[0]["lm_head.lora_B"].abs().max() > 1e-3


# --- what a run must not do -----------------------------------------------------------------


class LargestVocabularyTensor(TorchDispatchMode):
    """Watch every tensor that is computed for one whose last axis is the vocabulary."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(value, torch.Tensor) and value.dim() > 0:
                made = "view" not in str(func) and "detach" not in str(func)
                if value.shape[-1] == VOCABULARY and made and value.is_floating_point():
                    self.rows.append(value.numel() // VOCABULARY)
        return out


def test_no_tensor_of_tokens_by_vocabulary_is_made_in_training() -> None:
    tiny = tiny_adapter()
    step = TrainStep(
        tiny.model,
        tiny.state.specs,
        AdapterConfig(r=3),
        DalorraConfig(num_train_samples=2),
        optim=OptimConfig(),
        num_examples=10,
        seed=0,
    )
    batch = batch_of(random_rows((7, 5, 9, 4)))
    with LargestVocabularyTensor() as watched:
        step(batch, 3).loss.backward()
    assert watched.rows == []
    with LargestVocabularyTensor() as control:  # the watch does see one where there is one
        tiny.base(input_ids=batch.input_ids)
    assert max(control.rows) == 4 * 9


def test_the_output_projection_runs_once_before_training_and_never_in_it(
    text: TinyTask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[torch.Size] = []
    load = shared_base_module.load_model

    def watched(*args: Any) -> Any:
        model: Any = load(*args)
        model.lm_head.register_forward_hook(lambda _, __, out: calls.append(out.shape))
        return model

    monkeypatch.setattr(shared_base_module, "load_model", watched)
    run(tiny_config(text, optim={"steps": 3}), tmp_path)
    # LabelHead.check_against, for the trained adapter and for the stored one on the same base
    assert calls == 2 * [torch.Size([1, 3, VOCABULARY])]


def test_no_global_random_state_is_read_or_set(
    text: TinyTask, trained: Path, tmp_path: Path
) -> None:
    """Python's own generator is left out: the run-time shape checker of the tests draws from it."""
    torch.default_generator.manual_seed(123)
    np.random.seed(123)  # noqa: NPY002  the global state is the point
    before = torch.get_rng_state(), numpy_state()
    directory = run(tiny_config(text, optim={"steps": 2}), tmp_path)
    loaded = Predictor.load(directory, base=str(text.base), device="cpu")
    loaded.predict(questions(loaded), SamplingPlan(3, seed=8))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert numpy_state() == before[1]
    again = run(tiny_config(text, optim={"steps": 2}), tmp_path, "again")
    torch.default_generator.manual_seed(7)
    other = run(tiny_config(text, optim={"steps": 2}), tmp_path, "other")
    files = [(d / "adapter.safetensors").read_bytes() for d in (directory, again, other)]
    assert files[0] == files[1] == files[2]
    assert files[0] != (trained / "adapter.safetensors").read_bytes()


def test_tensorboard_has_what_the_log_has(text: TinyTask, tmp_path: Path) -> None:
    config = tiny_config(text, optim={"steps": 10}, run={"tensorboard": True, "eval_every": 10})
    run(config, tmp_path)
    (events,) = (tmp_path / "out-run").rglob("events.out.tfevents.*")
    accumulator = EventAccumulator(str(events))
    accumulator.Reload()
    line = next(m for m in metrics_of(tmp_path / "out-run") if m["step"] == 10)
    (loss,) = accumulator.Scalars("loss")
    assert (loss.step, loss.value) == (10, pytest.approx(line["loss"]))
    assert "validation/mc/accuracy" in accumulator.Tags()["scalars"]
