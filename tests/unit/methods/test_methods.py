"""dalorra_core.methods: what each method puts into a pack, a loss and an optimiser."""

import math
from collections.abc import Mapping

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from dalorra_core.adapters.inject import TargetSpec, count_parameters, find_targets
from dalorra_core.adapters.linear import low_rank_delta
from dalorra_core.adapters.pack import SamplePack
from dalorra_core.adapters.state import AdapterState
from dalorra_core.config import OptimConfig
from dalorra_core.methods import METHODS
from dalorra_core.methods.dalorra import DalorraConfig, hard_gates, relaxed_gates
from dalorra_core.methods.method import Draw
from dalorra_core.methods.mle import MleConfig
from dalorra_core.objectives.elbo import KlTerm
from dalorra_core.sampling.designs import iid_uniforms
from tests.support.tiny_models import point_of

DALORRA, MLE = METHODS["dalorra"], METHODS["mle"]
SPECS = (TargetSpec("layers.0.q", 6, 4, 0), TargetSpec("lm_head", 6, 5, None))
DRAW = Draw(("run", 3), 7)


def state_of(config: DalorraConfig | MleConfig, *, r: int = 3, seed: int = 0) -> AdapterState:
    params = METHODS[config.name].init(SPECS, r, seed, config)
    generator = torch.Generator().manual_seed(seed)
    for name in params:
        if not name.endswith("lora_A"):
            params[name] = torch.randn(params[name].shape, generator=generator)
    return AdapterState(SPECS, r, 2.0, params)


def gates_of(pack: SamplePack) -> torch.Tensor:
    gates = [pack.modules[spec.name].z for spec in SPECS]
    assert all(z is not None for z in gates)
    return torch.stack([z for z in gates if z is not None], dim=1)  # (M, L, r)


@pytest.fixture(scope="module")
def llama_8b() -> LlamaForCausalLM:
    """Llama-3.1-8B's shapes on the meta device: no weights."""
    config = LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
    )
    with torch.device("meta"):
        return LlamaForCausalLM(config)


def divergences(state: AdapterState, config: DalorraConfig, n: int) -> Mapping[str, KlTerm]:
    return DALORRA.kl_terms(state, config, point_of(n), DALORRA.mean_pack(state, config))


def test_the_published_parameter_counts(llama_8b: LlamaForCausalLM) -> None:
    specs = find_targets(llama_8b, ("q_proj", "v_proj", "lm_head"))
    assert len(specs) == 65
    assert count_parameters(specs, r=8) == 4_466_688
    with torch.device("meta"):
        small = [TargetSpec(s.name, 1, 1, s.layer) for s in specs]  # phi depends on L and r only
    params = DALORRA.init(small, 8, 0, DalorraConfig())
    mle = MLE.init(small, 8, 0, MleConfig())
    assert sum(v.numel() for v in params.values()) - sum(v.numel() for v in mle.values()) == 520


def test_dalorra_starts_at_its_prior() -> None:
    config = DalorraConfig(prior_prob=0.7)
    state = AdapterState(SPECS, 3, 2.0, DALORRA.init(SPECS, 3, 0, config))
    keep = state.params["phi"].sigmoid()
    torch.testing.assert_close(keep, torch.full((2, 3), 0.7))
    (term,) = divergences(state, config, 10).values()
    assert abs(term.value.item()) < 1e-6


def test_both_methods_start_from_the_same_factors() -> None:
    ours, plain = DALORRA.init(SPECS, 3, 5, DalorraConfig()), MLE.init(SPECS, 3, 5, MleConfig())
    assert set(ours) - set(plain) == {"phi"}
    assert all(torch.equal(ours[name], plain[name]) for name in plain)


def test_training_gates_are_relaxed_and_named_by_the_draw() -> None:
    config = DalorraConfig(tau=0.4)
    state = state_of(config)
    z = gates_of(DALORRA.train_pack(state, config, DRAW))
    v = iid_uniforms(("run", 3, "z"), 7, 2, 3)
    assert torch.equal(z, relaxed_gates(state.params["phi"], v, 0.4))
    other = gates_of(DALORRA.train_pack(state, config, Draw(("run", 4), 7)))
    assert not torch.equal(z, other)


def test_straight_through_gates_are_hard_with_the_relaxed_gradient() -> None:
    relaxed, through = DalorraConfig(), DalorraConfig(train_masks="straight_through")
    weights = torch.randn(7, 2, 3, generator=torch.Generator().manual_seed(1))
    gradients = []
    for config in (relaxed, through):
        state = state_of(config)
        phi = state.params["phi"].requires_grad_()
        z = gates_of(DALORRA.train_pack(state, config, DRAW))
        (z * weights).sum().backward()
        gradients.append(phi.grad)
    v = iid_uniforms(("run", 3, "z"), 7, 2, 3)
    assert torch.equal(z.detach(), hard_gates(state.params["phi"], v))
    torch.testing.assert_close(gradients[0], gradients[1], rtol=0, atol=0)


