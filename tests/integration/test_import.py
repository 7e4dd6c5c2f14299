"""dalorra import: a LoRA that PEFT saved answers as before, with a policy and uncertainty."""

import json
import pickle
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner, Result

from dalorra_core.adapters.plain_lora import Factors
from dalorra_core.artifact.peft_io import PEFT_CONFIG_FILE, PEFT_TENSOR_FILE, read_peft, write_peft
from dalorra_core.artifact.store import ADAPTER_FILE, load_artifact
from dalorra_core.base_models.loading import load_model
from dalorra_core.cli import app
from dalorra_core.data.examples import TextExample
from dalorra_core.methods.tfb import SIGMA
from dalorra_core.predictive.predictor import Predictor, SamplingPlan
from tests.support.tiny_artifacts import TEXTS, save_tiny_adapter
from tests.support.tiny_models import LABEL_TOKENS, assert_near
from tests.support.tiny_tasks import INTENTS, TinyTask, tiny_config

pytestmark = pytest.mark.filterwarnings(
    "ignore:.is_gradient_checkpointing:FutureWarning",  # PEFT's own
    "ignore:Setting `save_embedding_layers` to `True`",  # a copy of the head, beside its factors
)

LABELS = sorted(INTENTS)
TOKENS = dict(zip(LABELS, LABEL_TOKENS, strict=False))
TFB = ("-s", "method=tfb", "-s", "method.high=0.5", "-s", "method.tolerance=10")
SHORT = ("-s", "method.search_steps=2", "-s", "method.search_samples=2")


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> TinyTask:
    return TinyTask(tmp_path_factory.mktemp("import"), "text")


