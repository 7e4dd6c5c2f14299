"""Mixtures of masks against the sum over every mask, and against DALorRA at K = 1."""

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from dalorra_core.adapters.inject import TargetSpec
from dalorra_core.adapters.pack import SamplePack
from dalorra_core.adapters.state import AdapterState
from dalorra_core.config import OptimConfig
from dalorra_core.methods import METHODS
from dalorra_core.methods.dalorra import DalorraConfig, relaxed_gates
from dalorra_core.methods.mask_mixture import (
    MaskMixtureConfig,
    component_information,
    log_prob,
)
from dalorra_core.methods.method import Draw
from dalorra_core.sampling.designs import iid_uniforms
from tests.support.reference import every_mask, mask_probability
from tests.support.tiny_models import point_of

MIXTURE, DALORRA = METHODS["mask_mixture"], METHODS["dalorra"]
PRIOR = 0.6
SPECS = (TargetSpec("model.layers.0.q", 5, 4, 0), TargetSpec("lm_head", 5, 3, None))
R, GATES = 3, 6
MASKS = every_mask(GATES)


def config_of(**changes: object) -> MaskMixtureConfig:
    return MaskMixtureConfig.model_validate({"prior_prob": PRIOR, "num_components": 3} | changes)


def state_of(config: MaskMixtureConfig, *, seed: int = 1, scale: float = 2.0) -> AdapterState:
    generator = torch.Generator().manual_seed(seed)
    params = MIXTURE.init(SPECS, R, 0, config)
    params["phi"] = scale * torch.randn(params["phi"].shape, generator=generator)
    params["component_logits"] = torch.randn(config.num_components, generator=generator)
    return AdapterState(SPECS, R, 2.0, params)


def gates_of(pack: SamplePack) -> Tensor:
    gates = [pack.modules[spec.name].z for spec in SPECS]
    return torch.stack([z for z in gates if z is not None], dim=1)  # (M, L, r)


def weights_of(state: AdapterState) -> list[float]:
    return state.params["component_logits"].double().softmax(0).tolist()


def components_of(state: AdapterState) -> list[list[float]]:
    """Return q_k(mask) of every component and mask."""
    keep = state.params["phi"].double().sigmoid().flatten(1).tolist()
    return [[mask_probability(mask, k) for mask in MASKS] for k in keep]


def mixture_of(state: AdapterState) -> list[float]:
    parts = list(zip(weights_of(state), components_of(state), strict=True))
    return [math.fsum(w * q[i] for w, q in parts) for i in range(len(MASKS))]


def divergence(q: list[float], p: list[float]) -> float:
    return math.fsum(a * math.log(a / b) for a, b in zip(q, p, strict=True))


def prior() -> list[float]:
    return [mask_probability(mask, [PRIOR] * GATES) for mask in MASKS]


def bound_of(state: AdapterState, config: MaskMixtureConfig) -> float:
    terms = MIXTURE.kl_terms(state, config, point_of(10), MIXTURE.mean_pack(state, config))
    return float(terms["mask_kl_bound"].value)


def information_of(state: AdapterState) -> float:
    mixed = mixture_of(state)
    parts = zip(weights_of(state), components_of(state), strict=True)
    return math.fsum(w * divergence(q, mixed) for w, q in parts)


# --- the posterior and its divergence -------------------------------------------------------