def test_prediction_gates_are_hard_unless_configured() -> None:
    state = state_of(DalorraConfig())
    v = iid_uniforms(("run", 3, "z"), 7, 2, 3)
    hard = gates_of(DALORRA.predict_pack(state, DalorraConfig(), DRAW))
    assert torch.equal(hard, hard_gates(state.params["phi"], v))
    config = DalorraConfig(test_masks="relaxed", tau=0.4)
    relaxed = gates_of(DALORRA.predict_pack(state, config, DRAW))
    assert torch.equal(relaxed, relaxed_gates(state.params["phi"], v, 0.4))


def test_the_mean_pack_carries_keep_probabilities() -> None:
    state = state_of(DalorraConfig())
    pack = DALORRA.mean_pack(state, DalorraConfig())
    assert pack.num_samples == 1
    torch.testing.assert_close(gates_of(pack)[0], state.params["phi"].sigmoid())


def test_mle_is_one_function_whatever_is_asked_for() -> None:
    state = state_of(MleConfig())
    packs = (MLE.mean_pack(state, MleConfig()), MLE.predict_pack(state, MleConfig(), DRAW))
    for pack in (*packs, MLE.train_pack(state, MleConfig(), DRAW)):
        assert pack.num_samples == 1
        assert all(module.z is None for module in pack.modules.values())
        assert MLE.kl_terms(state, MleConfig(), point_of(100), pack) == {}
    assert MLE.num_train_samples(MleConfig()) == 1
    assert (MLE.stochastic, DALORRA.stochastic) == (False, True)
    assert MLE.summary(state, MleConfig()) == {}


@pytest.mark.parametrize(
    ("config", "weight"),
    [
        (DalorraConfig(), 1 / 50),
        (DalorraConfig(kl_weight=0.3), 0.3 / 50),
        (DalorraConfig(kl_scale="unit"), 1.0),
        (DalorraConfig(kl_scale="unit", kl_weight=0.3), 0.3),
    ],
)
def test_the_kl_is_divided_by_the_number_of_examples_once(
    config: DalorraConfig, weight: float
) -> None:
    (term,) = divergences(state_of(config), config, 50).values()
    assert term.weight == pytest.approx(weight)
    assert term.value.item() > 0.1


def test_optimiser_groups_cover_every_parameter_and_never_decay_the_gates() -> None:
    optim = OptimConfig(lr=3e-4, weight_decay=0.1)
    config = DalorraConfig(mask_lr=2e-2)
    state = state_of(config)
    groups = DALORRA.param_groups(state, optim, config)
    named = {name: group for group in groups for name in group.names}
    assert sorted(named) == sorted(state.params)
    assert (named["phi"].lr, named["phi"].weight_decay) == (2e-2, 0.0)
    for name in set(named) - {"phi"}:
        assert (named[name].lr, named[name].weight_decay) == (3e-4, 0.1)
    (only,) = MLE.param_groups(state_of(MleConfig()), optim, MleConfig())
    assert (only.lr, only.weight_decay) == (3e-4, 0.1)
    assert sorted(only.names) == sorted(state_of(MleConfig()).params)


def test_the_summary_speaks_of_keep_probabilities() -> None:
    state = state_of(DalorraConfig())
    keep = state.params["phi"].double().sigmoid()
    summary = DALORRA.summary(state, DalorraConfig())
    assert summary["num_gates"] == 6
    assert summary["expected_rank"]["lm_head"] == pytest.approx(float(keep[1].sum()))
    assert summary["keep_prob"]["layers.0.q"] == pytest.approx(keep[0].tolist())
    quantiles = summary["keep_prob_quantiles"]
    ordered = sorted(keep.flatten().tolist())
    assert (quantiles["0"], quantiles["1"]) == (
        pytest.approx(ordered[0]),
        pytest.approx(ordered[5]),
    )
    assert quantiles["0.5"] == pytest.approx((ordered[2] + ordered[3]) / 2)


def test_the_expected_output_of_hard_masks_is_the_mean_masks() -> None:
    """E over hard masks of Delta h is s B (p * u): methods.md 8."""
    n, state = 4000, state_of(DalorraConfig())
    h = torch.randn(1, 6, generator=torch.Generator().manual_seed(2))
    hard = DALORRA.predict_pack(state, DalorraConfig(), Draw(("mean",), n))
    mean = DALORRA.mean_pack(state, DalorraConfig())
    drawn = low_rank_delta(h.expand(n, 6), hard.modules["lm_head"], n, 2.0).double()
    expected = low_rank_delta(h, mean.modules["lm_head"], 1, 2.0)[0].double()
    a, b = state.params["lm_head.lora_A"], state.params["lm_head.lora_B"]
    p = state.params["phi"][1].sigmoid()
    torch.testing.assert_close(expected, (2.0 * b @ (p * (a @ h[0]))).double())
    assert ((drawn.mean(0) - expected).abs() < 5 * drawn.std(0) / math.sqrt(n)).all()