@pytest.fixture(scope="module")
def settings(task: TinyTask, tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = tiny_config(task, method={"name": "mle"}).model_dump(mode="json")
    path = tmp_path_factory.mktemp("settings") / "run.json"
    path.write_text(json.dumps(config), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokens") / "tokens.json"
    path.write_text(json.dumps(TOKENS), encoding="utf-8")
    return path


class Theirs:
    """A LoRA on q, v of the second layer and the output projection, with ranks of two sizes."""

    def __init__(self, task: TinyTask, folder: Path) -> None:
        plain: Any = load_model(task.base, torch.device("cpu"), torch.float32)
        config = LoraConfig(
            r=3,
            lora_alpha=6,
            target_modules=["layers.1.self_attn.q_proj", "layers.1.self_attn.v_proj", "lm_head"],
            rank_pattern={"v_proj": 2},
            use_rslora=True,
            lora_dropout=0.2,
        )
        self.model: Any = get_peft_model(plain, config).eval()
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for name, value in self.model.named_parameters():
                if "lora_B" in name:
                    value.copy_(0.3 * torch.randn(value.shape, generator=generator))
        self.model.save_pretrained(folder)
        self.folder = folder

    @torch.inference_mode()
    def log_probs(self, predictor: Predictor) -> Tensor:
        ids = list(predictor.manifest.labels.token_ids)
        rows = [predictor.encode(TextExample(text, text)) for text in TEXTS]
        found = [
            self.model(input_ids=torch.tensor([row.token_ids])).logits[0, -1, ids] for row in rows
        ]
        return torch.stack(found).log_softmax(-1)


@pytest.fixture(scope="module")
def theirs(task: TinyTask, tmp_path_factory: pytest.TempPathFactory) -> Theirs:
    return Theirs(task, tmp_path_factory.mktemp("lora") / "lora")


def call(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments])


def done(*arguments: object) -> Result:
    result = call(*arguments)
    assert result.exit_code == 0, result.output
    return result


def ours(predictor: Predictor, plan: SamplingPlan | None = None) -> Tensor:
    rows = [predictor.encode(TextExample(text, text)) for text in TEXTS]
    return predictor.predict(rows, plan).log_probs


def test_an_imported_lora_answers_as_peft_does(
    task: TinyTask, settings: Path, theirs: Theirs, tokens: Path, tmp_path: Path
) -> None:
    result = done(
        *("import", theirs.folder, "-o", tmp_path / "mine", "-c", settings),
        *("--label-tokens", tokens),
    )
    assert "3 modules, r 3" in result.stderr
    predictor = Predictor.load(tmp_path / "mine", base=str(task.base), device="cpu")
    assert_near(ours(predictor)[0], theirs.log_probs(predictor))
    manifest = predictor.manifest
    assert manifest.labels.token_ids == tuple(TOKENS[name] for name in LABELS)
    assert manifest.method.name == "mle"
    assert [p.name for p in manifest.policies] == ["default"]
    assert len(manifest.golden) == 4
    assert manifest.provenance["from_peft"]["name"] == "lora"  # pyright: ignore
    assert manifest.provenance["steps"] == 0
    assert [p.name for p in tmp_path.iterdir()] == ["mine"]


def test_tfb_makes_it_bayesian_around_the_same_mean(
    task: TinyTask, settings: Path, theirs: Theirs, tmp_path: Path
) -> None:
    done("import", theirs.folder, "-o", tmp_path / "mine", "-c", settings, *TFB, *SHORT)
    predictor = Predictor.load(tmp_path / "mine", base=str(task.base), device="cpu")
    mean = ours(predictor, SamplingPlan(estimator="mean_mask"))
    assert_near(mean[0], theirs.log_probs(predictor))
    assert float(predictor.artifact.tensors[SIGMA]) > 0
    samples = ours(predictor, SamplingPlan(4))
    assert len(samples) == 4
    assert not torch.allclose(samples[0], samples[1], atol=1e-4)


def test_an_exported_adapter_comes_back_byte_for_byte(
    task: TinyTask, settings: Path, tokens: Path, tmp_path: Path
) -> None:
    adapter = save_tiny_adapter(tmp_path / "first", task.base, method="mle")
    done("export", adapter, "-o", tmp_path / "peft", "--mask", "mean", "--device", "cpu")
    done(
        *("import", tmp_path / "peft", "-o", tmp_path / "again", "-c", settings),
        *("--label-tokens", tokens),
    )
    first, again = (load_artifact(tmp_path / name) for name in ("first", "again"))
    assert (again.manifest.r, again.manifest.lora_alpha) == (3, 6)  # 8 and 16 in between
    content = [(tmp_path / name / ADAPTER_FILE).read_bytes() for name in ("first", "again")]
    assert content[0] == content[1]
    assert again.manifest.modules == first.manifest.modules


def train(settings: Path, start: Path, output: Path, *options: str) -> Result:
    where = ("-s", f"adapter.start={start}", "-o", output, "--run-dir", f"{output}-run")
    return call(
        *("train", "-c", settings, *where, "-s", "optim.steps=1", "-s", "optim.lr=1e-12"),
        *("-s", "data.validation_split=null", *options),
    )


SHAPE = ("-s", "adapter.r=3", "-s", "adapter.lora_alpha=6")


def test_training_starts_from_the_factors(task: TinyTask, settings: Path, tmp_path: Path) -> None:
    adapter = save_tiny_adapter(tmp_path / "first", task.base, method="mle")
    done("export", adapter, "-o", tmp_path / "peft", "--mask", "ones", "--no-verify")
    lora = read_peft(tmp_path / "peft")
    start, out = tmp_path / "peft", tmp_path / "out"
    result = train(settings, start, out, "-s", "method=dalorra", *SHAPE)
    assert result.exit_code == 0, result.output
    made = load_artifact(out)
    ids = list(made.manifest.labels.token_ids)
    for name, factors in lora.modules.items():
        up = factors.up[ids] if name == "lm_head" else factors.up
        assert_near(made.tensors[f"{name}.lora_A"], factors.down[:3])
        assert_near(made.tensors[f"{name}.lora_B"], up[:, :3])
    assert made.manifest.method.name == "dalorra"
    assert len(made.manifest.provenance["start"]["sha256"]) == 64  # pyright: ignore
    shown = made.manifest.provenance["config"]["adapter"]["start"]  # pyright: ignore
    assert shown == "peft"  # a name, not a place on a disk


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("-s", "adapter.r=4", "-s", "adapter.lora_alpha=6"), "adapter.r must be that of"),
        (("-s", "adapter.r=3", "-s", "adapter.lora_alpha=7"), "adapter.lora_alpha must be that"),
        ((*SHAPE, "-s", "adapter.layers=[0,0]"), "adapter.target_modules must be that of"),
        ((*SHAPE, "-s", "method=bayesian_lora"), "adapter.start must be null for method bayes"),
        ((*SHAPE, "-s", "method=tfb", "--from-adapter", "x"), "null with --from-adapter"),
    ],
)
def test_a_start_that_is_another_adapter_is_refused(
    task: TinyTask, settings: Path, tmp_path: Path, options: tuple[str, ...], message: str
) -> None:
    adapter = save_tiny_adapter(tmp_path / "first", task.base, method="mle", golden=())
    done("export", adapter, "-o", tmp_path / "peft", "--mask", "ones", "--no-verify")
    result = train(settings, tmp_path / "peft", tmp_path / "out", *options)
    assert result.exit_code == 1
    assert message in result.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("-s", "method=dalorra"), "method must be mle.*got dalorra; dalorra train with adapter"),
        (("-s", "method=ensemble"), "method must be mle.*got ensemble"),
        (("-s", "method={name: tfb, trained_as: map}"), "method must be mle.*got tfb"),
        (("-s", "name=../up"), "name"),
    ],
)
def test_a_setting_that_does_not_fit_is_refused(
    settings: Path, theirs: Theirs, tmp_path: Path, options: tuple[str, ...], message: str
) -> None:
    result = call("import", theirs.folder, "-o", tmp_path / "mine", "-c", settings, *options)
    assert result.exit_code == 1
    assert re.search(message, result.stderr)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[1]", "must be an object from label to token id"),
        ("{", "not valid JSON"),
        ('{"food": true}', "got True for 'food'"),
        ('{"food": -1}', "got -1 for 'food'"),
        ('{"food": 1}', "in one of the two only: money, time, travel"),
        (json.dumps(dict.fromkeys(LABELS, 7)), "different token ids"),
        (json.dumps({**TOKENS, "food": 480}), "label tokens must lie in 0..479"),
    ],
)
def test_label_tokens_that_fit_nothing_are_refused(
    settings: Path, theirs: Theirs, tmp_path: Path, content: str, message: str
) -> None:
    (tmp_path / "tokens.json").write_text(content, encoding="utf-8")
    result = call(
        *("import", theirs.folder, "-o", tmp_path / "mine", "-c", settings),
        *("--label-tokens", tmp_path / "tokens.json"),
    )
    assert result.exit_code == 1
    assert message in result.stderr
    assert not (tmp_path / "mine").exists()


