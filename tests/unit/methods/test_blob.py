"""dalorra_core.methods.blob: its posterior, its divergence and when it acts, its noise."""

import math
from fractions import Fraction

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from dalorra_core.adapters.inject import TargetSpec
from dalorra_core.adapters.linear import low_rank_delta
from dalorra_core.adapters.state import AdapterState
from dalorra_core.config import OptimConfig
from dalorra_core.methods import METHODS
from dalorra_core.methods.blob import BlobConfig
from dalorra_core.methods.method import Draw
from dalorra_core.methods.mle import MleConfig
from tests.support.tiny_models import point_of

BLOB = METHODS["blob"]
SPECS = (TargetSpec("layers.0.q", 6, 4, 0), TargetSpec("lm_head", 6, 5, None))
HEAD = "lm_head"


def state_of(config: BlobConfig, *, seed: int = 0, spread: float = 1.0) -> AdapterState:
    params = BLOB.init(SPECS, 3, seed, config)
    generator = torch.Generator().manual_seed(seed)
    for name, value in params.items():
        if name.endswith("lora_B"):
            params[name] = torch.randn(value.shape, generator=generator)
        if name.endswith("sigma_root"):
            params[name] = spread * (0.3 + torch.rand(value.shape, generator=generator))
    return AdapterState(SPECS, 3, 2.0, params)


def activations(*shape: int, seed: int = 2) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_standard_deviations_start_in_the_published_range() -> None:
    params = BLOB.init((TargetSpec("wide", 4000, 4, 0),), 8, 5, BlobConfig())
    root = params["wide.sigma_root"].double()
    sigma = root.square()
    assert 0.00125 - 1e-9 <= sigma.min() < 0.00126
    assert 0.00249 < sigma.max() <= 0.0025 + 1e-9
    low, top = 0.05 / math.sqrt(2), 0.05
    error = (top - low) / math.sqrt(12 * root.numel())
    assert abs(root.mean() - (low + top) / 2) < 5 * error
    plain = METHODS["mle"].init((TargetSpec("wide", 4000, 4, 0),), 8, 5, MleConfig())
    assert all(torch.equal(params[name], value) for name, value in plain.items())


def test_the_divergence_is_the_sum_of_torchs_over_all_entries_of_a() -> None:
    config = BlobConfig(prior_sigma=0.2)
    state = state_of(config)
    expected = 0.0
    for spec in SPECS:
        mean = state.params[f"{spec.name}.lora_A"].double()
        sigma = state.params[f"{spec.name}.sigma_root"].double().square()
        prior = Normal(torch.zeros_like(mean), 0.2)
        expected += float(kl_divergence(Normal(mean, sigma), prior).sum())
    terms = BLOB.kl_terms(state, config, point_of(100), BLOB.mean_pack(state, config))
    assert float(terms["weight_kl"].value) == pytest.approx(expected, rel=1e-12)


def divergence_of(root: Tensor) -> Tensor:
    """Return the divergence with this G at lm_head, less that of the other module."""
    config, state = BlobConfig(), state_of(BlobConfig())
    state = AdapterState(SPECS, 3, 2.0, {**state.params, "lm_head.sigma_root": root})
    return BLOB.kl_terms(state, config, point_of(100), BLOB.mean_pack(state, config))[
        "weight_kl"
    ].value


def test_a_vanishing_root_is_pushed_away_from_zero_by_a_bounded_force() -> None:
    """The slope is -2 / G down to |G| = 1e-3 and falls linearly from there."""
    values = torch.tensor([2e-3, 1e-3, 5e-4, -1e-4, 1e-7, 0.0])
    root = values.repeat(3, 1).requires_grad_()
    divergence_of(root).backward()
    assert root.grad is not None
    expected = torch.tensor([-1000.0, -2000.0, -1000.0, 200.0, -0.2, 0.0])
    torch.testing.assert_close(root.grad, expected.repeat(3, 1), rtol=1e-4, atol=0.0)


