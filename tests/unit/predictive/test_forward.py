"""The fused forward, on every family: against merged weights, PEFT, and itself in other batches."""

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor

from dalorra_core.adapters.linear import AdaptedLinear
from dalorra_core.adapters.pack import SamplePack
from dalorra_core.data.collate import collate
from dalorra_core.methods import METHODS
from dalorra_core.methods.dalorra import DalorraConfig
from dalorra_core.methods.method import Draw
from dalorra_core.objectives.elbo import mean_nll
from dalorra_core.predictive.scoring import score_rows
from tests.support.tiny_models import (
    FAMILIES,
    TinyAdapter,
    assert_near,
    batch_of,
    gated_pack,
    merged_label_logits,
    point_of,
    random_rows,
    tiny_adapter,
    tiny_model,
)

LENGTHS = (7, 3, 11, 5)
M = 3
DALORRA = METHODS["dalorra"]


@pytest.fixture(scope="module", params=FAMILIES)
def tiny(request: pytest.FixtureRequest) -> TinyAdapter:
    return tiny_adapter(request.param)


@pytest.fixture(scope="module", params=FAMILIES)
def late(request: pytest.FixtureRequest) -> TinyAdapter:
    """Adapted from the second layer on, so that samples begin to differ inside the decoder."""
    return tiny_adapter(request.param, layers=(1, 1))


def hard(tiny: TinyAdapter, samples: int = M) -> Tensor:
    shape = (samples, len(tiny.state.specs), tiny.state.r)
    return (torch.rand(shape, generator=torch.Generator().manual_seed(3)) > 0.5).float()


@torch.no_grad()
def logits_of(tiny: TinyAdapter, pack: SamplePack, lengths: tuple[int, ...] = LENGTHS) -> Tensor:
    return tiny.model(batch_of(random_rows(lengths)), pack).logits


def gates_by_name(tiny: TinyAdapter, z: Tensor) -> dict[str, Tensor]:
    return {spec.name: z[i] for i, spec in enumerate(tiny.state.specs)}


def check_against_merged_weights(tiny: TinyAdapter, z: Tensor) -> None:
    found = logits_of(tiny, gated_pack(tiny.state, z)).double()  # (M, B, C)
    for m in range(len(z)):
        for b, row in enumerate(random_rows(LENGTHS)):
            expected = merged_label_logits(tiny, row.token_ids, gates_by_name(tiny, z[m]))
            assert_near(found[m, b], expected)


def test_fused_samples_equal_weights_merged_by_hand(tiny: TinyAdapter) -> None:
    check_against_merged_weights(tiny, hard(tiny))


def test_relaxed_gates_equal_weights_merged_by_hand(tiny: TinyAdapter) -> None:
    shape = (M, len(tiny.state.specs), tiny.state.r)
    check_against_merged_weights(
        tiny, torch.rand(shape, generator=torch.Generator().manual_seed(4))
    )


def test_an_adapter_on_late_layers_equals_weights_merged_by_hand(late: TinyAdapter) -> None:
    check_against_merged_weights(late, hard(late))


@pytest.mark.parametrize("targets", [("lm_head",), ("q_proj",), ("o_proj", "down_proj", "k_proj")])
def test_any_targets_equal_weights_merged_by_hand(targets: tuple[str, ...]) -> None:
    tiny = tiny_adapter(targets=targets)
    check_against_merged_weights(tiny, hard(tiny))


def test_the_fused_forward_equals_a_loop_of_single_ones(tiny: TinyAdapter) -> None:
    pack = gated_pack(tiny.state, hard(tiny))
    fused = logits_of(tiny, pack)
    loop = [logits_of(tiny, pack.narrow(m, m + 1)) for m in range(M)]
    assert_near(fused, torch.cat(loop))
    assert (fused[0] - fused[1]).abs().max() > 0.01  # the samples are not one function


def test_late_layers_fused_equal_a_loop_of_single_ones(late: TinyAdapter) -> None:
    pack = gated_pack(late.state, hard(late))
    loop = [logits_of(late, pack.narrow(m, m + 1)) for m in range(M)]
    assert_near(logits_of(late, pack), torch.cat(loop))


def test_an_answer_does_not_depend_on_its_batch(tiny: TinyAdapter) -> None:
    """Order, mates, padding, and being alone: the same logits."""
    pack, rows = gated_pack(tiny.state, hard(tiny)), random_rows(LENGTHS)
    with torch.no_grad():
        together = tiny.model(batch_of(rows), pack).logits
        reverse = tiny.model(batch_of(rows[::-1]), pack).logits.flip(1)
        assert_near(reverse, together)
        long = random_rows((30,), seed=9)
        padded = tiny.model(batch_of([*rows, *long]), pack).logits[:, :-1]
        assert_near(padded, together)
        for b, row in enumerate(rows):
            alone = tiny.model(batch_of([row]), pack).logits[:, 0]
            assert_near(alone, together[:, b])


