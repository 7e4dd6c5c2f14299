"""dalorra export: PEFT itself loads what is written and gives our answers, for every method."""

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from typer.testing import CliRunner, Result

from dalorra_core.adapters.inject import LM_HEAD
from dalorra_core.artifact.export_record import EXPORT_FILE, Parity, read_export
from dalorra_core.artifact.store import load_artifact
from dalorra_core.base_models.loading import load_model
from dalorra_core.cli import app
from dalorra_core.cli.export import parse_mask
from dalorra_core.config import MethodSettings
from dalorra_core.data.examples import TextExample
from dalorra_core.data.prompts import prompt_template
from dalorra_core.errors import ConfigError, ParityError
from dalorra_core.methods import METHODS
from dalorra_core.predictive import export as export_module
from dalorra_core.predictive import parity as parity_module
from dalorra_core.predictive.parity import check_parity
from dalorra_core.predictive.predictor import Predictor, SamplingPlan
from tests.support.method_cases import CASES, case_name, filled_state, method_of
from tests.support.tiny_artifacts import TEXTS, save_tiny_adapter, with_manifest
from tests.support.tiny_models import FAMILIES, assert_near, save_tiny_base, write_jsonl

pytestmark = pytest.mark.filterwarnings(
    "ignore:.is_gradient_checkpointing:FutureWarning",  # PEFT's own
    "ignore:Model with `tie_word_embeddings=True`",  # and nothing is merged
)

TENSORS = "adapter_model.safetensors"

REFUSED = {
    "mc_dropout": "inputs",
    "amortised_prompt": "depend on the question",
    "amortised_token": "depend on the question|function between",
    "c_lora": "depend on the question|function between",
    "laplace": "draws of the label logits",
}
"""Methods with samples that no settings make plain LoRA, and why."""


def call(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["export", *(str(a) for a in arguments), "--device", "cpu"])


def done(*arguments: object) -> Result:
    result = call(*arguments)
    assert result.exit_code == 0, result.output
    return result


def refused(output: Path, *arguments: object) -> str:
    """Return the message of an export that is refused and leaves nothing behind."""
    before = sorted(output.parent.iterdir())
    result = call(*arguments, "-o", output)
    assert result.exit_code == 1, result.output
    assert sorted(output.parent.iterdir()) == before
    return result.stderr


def parity_of(directory: Path) -> Parity:
    parity = read_export(directory).parity
    assert parity is not None
    return parity


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_base(tmp_path_factory.mktemp("export") / "base")


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_adapter(tmp_path_factory.mktemp("export") / "tiny", base)


@torch.inference_mode()
def peft_log_probs(directory: Path, base: Path, rows: list[Any], tokens: list[int]) -> Tensor:
    """Return (n, C) from a plain transformers model with one exported adapter, loaded by PEFT."""
    plain: Any = load_model(base, torch.device("cpu"), torch.float32)
    model: Any = PeftModel.from_pretrained(plain, str(directory))
    found = [model(input_ids=torch.tensor([row.token_ids])).logits[0, -1, tokens] for row in rows]
    return torch.stack(found).log_softmax(-1)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("mask", ["mean", "ones", "samples:3"])
def test_peft_gives_our_logits_on_every_family(tmp_path: Path, family: str, mask: str) -> None:
    """Heads that are tied to the embedding, biases, soft caps and sliding windows included."""
    base = save_tiny_base(tmp_path / "base", family)
    adapter = save_tiny_adapter(tmp_path / "tiny", base)
    result = done(adapter, "-o", tmp_path / "out", "--mask", mask)
    parity = parity_of(tmp_path / "out")
    assert max(parity.logits, parity.probabilities, parity.mean_probabilities) <= 1e-5
    assert parity.rows == 2
    assert "golden probes" in result.output