def test_a_lora_of_another_base_is_refused(settings: Path, theirs: Theirs, tmp_path: Path) -> None:
    lora = read_peft(theirs.folder)
    names = list(lora.modules)
    moved = {f"{name}_of_another": factors for name, factors in lora.modules.items()}
    first = lora.modules[names[0]]
    wide = Factors(torch.zeros(3, first.down.shape[1] + 1), first.up)
    for modules, message in (
        (moved, "the base model has no linear layer"),
        ({**lora.modules, names[0]: wide}, "the LoRA's has"),
    ):
        folder = tmp_path / message[:8].replace(" ", "")
        write_peft(folder, replace(lora, modules=modules), "x")
        result = call("import", folder, "-o", tmp_path / "mine", "-c", settings)
        assert result.exit_code == 1
        assert "BaseModelError" in result.stderr
        assert message in result.stderr


def test_a_head_that_was_trained_itself_is_refused(
    settings: Path, theirs: Theirs, tmp_path: Path
) -> None:
    folder = tmp_path / "lora"
    folder.mkdir()
    tensors = load_file(theirs.folder / PEFT_TENSOR_FILE)
    tensors["base_model.model.lm_head.base_layer.weight"][0, 0] += 1
    save_file(tensors, folder / PEFT_TENSOR_FILE)
    config = (theirs.folder / PEFT_CONFIG_FILE).read_bytes()
    (folder / PEFT_CONFIG_FILE).write_bytes(config)
    result = call("import", folder, "-o", tmp_path / "mine", "-c", settings)
    assert result.exit_code == 1
    assert "a weight of the base model, lm_head, that is not this base model's" in result.stderr


def test_a_pickle_is_never_opened(settings: Path, theirs: Theirs, tmp_path: Path) -> None:
    folder = tmp_path / "lora"
    folder.mkdir()
    for file in theirs.folder.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(print))
    result = call("import", folder, "-o", tmp_path / "mine", "-c", settings)
    assert result.exit_code == 1
    assert "ArtifactUnsafeError" in result.stderr


def test_what_is_there_is_replaced_only_when_asked(
    settings: Path, theirs: Theirs, tmp_path: Path
) -> None:
    ask = ("import", theirs.folder, "-o", tmp_path / "mine", "-c", settings)
    done(*ask)
    result = call(*ask)
    assert result.exit_code == 1
    assert "pass --overwrite" in result.stderr
    done(*ask, "--overwrite")


def test_a_family_with_a_tied_head_imports_its_label_rows(tmp_path: Path) -> None:
    task = TinyTask(tmp_path, "text", "qwen2")
    config = tiny_config(task, method={"name": "mle"}).model_dump(mode="json")
    path = tmp_path / "run.json"
    path.write_text(json.dumps(config), encoding="utf-8")
    adapter = save_tiny_adapter(tmp_path / "first", task.base, method="mle")
    done("export", adapter, "-o", tmp_path / "peft", "--mask", "mean", "--device", "cpu")
    done("import", tmp_path / "peft", "-o", tmp_path / "again", "-c", path)
    made = load_artifact(tmp_path / "again")
    assert made.manifest.modules == load_artifact(adapter).manifest.modules