def test_what_pads_a_row_cannot_be_seen(tiny: TinyAdapter) -> None:
    pack, rows = gated_pack(tiny.state, hard(tiny)), random_rows(LENGTHS)
    with torch.no_grad():
        zeros = tiny.model(collate(rows, num_labels=5, pad_id=0), pack).logits
        others = tiny.model(collate(rows, num_labels=5, pad_id=77), pack).logits
    assert torch.equal(zeros, others)


def test_with_b_zero_every_sample_is_the_base_model(tiny: TinyAdapter) -> None:
    zeroed = {
        name: torch.zeros_like(value) if name.endswith("lora_B") else value
        for name, value in tiny.state.params.items()
    }
    state = type(tiny.state)(tiny.state.specs, tiny.state.r, tiny.state.scaling, zeroed)
    pack = DALORRA.predict_pack(state, DalorraConfig(), Draw(("x",), 5))
    found = logits_of(tiny, pack).double()
    for b, row in enumerate(random_rows(LENGTHS)):
        expected = merged_label_logits(tiny, row.token_ids, None)
        for m in range(5):
            assert_near(found[m, b], expected)


def test_closed_gates_are_the_base_model_bit_for_bit(tiny: TinyAdapter) -> None:
    closed = gated_pack(tiny.state, torch.zeros(1, len(tiny.state.specs), tiny.state.r))
    rows = random_rows((9,))
    untouched = tiny.base.base_model(input_ids=torch.tensor([rows[0].token_ids])).last_hidden_state
    with torch.no_grad(), tiny.model.trunk.binding.bind(closed):
        ours = tiny.model.decoder(input_ids=torch.tensor([rows[0].token_ids])).last_hidden_state
    assert torch.equal(ours, untouched)
    none = SamplePack(1, 2.0, {})
    assert torch.equal(logits_of(tiny, closed), logits_of(tiny, none))
    assert not torch.equal(logits_of(tiny, gated_pack(tiny.state, None)), logits_of(tiny, none))


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # PEFT's own
@pytest.mark.parametrize("family", FAMILIES)
def test_open_gates_equal_pefts_lora(family: str) -> None:
    untied = family in ("llama",)  # PEFT warns about adapting a tied head
    targets = ("q_proj", "v_proj", "lm_head") if untied else ("q_proj", "v_proj", "down_proj")
    tiny = tiny_adapter(family, targets=targets)
    config = LoraConfig(r=3, lora_alpha=6, target_modules=list(targets), lora_dropout=0.0)
    theirs: Any = get_peft_model(tiny_model(family), config)
    with torch.no_grad():
        for spec in tiny.state.specs:
            layer = theirs.base_model.model.get_submodule(spec.name)
            layer.lora_A["default"].weight.copy_(tiny.state.params[f"{spec.name}.lora_A"])
            up = layer.lora_B["default"].weight
            ours = tiny.state.params[f"{spec.name}.lora_B"]
            up[list(tiny.label_set.token_ids) if spec.name == "lm_head" else slice(None)] = ours
        opened = torch.ones(2, len(tiny.state.specs), 3)
        for pack in (gated_pack(tiny.state, None), gated_pack(tiny.state, opened)):
            found = logits_of(tiny, pack)
            for b, row in enumerate(random_rows(LENGTHS)):
                full = theirs(input_ids=torch.tensor([row.token_ids])).logits[0, -1]
                expected = full[list(tiny.label_set.token_ids)]
                for m in range(len(found)):
                    assert_near(found[m, b], expected)


def test_certain_gates_recover_lora_exactly(tiny: TinyAdapter) -> None:
    certain = {**tiny.state.params, "phi": torch.full_like(tiny.state.params["phi"], 100.0)}
    state = type(tiny.state)(tiny.state.specs, tiny.state.r, tiny.state.scaling, certain)
    drawn = DALORRA.predict_pack(state, DalorraConfig(), Draw(("x",), 1))
    assert torch.equal(logits_of(tiny, drawn), logits_of(tiny, gated_pack(state, None)))
    mean = DALORRA.mean_pack(state, DalorraConfig())
    assert torch.equal(logits_of(tiny, mean), logits_of(tiny, gated_pack(state, None)))


def test_the_mean_mask_is_lora_with_b_times_the_keep_probabilities(tiny: TinyAdapter) -> None:
    keep = tiny.state.params["phi"].sigmoid()
    scaled = dict(tiny.state.params)
    for i, spec in enumerate(tiny.state.specs):
        scaled[f"{spec.name}.lora_B"] = scaled[f"{spec.name}.lora_B"] * keep[i]
    state = type(tiny.state)(tiny.state.specs, tiny.state.r, tiny.state.scaling, scaled)
    mean = logits_of(tiny, DALORRA.mean_pack(tiny.state, DalorraConfig()))
    assert_near(mean, logits_of(tiny, gated_pack(state, None)))