def test_the_divergence_of_small_roots_is_smooth() -> None:
    root = torch.linspace(-3e-3, 3e-3, 18, dtype=torch.float64).view(3, 6).requires_grad_()
    assert torch.autograd.gradcheck(divergence_of, (root,), eps=1e-8, rtol=1e-3)
    edge = torch.full((3, 6), 1e-3, dtype=torch.float64)
    below, above = (float(divergence_of(edge * (1 + step))) for step in (-1e-9, 1e-9))
    assert below == pytest.approx(above, rel=1e-8)


@pytest.mark.parametrize(("rows", "cycle"), [(640, 316), (2558, 544), (9427, 909)])
def test_the_bursts_of_one_cycle_are_the_exact_fractions_and_sum_to_one(
    rows: int, cycle: int
) -> None:
    state, config = state_of(BlobConfig()), BlobConfig()
    pack = BLOB.mean_pack(state, config)

    def weight(step: int) -> float:
        point = point_of(rows, step=step, batch_size=4)
        return BLOB.kl_terms(state, config, point, pack)["weight_kl"].weight

    found = [weight(step) for step in range(cycle)]
    exact = [Fraction(2 ** (i + 1), 2 ** (cycle + 1) - 1) for i in range(cycle)]
    assert found == pytest.approx([float(e) for e in exact], rel=1e-12)
    assert math.fsum(found) == pytest.approx(1.0, abs=1e-12)
    assert found[-1] == pytest.approx(0.5)
    assert weight(cycle) == found[0]


@pytest.mark.parametrize(
    ("config", "weights"),
    [
        (BlobConfig(kl_schedule="per_example"), [1 / 12, 1 / 12, 1 / 12, 1 / 12]),
        (BlobConfig(kl_schedule="epoch"), [2 / 15, 4 / 15, 8 / 15, 2 / 15]),
        (BlobConfig(kl_schedule="epoch", kl_weight=3.0), [6 / 15, 12 / 15, 24 / 15, 6 / 15]),
    ],
)
def test_other_schedules(config: BlobConfig, weights: list[float]) -> None:
    state = state_of(config)
    found = [
        BLOB.kl_terms(
            state,
            config,
            point_of(12, step=step, batch_size=4),
            BLOB.mean_pack(state, config),
        )["weight_kl"].weight
        for step in range(4)
    ]
    assert found == pytest.approx(weights, rel=1e-12)


def test_flipout_in_training_is_the_formula() -> None:
    """o = s (B A h + B (s_t * (N (r_t * h)))), with the signs that the pack says it used."""
    config = BlobConfig()
    state = state_of(config)
    module = BLOB.train_pack(state, config, Draw(("run", 1), 2)).modules[HEAD]
    h = activations(2 * 3, 4, 6)
    found = low_rank_delta(h, module, 2, 2.0).view(2, 3, 4, 5)
    assert module.beside is not None
    (noise,) = module.beside.tensors()
    inner, outer = module.beside.signs(h.view(2, 3, 4, 6))  # pyright: ignore[reportAttributeAccessIssue]
    a, b = state.params["lm_head.lora_A"], state.params["lm_head.lora_B"]
    for m in range(2):
        for row in range(3):
            for t in range(4):
                x = h.view(2, 3, 4, 6)[m, row, t]
                noisy = outer[m, row, t] * (noise[m] @ (inner[m, row, t] * x))
                expected = 2.0 * (b @ (a @ x) + b @ noisy)
                torch.testing.assert_close(found[m, row, t], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["flipout", "weight_sample"])
def test_gradients_reach_g(kind: str) -> None:
    config = BlobConfig.model_validate({"train_noise": kind})
    params = {name: value.double() for name, value in state_of(config).params.items()}
    root = params["lm_head.sigma_root"].requires_grad_()
    h = activations(2, 4, 6).double()

    def output(value: Tensor) -> Tensor:
        state = AdapterState(SPECS, 3, 2.0, {**params, "lm_head.sigma_root": value})
        module = BLOB.train_pack(state, config, Draw(("run", 1), 1)).modules[HEAD]
        return low_rank_delta(h, module, 1, 2.0).square().sum()

    assert torch.autograd.gradcheck(output, (root,))


