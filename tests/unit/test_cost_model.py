"""benchmarks.cost_model: its arithmetic against torch's own count, its plan for GPUs."""

import inspect
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.cost_model import (
    MODELS,
    Shape,
    bound_s,
    main,
    pass_work,
    planning,
    random_rows,
    works_of,
)
from dalorra_core.artifact.store import load_artifact
from dalorra_core.data.collate import collate
from dalorra_core.predictive.predictor import Predictor, SamplingPlan
from dalorra_core.predictive.scoring import RowsToScore, score_together
from dalorra_core.predictive.shared_base import SharedBase, identify
from dalorra_core.training.fixing import fix_gates
from tests.support.tiny_artifacts import save_tiny_adapter
from tests.support.tiny_models import save_tiny_base, tiny_model
from tests.support.tiny_tokenizer import tiny_tokenizer

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def three_layers(directory: Path, first: int, sampled: int = 0) -> Predictor:
    base = directory / "base"
    tiny_model(num_hidden_layers=3).save_pretrained(base)
    tiny_tokenizer(adds_start=True).save_pretrained(base)
    adapter = save_tiny_adapter(directory / "a", base, targets=TARGETS, layers=(first, 2))
    if sampled > first:
        adapter = fix_gates(adapter, directory / "b", below_layer=sampled, base=str(base))
    plain = SharedBase.load(identify(base), device="cpu")  # torch does not count packed products
    return Predictor.on(plain, load_artifact(adapter))


@pytest.mark.parametrize(("first", "sampled"), [(0, 0), (1, 1), (2, 2), (0, 1), (0, 2), (1, 2)])
@pytest.mark.parametrize(("rows", "length", "samples"), [(1, 9, 1), (3, 7, 1), (2, 11, 5)])
def test_the_arithmetic_of_a_pass_is_what_torch_counts(
    tmp_path: Path, first: int, sampled: int, rows: int, length: int, samples: int
) -> None:
    predictor = three_layers(tmp_path, first, sampled)
    shape = Shape.of(predictor)
    batch = collate(random_rows(rows, length, shape.vocabulary), num_labels=4)
    pack = predictor.pack(SamplingPlan(samples))
    # with gradients, since torch does not count what is added in place
    with torch.enable_grad(), FlopCounterMode(display=False) as counter:
        predictor.model(batch, pack)
    work = pass_work(shape, rows, length, samples)
    assert work.flops - work.attention == counter.get_total_flops()  # attention is not counted
    queries = rows * length * (sampled + (2 - sampled) * samples) + samples * rows
    assert work.attention == 4 * length * 32 * queries  # q·k and the sum of v, at a width of 32


@pytest.mark.parametrize(("first", "sampled"), [(0, 0), (1, 1), (2, 2), (0, 1), (0, 2), (1, 2)])
@pytest.mark.parametrize("limit", [1, 14, 30, 1000])
def test_the_arithmetic_of_several_passes_is_what_torch_counts(
    tmp_path: Path, first: int, sampled: int, limit: int
) -> None:
    predictor = three_layers(tmp_path, first, sampled)
    shape, samples = Shape.of(predictor), 5
    rows = [row for length in (4, 7) for row in random_rows(2, length, shape.vocabulary)]
    group = RowsToScore(predictor.model, predictor.pack(SamplingPlan(samples)), rows)
    with torch.enable_grad(), FlopCounterMode(display=False) as counter:
        inspect.unwrap(score_together)([group], max_padded_tokens=limit)  # with gradients, as above
    works = works_of(shape, [len(row.token_ids) for row in rows], samples, limit)
    assert sum(w.flops - w.attention for w in works) == counter.get_total_flops()


def test_the_weights_of_a_known_model_are_its_published_size() -> None:
    shape = MODELS["8B (Llama-3.1-8B)"]
    weights = shape.layers * shape.layer_weights + 2 * shape.width * shape.vocabulary
    assert weights == pytest.approx(8.03e9, rel=1e-3)


def test_a_pass_is_bound_by_what_takes_longer() -> None:
    work = pass_work(MODELS["8B (Llama-3.1-8B)"], 1, 64, 1)
    assert bound_s(work, 1e12, 1e15, 2) == pytest.approx(work.flops / 1e12)
    assert bound_s(work, 1e18, 1e12, 2) == pytest.approx(2 * work.weights / 1e12)


def test_a_plan_names_gpus_that_hold_the_weights() -> None:
    found = {
        (entry["model"][:3].strip(), entry["gpu"]): entry for entry in planning(1, 64, [1, 10])
    }
    assert found["8B", "H100 SXM"]["gpus"] == 1
    assert found["70B", "H100 SXM"]["gpus"] == 3  # 141 GB, a fifth of each GPU left free
    for entry in found.values():
        assert entry["ms at M = 1"] <= entry["ms at M = 10"] <= 10 * entry["ms at M = 1"] * 1.01


def test_the_program_measures_an_adapter(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = save_tiny_base(tmp_path / "base")
    adapter = save_tiny_adapter(tmp_path / "a", base)
    out = tmp_path / "cost.json"
    arguments = [str(adapter), "--base", str(base), "--device", "cpu", "--repeats", "2"]
    assert main([*arguments, "--batches", "2x6", "--num-samples", "3", "--output", str(out)]) == 0
    assert capsys.readouterr().out == out.read_text()
    assert '"way": "iid 3"' in out.read_text()
    with pytest.raises(SystemExit):
        main([])
