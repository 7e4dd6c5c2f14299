"""benchmarks.vllm_cost: its arithmetic by hand."""

import pytest

from benchmarks.cost_model import MODELS, Shape, pass_work
from benchmarks.vllm_cost import crossover, late, shared_layers_ratio, vllm_work

TINY = Shape(
    *(2, 4, 2, 1, 2, 6, 10), labels=3, rank=1, adapted=(("q_proj", 4, 4),)
)  # 120 weights a layer


def test_every_sample_runs_the_whole_prompt_through_all_layers() -> None:
    work = vllm_work(TINY, 1, 3, 2)  # six tokens
    products, adapter, head = 2 * 120 * 6 * 2, 2 * 8 * 6 * 2, 2 * 4 * 10 * 2
    assert work.attention == 4 * 3 * 4 * 6 * 2
    assert work.flops == products + adapter + head + work.attention
    assert work.weights == 2 * 120 + 4 * 10
    assert vllm_work(TINY, 4, 3, 2).flops == 4 * work.flops
    assert vllm_work(late(TINY, 1), 1, 3, 2).flops == work.flops - adapter // 2


def test_the_label_mass_asks_again_for_what_no_full_block_holds() -> None:
    assert vllm_work(TINY, 1, 3, 2, label_mass=True).flops == 2 * vllm_work(TINY, 1, 3, 2).flops
    assert vllm_work(TINY, 1, 20, 2, label_mass=True).tokens == 2 * (20 + 4)
    assert vllm_work(TINY, 1, 32, 2, label_mass=True).tokens == 2 * (32 + 16)  # never nothing


def test_shared_layers_are_the_larger_part_of_the_crossover() -> None:
    assert shared_layers_ratio(32, 16, 4) == pytest.approx(128 / 80)
    assert shared_layers_ratio(32, 0, 10) == 1
    shape = MODELS["8B (Llama-3.1-8B)"]
    for below in (0, 16):
        found = crossover(late(shape, below), 64, 4)
        alone = shared_layers_ratio(32, below, 4)
        assert alone < found < 1.07 * alone  # the rest is the last layer at the last token
    ours = pass_work(late(shape, 16), 1, 64, 4).flops
    assert crossover(late(shape, 16), 64, 4) * ours == pytest.approx(
        vllm_work(late(shape, 16), 1, 64, 4).flops
    )