@pytest.mark.parametrize("kind", ["flipout", "weight_sample"])
def test_mean_and_covariance_over_samples(kind: str) -> None:
    """E is plain LoRA; the covariance is s^2 B diag(sum_i sigma_ji^2 h_i^2) B^T."""
    n, config = 6000, BlobConfig.model_validate({"test_noise": kind})
    state = state_of(config)
    h = activations(6)
    pack = BLOB.predict_pack(state, config, Draw(("mean", kind), n))
    drawn = low_rank_delta(h.expand(n, 6), pack.modules[HEAD], n, 2.0).double()  # (n, 5)
    a, b = state.params["lm_head.lora_A"].double(), state.params["lm_head.lora_B"].double()
    expected = 2.0 * b @ (a @ h.double())
    sigma = state.params["lm_head.sigma_root"].double().square()
    covariance = 4.0 * b @ torch.diag(sigma.square() @ h.double().square()) @ b.T
    off = drawn - expected
    assert (off.mean(0).abs() < 5 * (covariance.diag() / n).sqrt()).all()
    products = off.unsqueeze(2) * off.unsqueeze(1)  # (n, 5, 5)
    error = products.var(0).sqrt() / math.sqrt(n)
    assert ((products.mean(0) - covariance).abs() < 5 * error).all()


def test_tokens_of_one_weight_sample_are_one_function_and_those_of_flipout_are_not() -> None:
    h = activations(6).expand(1, 2, 6)
    for kind, alike in (("weight_sample", True), ("flipout", False)):
        config = BlobConfig.model_validate({"test_noise": kind})
        pack = BLOB.predict_pack(state_of(config), config, Draw(("one",), 1))
        out = low_rank_delta(h, pack.modules["layers.0.q"], 1, 2.0)
        assert torch.equal(out[:, 0], out[:, 1]) is alike


def test_the_mean_pass_is_plain_lora() -> None:
    state = state_of(BlobConfig())
    pack = BLOB.mean_pack(state, BlobConfig())
    (module,) = (pack.modules[HEAD],)
    assert (pack.num_samples, module.z, module.beside) == (1, None, None)
    assert torch.equal(module.lora_A[0], state.params["lm_head.lora_A"])
    still = state_of(BlobConfig(), spread=0.0)
    drawn = BLOB.predict_pack(still, BlobConfig(), Draw(("x",), 3)).modules[HEAD]
    assert torch.equal(drawn.lora_A, still.params["lm_head.lora_A"].expand(3, -1, -1))


def test_adamw_has_the_factors_and_sgd_a_and_g() -> None:
    optim = OptimConfig(lr=3e-4, weight_decay=0.1)
    config = BlobConfig(kl_lr=0.02)
    state = state_of(config)
    adamw, sgd = BLOB.param_groups(state, optim, config)
    assert (adamw.optimizer, adamw.lr, adamw.weight_decay) == ("adamw", 3e-4, 0.1)
    assert (sgd.optimizer, sgd.lr, sgd.weight_decay) == ("sgd", 0.02, 0.0)
    assert sorted(adamw.names) == sorted(n for n in state.params if "lora_" in n)
    assert sorted(sgd.names) == sorted(n for n in state.params if not n.endswith("lora_B"))
    assert BLOB.divergence_apart


def test_the_summary_speaks_of_standard_deviations() -> None:
    state = state_of(BlobConfig())
    summary = BLOB.summary(state, BlobConfig())
    sigma = state.params["lm_head.sigma_root"].double().square()
    assert summary["num_weights"] == 2 * 3 * 6
    assert summary["mean_sigma"]["lm_head"] == pytest.approx(float(sigma.mean()))
    assert summary["sigma_quantiles"]["1"] >= float(sigma.max())