def test_before_b_moves_the_gates_get_no_gradient_from_the_data() -> None:
    """d NLL / d phi = 0 and d KL / d phi = 0 at the start: methods.md 4.11."""
    tiny = tiny_adapter()
    params = DALORRA.init(tiny.state.specs, 3, 0, DalorraConfig(prior_prob=0.7))
    params = {name: value.requires_grad_() for name, value in params.items()}
    state = type(tiny.state)(tiny.state.specs, 3, 2.0, params)
    batch = batch_of(random_rows(LENGTHS))
    pack = DALORRA.train_pack(state, DalorraConfig(), Draw(("x",), 2))
    mean_nll(tiny.model(batch, pack).logits, batch.labels).backward()
    assert params["phi"].grad is not None
    assert torch.equal(params["phi"].grad, torch.zeros_like(params["phi"]))
    (term,) = DALORRA.kl_terms(state, DalorraConfig(prior_prob=0.7), point_of(10), pack).values()
    (of_kl,) = torch.autograd.grad(term.value, params["phi"])
    assert of_kl.abs().max() < 1e-7
    for spec in tiny.state.specs:
        up = params[f"{spec.name}.lora_B"].grad
        assert up is not None
        assert up.abs().max() > 0  # the data reach every module


def test_gradients_of_the_whole_forward_match_finite_differences() -> None:
    """Relaxed gates through the model: d logits / d phi and d lora_B, central differences."""
    tiny = tiny_adapter()
    tiny.model.decoder.double()  # the head works in float32, always
    params = {name: v.double().requires_grad_() for name, v in tiny.state.params.items()}
    state = type(tiny.state)(tiny.state.specs, 3, 2.0, params)
    batch = batch_of(random_rows((5, 3)))

    def loss() -> Tensor:
        pack = DALORRA.train_pack(state, DalorraConfig(tau=0.5), Draw(("fd",), 2))
        return tiny.model(batch, pack).logits.double().square().sum()

    loss().backward()
    step = 1e-3
    for name in ("phi", "lm_head.lora_B", "model.layers.0.self_attn.q_proj.lora_A"):
        value = params[name]
        assert value.grad is not None
        steepest = int(value.grad.abs().argmax())
        flat = value.detach().view(-1)
        flat[steepest] += step
        above = loss().item()
        flat[steepest] -= 2 * step
        below = loss().item()
        flat[steepest] += step
        slope = (above - below) / (2 * step)
        assert abs(slope) > 0.1
        assert value.grad.view(-1)[steepest].item() == pytest.approx(slope, rel=1e-2)


def test_deterministic_scoring_is_bitwise_and_chunks_do_not_matter(tiny: TinyAdapter) -> None:
    rows = random_rows((7, 3, 11, 5, 3, 7, 2))
    pack = gated_pack(tiny.state, hard(tiny, 6))

    def score(limit: int, picked: list[int]) -> Tensor:
        part = [rows[i] for i in picked]
        return score_rows(tiny.model, pack, part, num_labels=5, max_padded_tokens=limit).log_probs

    everything = list(range(7))
    whole = score(10**6, everything)
    for limit in (1, 13, 40, 200):
        assert_near(score(limit, everything), whole)
    for first, second in pairwise([score(40, [i]) for i in (2, 2, 2)]):
        assert torch.equal(first, second)


def test_scores_are_normalised_and_say_which_labels_are_allowed(tiny: TinyAdapter) -> None:
    rows = random_rows((4, 6), allowed=[(0, 2), None])
    log_probs = score_rows(
        tiny.model, gated_pack(tiny.state, hard(tiny)), rows, num_labels=5, max_padded_tokens=500
    ).log_probs
    torch.testing.assert_close(log_probs.exp().sum(-1), torch.ones(M, 2))
    closed = log_probs[:, 0, [1, 3, 4]]
    assert torch.equal(closed, torch.full_like(closed, -math.inf))
    assert log_probs[:, 1].isfinite().all()


def test_a_forward_without_a_pack_is_the_base_models(tiny: TinyAdapter) -> None:
    """Nothing stays bound after a forward, a failed one included."""
    assert any(isinstance(m, AdaptedLinear) for m in tiny.model.modules())
    bad = gated_pack(tiny.state, hard(tiny, 1))
    broken = SamplePack(2, 2.0, {n: type(m)(m.lora_A, m.lora_B) for n, m in bad.modules.items()})
    with pytest.raises(RuntimeError), tiny.model.trunk.binding.bind(broken):
        logits_of(tiny, bad)
    ids = torch.tensor([[5, 6, 7]])
    after = tiny.model.decoder(input_ids=ids).last_hidden_state
    assert torch.equal(after, tiny.base.base_model(input_ids=ids).last_hidden_state)