def test_the_log_probability_is_that_of_the_mixture() -> None:
    state = state_of(config_of())
    z = torch.tensor(MASKS).float().view(-1, 2, R)
    expected = torch.tensor(mixture_of(state)).double()
    torch.testing.assert_close(log_prob(state, z).double().exp(), expected, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("seed", range(4))
def test_the_bound_is_above_the_enumerated_kl_by_the_information(seed: int) -> None:
    config = config_of()
    state = state_of(config, seed=seed)
    exact = divergence(mixture_of(state), prior())
    bound = bound_of(state, config)
    assert bound > exact + 0.05
    assert bound == pytest.approx(exact + information_of(state), rel=1e-5)


def test_with_one_component_or_equal_ones_the_bound_is_the_kl() -> None:
    one = config_of(num_components=1)
    state = state_of(one)
    assert bound_of(state, one) == pytest.approx(divergence(mixture_of(state), prior()), rel=1e-5)
    three = config_of()
    equal = state_of(three)
    same = equal.params["phi"][:1].repeat(3, 1, 1)
    equal = AdapterState(SPECS, R, 2.0, {**equal.params, "phi": same})
    exact = divergence(mixture_of(equal), prior())
    assert bound_of(equal, three) == pytest.approx(exact, rel=1e-5)


def information_in_torch(phi: Tensor, logits: Tensor) -> Tensor:
    """The information by enumeration, with gradient, from plain probabilities."""
    z = torch.tensor(MASKS).double().view(-1, 1, 2, R)
    keep = phi.sigmoid()
    q = torch.where(z == 1, keep, 1 - keep).prod(-1).prod(-1)  # (2^G, K)
    weights = logits.softmax(0)
    return (weights * q * (q / (q @ weights).unsqueeze(-1)).log()).sum()


def test_the_information_and_its_gradient_are_estimated_without_bias() -> None:
    """A thousand estimates of eight samples each; value and gradients within five errors."""
    state = state_of(config_of(), scale=1.0)
    phi = state.params["phi"].double().requires_grad_()
    logits = state.params["component_logits"].double().requires_grad_()
    exact = information_in_torch(phi, logits)
    assert exact.item() == pytest.approx(information_of(state), rel=1e-6)
    expected = [g.flatten() for g in torch.autograd.grad(exact, (phi, logits))]
    found = []
    for i in range(1000):
        uniforms = iid_uniforms(("information", i), 8, 3 * 2, R).view(8, 3, 2, R)
        value = component_information(phi, logits, uniforms)
        gradients = torch.autograd.grad(value, (phi, logits))
        found.append(torch.cat([value.detach().view(1), *(g.flatten() for g in gradients)]))
    table = torch.stack(found)
    truth = torch.cat([exact.detach().view(1), *expected])
    error = table.std(0) / math.sqrt(len(table))
    assert ((table.mean(0) - truth).abs() < 5 * error).all()
    assert error[0] < 0.01


def test_diversity_takes_its_share_of_the_information_off_the_bound() -> None:
    """With a share of 1 what is left is the KL on average: 400 steps, five errors."""
    config = config_of(diversity=1.0, kl_weight=0.3, diversity_samples=4)
    state = state_of(config, scale=1.0)
    pack, n = MIXTURE.mean_pack(state, config), 400
    values = []
    for step in range(n):
        terms = MIXTURE.kl_terms(state, config, point_of(20, key=("train", 1, step)), pack)
        assert terms["mask_kl_bound"].weight == pytest.approx(0.3 / 20)
        values.append(terms["mask_kl_bound"].value)
    found = torch.stack(values)
    exact = divergence(mixture_of(state), prior())
    error = found.std().item() / math.sqrt(n)
    assert abs(found.mean().item() - exact) < 5 * error
    assert 5 * error < information_of(state) / 4
    half = config_of(diversity=0.5, diversity_samples=4)
    point, bound = point_of(20, key=("train", 1, 0)), bound_of(state, config_of())
    taken = bound - MIXTURE.kl_terms(state, half, point, pack)["mask_kl_bound"].value.item()
    assert taken == pytest.approx((bound - values[0].item()) / 2, rel=1e-4)


# --- DALorRA within it ----------------------------------------------------------------------


def test_one_component_is_dalorra_draw_for_draw() -> None:
    mixture = state_of(config_of(num_components=1))
    factors = {k: v for k, v in mixture.params.items() if "lora" in k}
    plain = AdapterState(SPECS, R, 2.0, factors | {"phi": mixture.params["phi"][0]})
    draw = Draw(("run", 5), 6)
    for changes in ({}, {"train_masks": "straight_through", "test_masks": "relaxed", "tau": 0.4}):
        ours = config_of(num_components=1, **changes)
        theirs = DalorraConfig.model_validate({"prior_prob": PRIOR} | changes)
        for pack, expected in (
            (MIXTURE.train_pack(mixture, ours, draw), DALORRA.train_pack(plain, theirs, draw)),
            (MIXTURE.predict_pack(mixture, ours, draw), DALORRA.predict_pack(plain, theirs, draw)),
            (MIXTURE.mean_pack(mixture, ours), DALORRA.mean_pack(plain, theirs)),
        ):
            assert torch.equal(gates_of(pack), gates_of(expected))
        found = MIXTURE.kl_terms(mixture, ours, point_of(10), pack)["mask_kl_bound"]
        kl = DALORRA.kl_terms(plain, theirs, point_of(10), expected)["mask_kl"]
        assert torch.equal(found.value, kl.value)
        assert found.weight == kl.weight
    started = MIXTURE.init(SPECS, R, 3, config_of(num_components=1))
    expected = DALORRA.init(SPECS, R, 3, DalorraConfig(prior_prob=PRIOR))
    assert torch.equal(started["phi"][0], expected["phi"])


def test_components_start_apart_around_the_prior() -> None:
    config = config_of(num_components=4, component_spread=0.5)
    specs = [TargetSpec(f"m{i}", 1, 1, i) for i in range(65)]
    params = MIXTURE.init(specs, 8, 3, config)
    off = params["phi"] - math.log(PRIOR / (1 - PRIOR))
    assert params["phi"].numel() + params["component_logits"].numel() == 520 * 4 + 4
    n = off.numel()
    assert abs(off.mean().item()) < 5 * 0.5 / math.sqrt(n)
    assert abs(off.std().item() - 0.5) < 5 * 0.5 / math.sqrt(2 * n)
    assert all((a - b).abs().max() > 0.5 for a, b in pairwise(params["phi"]))
    assert not torch.equal(params["phi"], MIXTURE.init(specs, 8, 4, config)["phi"])


# --- draws ----------------------------------------------------------------------------------


def test_a_training_sample_has_the_gates_of_one_component() -> None:
    config = config_of(tau=0.5)
    state = state_of(config)
    pack = MIXTURE.train_pack(state, config, Draw(("run", 1), 40))
    z = gates_of(pack)
    noise = iid_uniforms(("run", 1, "z"), 40, 2, R)
    each = torch.stack([relaxed_gates(phi, noise, 0.5) for phi in state.params["phi"]])  # (K,M,L,r)
    of = ((each - z).abs().amax((-2, -1)) < 1e-6).int()  # (K, M)
    assert (of.sum(0) == 1).all()
    assert (of.sum(1) > 0).all()


def test_components_of_training_have_their_weights() -> None:
    config = config_of()
    state = state_of(config)
    n = 6000
    far = torch.tensor([-30.0, 0.0, 30.0]).view(3, 1, 1).expand(3, 2, R)
    state = AdapterState(SPECS, R, 2.0, {**state.params, "phi": far})
    z = gates_of(MIXTURE.train_pack(state, config_of(tau=0.1), Draw(("w",), n))).mean((-2, -1))
    shares = [(z < 1e-3).double().mean(), (z > 1 - 1e-3).double().mean()]
    for share, k in zip(shares, (0, 2), strict=True):
        w = weights_of(state)[k]
        assert abs(share.item() - w) < 5 * math.sqrt(w * (1 - w) / n)


def test_the_gradient_of_the_weights_favours_the_component_that_lowers_the_loss() -> None:
    config = config_of()
    state = state_of(config)
    far = torch.tensor([-30.0, -30.0, 30.0]).view(3, 1, 1).expand(3, 2, R)
    logits = torch.zeros(3, requires_grad=True)
    params = {**state.params, "phi": far, "component_logits": logits}
    z = gates_of(MIXTURE.train_pack(AdapterState(SPECS, R, 2.0, params), config, Draw(("g",), 64)))
    z.sum().backward()
    assert logits.grad is not None
    assert logits.grad[2] > 0
    assert logits.grad[:2].max() < 0


def test_a_prediction_spreads_its_samples_over_the_components() -> None:
    """Equal weights and M = K m: exactly m each, and no draw depends on M."""
    config = config_of()
    state = state_of(config)
    far = torch.tensor([-30.0, 0.0, 30.0]).view(3, 1, 1).expand(3, 2, R)
    params = {**state.params, "phi": far, "component_logits": torch.zeros(3)}
    state = AdapterState(SPECS, R, 2.0, params)
    for seed in range(5):
        z = gates_of(MIXTURE.predict_pack(state, config, Draw(("s", seed), 12))).flatten(1)
        for start in range(0, 12, 3):
            three = z[start : start + 3].mean(1)
            assert (three == 0).sum() >= 1
            assert (three == 1).sum() >= 1
        few = gates_of(MIXTURE.predict_pack(state, config, Draw(("s", seed), 4))).flatten(1)
        assert torch.equal(z[:4], few)


def test_predicted_gates_have_the_mixtures_moments() -> None:
    """Spread components leave each sample distributed as the mixture: over 1,500 seeds of M = 2."""
    config = config_of()
    state = state_of(config)
    n = 1500
    drawn = torch.stack(
        [gates_of(MIXTURE.predict_pack(state, config, Draw(("moments", i), 2))) for i in range(n)]
    )  # (n, 2, L, r)
    q, z = torch.tensor(mixture_of(state)).double(), torch.tensor(MASKS).double()
    for m in range(2):
        flat = drawn[:, m].flatten(1).double()
        for i in range(GATES):
            for j in range(i + 1):
                exact = float((q * z[:, i] * z[:, j]).sum())
                found = float((flat[:, i] * flat[:, j]).mean())
                assert abs(found - exact) < 5 * math.sqrt(exact * (1 - exact) / n)
    mean = gates_of(MIXTURE.mean_pack(state, config))[0].flatten().double()
    torch.testing.assert_close(mean, (q[:, None] * z).sum(0), rtol=1e-5, atol=1e-6)


def test_its_own_parameters_have_their_own_rate_and_no_decay() -> None:
    config = config_of()
    state = state_of(config)
    groups = MIXTURE.param_groups(state, OptimConfig(lr=1e-3, weight_decay=0.1), config)
    assert sorted(name for group in groups for name in group.names) == sorted(state.params)
    assert groups[1].names == ("phi", "component_logits")
    assert (groups[1].lr, groups[1].weight_decay) == (config.mask_lr, 0.0)


def test_the_summary_speaks_of_the_mixture_and_its_components() -> None:
    state = state_of(config_of())
    found = MIXTURE.summary(state, config_of())
    assert found["component_weights"] == pytest.approx(weights_of(state))
    keep = state.params["phi"].double().sigmoid()
    assert found["expected_rank_of_components"] == pytest.approx(keep.sum((-2, -1)).tolist())
    mean = torch.einsum("k,klr->lr", torch.tensor(weights_of(state)).double(), keep)
    assert found["expected_rank"]["lm_head"] == pytest.approx(float(mean[1].sum()), rel=1e-5)