def test_samples_are_those_of_the_predictor(adapter: Path, base: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done(adapter, "-o", out, "--mask", "samples:4", "--design", "stratified", "--seed", 7)
    predictor = Predictor.load(adapter, base=str(base), device="cpu")
    plan = SamplingPlan(4, 7, design="stratified")
    record = read_export(out)
    assert (record.num_samples, record.seed, record.design) == (4, 7, "stratified")
    assert record.mask_set == predictor.mask_set(plan)
    assert record.source.adapter_sha256 == predictor.artifact.sha256
    assert record.base == predictor.manifest.base
    assert record.labels == predictor.manifest.labels
    assert record.prompt == predictor.manifest.prompt
    assert [a.path for a in record.adapters] == [f"sample-00{m}" for m in range(4)]
    rows = [predictor.encode(example) for example in _examples()]
    ours = predictor.predict(rows, plan).log_probs
    tokens = list(record.labels.token_ids)
    for m, one in enumerate(record.adapters):
        assert_near(peft_log_probs(out / one.path, base, rows, tokens), ours[m])
    # the probes hold what these four functions answer, which is not what the artifact's three do
    assert record.golden is not None
    assert record.golden.dtype == "float32"
    for probe, row in zip(record.golden.probes, predictor.golden_rows(), strict=True):
        expected = predictor.predict([row], plan, calibrated=False).log_probs.exp().mean(0)[0]
        assert_near(torch.tensor(probe.probs), expected)


def test_ranks_are_padded_and_heads_have_zero_rows(adapter: Path, tmp_path: Path) -> None:
    done(adapter, "-o", tmp_path / "out", "--mask", "samples:2", "--engine", "vllm")
    predictor_labels = read_export(tmp_path / "out").labels.token_ids
    for sample in ("sample-000", "sample-001"):
        folder = tmp_path / "out" / sample
        assert sorted(p.name for p in folder.iterdir()) == ["adapter_config.json", TENSORS]
        config = json.loads((folder / "adapter_config.json").read_text("utf-8"))
        tensors = load_file(folder / TENSORS)
        assert (config["r"], config["lora_alpha"]) == (8, 16)  # 3 and 6 in the artifact
        assert {t.shape[0] for n, t in tensors.items() if "lora_A" in n} == {8}
        up = tensors["base_model.model.lm_head.lora_B.weight"]
        assert up.shape == (480, 8)
        assert up.any(1).nonzero().flatten().tolist() == sorted(predictor_labels)


@pytest.mark.parametrize("config", CASES, ids=case_name)
def test_every_method_is_exported_or_refused_with_a_reason(
    config: MethodSettings, base: Path, tmp_path: Path
) -> None:
    state, method = filled_state(config), method_of(config)
    adapter = save_tiny_adapter(
        tmp_path / "demo", base, num_labels=5, config=config, params=state.params, golden=()
    )
    texts = write_jsonl(tmp_path / "t.jsonl", [{"id": t, "text": t} for t in TEXTS])
    count = method.num_functions(config) or (3 if method.draws_samples(config) else 1)
    ask = (adapter, "--mask", f"samples:{count}", "--texts", texts)
    flips = getattr(config, "test_noise", None) == "flipout"
    reason = "noise of its own" if flips else REFUSED.get(config.name)
    if reason is not None:
        message = refused(tmp_path / "out", *ask)
        assert f"method {config.name} cannot be exported" in message
        assert any(part in message for part in reason.split("|"))
        return
    done(*ask, "-o", tmp_path / "out")
    parity = parity_of(tmp_path / "out")
    assert max(parity.logits, parity.probabilities, parity.mean_probabilities) <= 1e-5
    assert len(read_export(tmp_path / "out").adapters) == count


def test_a_mean_or_opened_gates_are_one_adapter_of_any_gated_method(
    adapter: Path, base: Path, tmp_path: Path
) -> None:
    predictor = Predictor.load(adapter, base=str(base), device="cpu")
    key = "base_model.model.model.layers.1.self_attn.v_proj.lora_B.weight"
    stored = predictor.artifact.tensors["model.layers.1.self_attn.v_proj.lora_B"]
    keep = predictor.artifact.tensors["phi"].sigmoid()
    place = [m.name for m in predictor.manifest.modules].index("model.layers.1.self_attn.v_proj")
    for mask, expected in {"mean": stored * keep[place], "ones": stored}.items():
        done(adapter, "-o", tmp_path / mask, "--mask", mask)
        assert torch.equal(load_file(tmp_path / mask / TENSORS)[key][:, :3], expected)
        record = read_export(tmp_path / mask)
        assert [a.path for a in record.adapters] == ["."]
        assert (record.num_samples, record.design, record.seed) == (None, None, None)
    served = predictor.mask_set(SamplingPlan(estimator="mean_mask"))
    assert read_export(tmp_path / "mean").mask_set == served
    assert read_export(tmp_path / "ones").mask_set is None
    assert read_export(tmp_path / "ones").golden is None


def test_an_ensemble_of_logits_says_what_is_averaged(base: Path, tmp_path: Path) -> None:
    config = METHODS["ensemble"].settings.model_validate({"average": "logits", "num_members": 3})
    adapter = save_tiny_adapter(tmp_path / "demo", base, config=config)
    done(adapter, "-o", tmp_path / "out", "--mask", "samples:3")
    record = read_export(tmp_path / "out")
    assert record.average == "logits"
    assert (record.design, record.seed, record.num_samples) == (None, None, 3)
    predictor = Predictor.load(adapter, base=str(base), device="cpu")
    rows = [predictor.encode(example) for example in _examples()]
    tokens = list(record.labels.token_ids)
    parts = [peft_log_probs(tmp_path / "out" / a.path, base, rows, tokens) for a in record.adapters]
    assert_near(torch.stack(parts).mean(0).log_softmax(-1), predictor.predict(rows).log_probs[0])
    message = refused(tmp_path / "mean", adapter, "--mask", "mean")
    assert "mask must be samples:3 for method ensemble" in message


@pytest.mark.parametrize(
    ("method", "mask", "message"),
    [
        ("mle", "samples:4", r"mask must be mean for method mle.*1 function.*got samples:4"),
        ("ensemble", "samples:4", r"mask must be samples:3 for method ensemble.*got samples:4"),
        ("laplace", "samples:4", r"laplace cannot be exported as samples.*draws of the label"),
    ],
)
def test_another_number_of_functions_than_there_are_is_refused(
    base: Path, tmp_path: Path, method: str, mask: str, message: str
) -> None:
    if method == "laplace":
        config = next(c for c in CASES if c.name == "laplace")
        params = filled_state(config).params
        adapter = save_tiny_adapter(
            tmp_path / "a", base, num_labels=5, config=config, params=params
        )
    else:
        adapter = save_tiny_adapter(tmp_path / "a", base, method=method)
    assert re.search(message, refused(tmp_path / "out", adapter, "--mask", mask))


def test_a_laplace_mean_is_plain_lora(base: Path, tmp_path: Path) -> None:
    for config in (c for c in CASES if c.name == "laplace"):
        adapter = save_tiny_adapter(
            tmp_path / case_name(config),
            base,
            num_labels=5,
            config=config,
            params=filled_state(config).params,
        )
        out = tmp_path / f"{case_name(config)}-out"
        done(adapter, "-o", out, "--mask", "mean")
        assert parity_of(out).logits <= 1e-5
        one_answer = method_of(config).one_answer(config)
        assert (read_export(out).mask_set is None) == one_answer  # more than that function


def test_vllm_takes_heads_of_some_families_only(tmp_path: Path) -> None:
    base = save_tiny_base(tmp_path / "base", "qwen2")
    adapter = save_tiny_adapter(tmp_path / "head", base)
    ask = ("--mask", "mean", "--engine", "vllm")
    message = refused(tmp_path / "out", adapter, *ask)
    assert "engine must be peft for this adapter, got vllm" in message
    assert "takes none for qwen2" in message
    assert f"without {LM_HEAD} in adapter.target_modules" in message
    headless = save_tiny_adapter(tmp_path / "headless", base, targets=("q_proj", "v_proj"))
    done(headless, *ask, "-o", tmp_path / "out")
    assert parity_of(tmp_path / "out").logits <= 1e-5


def test_vllm_takes_no_head_of_too_many_tokens(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export_module, "_VLLM_MOST_TOKENS", 479)
    message = refused(tmp_path / "out", adapter, "--mask", "mean", "--engine", "vllm")
    assert "takes none of more than 479 tokens, and there are 480" in message


def test_nothing_is_written_where_peft_answers_otherwise(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(parity_module.PARITY_LIMIT, torch.float32, 0.0)
    message = refused(tmp_path / "out", adapter, "--mask", "samples:2")
    assert "ParityError" in message
    assert "the limit in float32 is 0" in message


def test_a_difference_that_is_no_number_is_above_every_limit() -> None:
    parity = Parity(
        rows=1,
        source="x",
        dtype="float32",
        peft="0",
        logits=float("nan"),
        probabilities=0,
        mean_probabilities=0,
        limit=1,
    )
    with pytest.raises(ParityError, match="differ by nan"):
        check_parity(parity)


def test_a_wrong_base_is_refused(adapter: Path, tmp_path: Path) -> None:
    other = save_tiny_base(tmp_path / "other", seed=1)
    message = refused(tmp_path / "out", adapter, "--mask", "mean", "--base", other)
    assert "BaseMismatchError" in message


def test_what_is_there_is_never_written_over(adapter: Path, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("keep", encoding="utf-8")
    (tmp_path / "file").write_text("keep", encoding="utf-8")
    for name in ("full", "file"):
        message = refused(tmp_path / name, adapter, "--mask", "mean")
        assert "output must be a new or an empty directory" in message
    assert (tmp_path / "full" / "mine").read_text("utf-8") == "keep"
    (tmp_path / "empty").mkdir()
    done(adapter, "-o", tmp_path / "empty", "--mask", "mean", "--no-verify")
    assert (tmp_path / "empty" / EXPORT_FILE).is_file()


def test_without_peft_only_the_comparison_is_missing(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    message = refused(tmp_path / "out", adapter, "--mask", "mean")
    assert "install the extra `peft`, or pass --no-verify" in message
    result = done(adapter, "-o", tmp_path / "out", "--mask", "mean", "--no-verify")
    assert "not compared with PEFT" in result.stderr
    assert read_export(tmp_path / "out").parity is None


def test_questions_are_compared_over_their_own_choices(base: Path, tmp_path: Path) -> None:
    adapter = save_tiny_adapter(tmp_path / "tiny", base, golden=())
    manifest = load_artifact(adapter).manifest
    layout = prompt_template("choice", None)
    prompt = manifest.prompt.model_copy(
        update={
            "kind": "choice",
            "name": layout.name,
            "template": layout.template,
            "sha256": layout.sha256,
        }
    )
    labels = manifest.labels.model_copy(update={"labels": ("A", "B", "C", "D")})
    with_manifest(adapter, prompt=prompt, labels=labels)
    message = refused(tmp_path / "out", adapter, "--mask", "mean")
    assert "it has none; pass --texts FILE or --no-verify" in message
    choices = [{"label": c, "text": f"the {c}"} for c in "ABC"]
    rows = [
        {"id": "1", "question": "which", "choices": choices},
        {"id": "2", "question": "what is it", "choices": choices[:2]},
    ]
    texts = write_jsonl(tmp_path / "questions.jsonl", rows)
    done(adapter, "-o", tmp_path / "out", "--mask", "samples:2", "--texts", texts)
    parity = parity_of(tmp_path / "out")
    assert (parity.rows, parity.source) == (2, "questions.jsonl")
    assert max(parity.logits, parity.probabilities, parity.mean_probabilities) <= 1e-5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--mask", "samples:0"), "mask must be mean, ones, samples or samples:M"),
        (("--mask", "some"), "got 'some'"),
        (("--mask", "mean", "--seed", "1"), "design and seed must be left out with mask mean"),
        (("--mask", "mean", "--format", "gguf"), "format must be peft, got 'gguf'"),
        (("--mask", "mean", "--engine", "tgi"), "engine must be peft or vllm, got 'tgi'"),
        (("--mask", "samples:2", "--design", "sobol"), "design must be"),
    ],
)
def test_a_wrong_option_names_domain_and_value(
    adapter: Path, tmp_path: Path, options: tuple[str, ...], message: str
) -> None:
    assert message in refused(tmp_path / "out", adapter, *options)


@pytest.mark.parametrize(
    "text", ["", "samples:", "samples:-1", "samples:1e3", "samples:٣", "mean:1"]
)
def test_a_mask_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="mask must be"):
        parse_mask(text)


def test_samples_alone_are_the_adapters_own(adapter: Path, tmp_path: Path) -> None:
    assert parse_mask("samples") == ("samples", None)
    done(adapter, "-o", tmp_path / "out", "--mask", "samples", "--no-verify")
    assert read_export(tmp_path / "out").num_samples == 3


def _examples() -> list[TextExample]:
    return [TextExample(text, text) for text in TEXTS]
