"""Bayesian-LoRA against dense Gaussians: conditional, divergence, limits; then its bookkeeping."""

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from numpy.typing import NDArray
from torch import Tensor
from torch.distributions import MultivariateNormal, Normal, kl_divergence

from dalorra_core.adapters.inject import TargetSpec, count_parameters
from dalorra_core.adapters.pack import SamplePack
from dalorra_core.adapters.state import AdapterState
from dalorra_core.config import OptimConfig
from dalorra_core.errors import ConfigError
from dalorra_core.methods import METHODS
from dalorra_core.methods.bayesian_lora import (
    BayesianLoraConfig,
    conditional_kl,
    factor_noise,
    factor_samples,
    whitened,
)
from dalorra_core.methods.method import Draw
from dalorra_core.methods.row_flow import flow_size, init_flow, row_flow
from tests.support.tiny_models import point_of

METHOD = METHODS["bayesian_lora"]
Array = NDArray[np.float64]
JITTER = 1e-5  # relative to the mean diagonal of Z Z^T, part of D^2 by definition
SPECS = (
    TargetSpec("model.layers.0.self_attn.q_proj", 7, 6, 0),
    TargetSpec("model.layers.0.self_attn.v_proj", 7, 3, 0),
    TargetSpec("lm_head", 7, 4, None),
)
R, RANK = 5, 3


def config_of(**changes: Any) -> BayesianLoraConfig:
    return BayesianLoraConfig.model_validate({"num_inducing": R} | changes)


def state_of(config: BayesianLoraConfig, *, seed: int = 0) -> AdapterState:
    """Return a state whose Gaussians are wide enough that every part shows."""
    params = METHOD.init(SPECS, RANK, seed, config)
    generator = torch.Generator().manual_seed(seed)
    for name in ("inducing_spread", "lambda_logit", "diagonals"):
        params[name] = torch.randn(params[name].shape, generator=generator)
    for name in params:
        if name.endswith("lora_B"):
            params[name] = torch.randn(params[name].shape, generator=generator)
    return AdapterState(SPECS, RANK, 2.0, params)


# --- the conditional Gaussian ---------------------------------------------------------------


class Dense:
    """A 3 x 4 factor and its R x R inducing weights as one Gaussian vector, in NumPy."""

    def __init__(self, inducing: int) -> None:
        generator = torch.Generator().manual_seed(inducing)
        self.narrow_z = torch.randn(inducing, 3, generator=generator, dtype=torch.float64)
        self.wide_z = torch.randn(inducing, 4, generator=generator, dtype=torch.float64)
        self.narrow_d = 0.3 + torch.rand(inducing, generator=generator, dtype=torch.float64)
        self.wide_d = 0.3 + torch.rand(inducing, generator=generator, dtype=torch.float64)
        self.v = torch.randn(inducing, inducing, generator=generator, dtype=torch.float64)
        narrow, wide = self.narrow_z.numpy(), self.wide_z.numpy()
        k_narrow = self.covariance(narrow, self.narrow_d.numpy())
        k_wide = self.covariance(wide, self.wide_d.numpy())
        cross = np.kron(narrow.T, wide.T)  # Cov(vec W, vec U), rows first
        joint = np.linalg.solve(np.kron(k_narrow, k_wide), cross.T).T
        u = np.linalg.cholesky(k_narrow) @ self.v.numpy() @ np.linalg.cholesky(k_wide).T
        self.mean: Array = joint @ u.reshape(-1)
        self.conditional: Array = np.eye(12) - joint @ cross.T

    @staticmethod
    def covariance(z: Array, d: Array) -> Array:
        gram = z @ z.T
        return gram + np.diag(d**2 + JITTER * np.diag(gram).mean())

    def samples(self, scale: float, n: int, v: Tensor | None = None) -> Tensor:
        noise = factor_noise(("dense", len(self.v)), n, 3, 4, len(self.v))
        found = factor_samples(
            whitened(self.narrow_z, self.narrow_d),
            whitened(self.wide_z, self.wide_d),
            self.v.unsqueeze(0) if v is None else v,
            torch.tensor(scale, dtype=torch.float64),
            noise,
        )
        return found.flatten(1)  # (n, 12)


def assert_moments(samples: Tensor, mean: Array, covariance: Array) -> None:
    """Means and covariances within five standard errors of a Gaussian's."""
    n = len(samples)
    expected, wide = torch.from_numpy(mean), torch.from_numpy(covariance)
    variances = wide.diagonal()
    assert ((samples.mean(0) - expected).abs() < 5 * (variances / n).sqrt()).all()
    found = (samples - expected).T @ (samples - expected) / n
    error = ((torch.outer(variances, variances) + wide.square()) / n).sqrt()
    assert ((found - wide).abs() < 5 * error).all()


@pytest.mark.parametrize("inducing", [2, 3, 9])
@pytest.mark.parametrize("scale", [0.4, 1.0])
def test_matherons_rule_has_the_conditional_mean_and_covariance(
    inducing: int, scale: float
) -> None:
    dense = Dense(inducing)
    samples = dense.samples(scale, 5000)
    assert_moments(samples, dense.mean, scale**2 * dense.conditional)
    off = dense.conditional - np.diag(np.diag(dense.conditional))
    assert np.abs(off).max() > 0.02  # weights do depend on each other


def test_with_lambda_one_and_the_priors_inducing_weights_the_factor_has_its_prior() -> None:
    dense, n = Dense(9), 5000
    v = torch.randn(n, 9, 9, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    assert_moments(dense.samples(1.0, n, v), np.zeros(12), np.eye(12))


def test_the_mean_is_what_no_noise_gives() -> None:
    dense = Dense(9)
    found = factor_samples(
        whitened(dense.narrow_z, dense.narrow_d),
        whitened(dense.wide_z, dense.wide_d),
        dense.v.unsqueeze(0),
        torch.tensor(0.5, dtype=torch.float64),
        None,
    )
    np.testing.assert_allclose(found.flatten().numpy(), dense.mean, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("scale", [1e-3, 0.4, 1.0])
def test_the_conditional_divergence_is_that_of_the_dense_gaussians(scale: float) -> None:
    dense = Dense(3)
    mean, covariance = torch.from_numpy(dense.mean), torch.from_numpy(dense.conditional)
    exact = kl_divergence(
        MultivariateNormal(mean, scale**2 * covariance), MultivariateNormal(mean, covariance)
    )
    found = conditional_kl(torch.tensor(scale, dtype=torch.float64), 12)
    assert found.item() == pytest.approx(exact.item(), rel=1e-6, abs=1e-9)


def test_more_inducing_rows_than_ranks_and_no_diagonal_leave_it_finite() -> None:
    """R = 9 > r = 8: Z Z^T has rank 8, and a trained D may vanish. The jitter holds."""
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(9, 8, generator=generator).requires_grad_()
    d = torch.zeros(9, requires_grad=True)
    side = whitened(z, d)
    assert side.basis.dtype == torch.float64
    identity = side.basis @ side.basis.T + side.rest @ side.rest.T
    torch.testing.assert_close(identity, torch.eye(9).double(), rtol=0, atol=1e-9)
    side.basis.square().sum().backward()
    assert z.grad is not None
    assert z.grad.isfinite().all()
    small = torch.randn(3, 2, generator=generator, dtype=torch.float64, requires_grad=True)
    spread = torch.rand(3, generator=generator, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: whitened(a, b).basis, (small, spread))


# --- the divergence of the inducing weights, and its flow -------------------------------------


def test_the_divergence_of_the_inducing_weights_is_torchs() -> None:
    config = config_of()
    state = state_of(config)
    terms = METHOD.kl_terms(state, config, point_of(50), METHOD.mean_pack(state, config))
    spread = 0.1 * state.params["inducing_spread"].double().sigmoid()
    normal = Normal(state.params["inducing_mean"].double(), spread)
    exact = kl_divergence(normal, Normal(torch.zeros(()).double(), torch.ones(()).double())).sum()
    torch.testing.assert_close(terms["inducing_kl"].value, exact, rtol=1e-9, atol=0)
    lambdas = 0.03 * state.params["lambda_logit"].double().sigmoid()
    sizes = torch.tensor([21, 18, 21, 9, 21, 12])  # r d_in and r d_out of every module
    expected = (sizes * (lambdas**2 / 2 - lambdas.log() - 0.5)).sum()
    torch.testing.assert_close(terms["conditional_kl"].value, expected, rtol=1e-9, atol=0)
    assert {term.weight for term in terms.values()} == {1 / 50}


def test_the_published_weight_of_the_divergence() -> None:
    config = config_of(kl_weight=0.1, kl_scale="per_batch", kl_start_epoch=2)
    state = state_of(config)
    for step, weight in ((0, 0.0), (15, 0.0), (16, 0.1 / 8), (40, 0.1 / 8)):
        point = point_of(48, step=step, batch_size=6)
        terms = METHOD.kl_terms(state, config, point, METHOD.mean_pack(state, config))
        assert all(term.weight == pytest.approx(weight) for term in terms.values())


def test_a_flow_starts_as_nothing_and_has_the_published_size() -> None:
    x = torch.randn(4, 9, generator=torch.Generator().manual_seed(0))
    params = init_flow(("a",), 9)
    assert len(params) == flow_size(9) == 1554
    moved, log_det = row_flow(x, params)
    assert torch.equal(moved, x)
    assert torch.equal(log_det, torch.zeros(4))


@pytest.mark.parametrize("features", [1, 2, 9])
def test_a_flow_is_autoregressive_with_the_determinant_it_says(features: int) -> None:
    generator = torch.Generator().manual_seed(1)
    size = flow_size(features)
    params = torch.randn(size, generator=generator, dtype=torch.float64)
    x = torch.randn(features, generator=generator, dtype=torch.float64)
    jacobian: Any = torch.autograd.functional.jacobian(lambda v: row_flow(v, params)[0], x)
    assert torch.equal(jacobian.triu(1), torch.zeros_like(jacobian))
    _, log_det = row_flow(x, params)
    torch.testing.assert_close(torch.linalg.slogdet(jacobian).logabsdet, log_det)
    if features == 9:
        assert (jacobian.tril(-1) != 0).any(0)[:-1].all()  # all but the last are looked at


def test_the_flows_divergence_is_unbiased() -> None:
    """At a flow that changes nothing the estimates average to the closed form."""
    plain, flow = config_of(max_sd=1.0), config_of(max_sd=1.0, flow=True, num_train_samples=8)
    state = state_of(flow)
    n = 200
    found = []
    pack = METHOD.mean_pack(state, flow)
    for step in range(n):
        point = point_of(50, key=("train", 1, step))
        found.append(METHOD.kl_terms(state, flow, point, pack)["inducing_kl"].value)
    exact = METHOD.kl_terms(state, plain, point_of(50), pack)["inducing_kl"].value
    values = torch.stack(found)
    assert abs(values.mean() - exact) < 5 * values.std() / math.sqrt(n)
    assert values.std() > 0


def test_the_flows_divergence_is_that_of_a_scaled_gaussian() -> None:
    """With a constant scale exp(a) and shift b the posterior is Gaussian again."""
    config = config_of(max_sd=1.0, flow=True, num_train_samples=64)
    state = state_of(config)
    params = state.params["flow"].clone()
    biases = flow_size(R) - 2 * R * 17 + torch.arange(2 * R) * 17  # of the last layer
    shift, raw = torch.linspace(-1, 1, R), torch.linspace(0.5, -0.5, R)
    params[:, biases] = torch.cat([shift, raw])
    state = AdapterState(SPECS, RANK, 2.0, {**state.params, "flow": params})
    mean, scale = state.params["inducing_mean"].double(), raw.tanh().exp().double()
    spread = state.params["inducing_spread"].double().sigmoid()
    exact = kl_divergence(
        Normal(mean * scale + shift, spread * scale),
        Normal(torch.zeros(()).double(), torch.ones(()).double()),
    ).sum()
    n = 50
    values = torch.stack(
        [
            METHOD.kl_terms(
                state,
                config,
                point_of(50, key=("train", 1, step)),
                METHOD.mean_pack(state, config),
            )["inducing_kl"].value
            for step in range(n)
        ]
    )
    assert abs(values.mean() - exact) < 5 * values.std() / math.sqrt(n)
    assert values.std() / math.sqrt(n) < 0.02 * exact


# --- packs ------------------------------------------------------------------------------------


def factors_of(pack: SamplePack) -> Tensor:
    """Return everything a sample consists of, (M, weights)."""
    parts = []
    for spec in SPECS:
        module = pack.modules[spec.name]
        parts += [module.lora_A.flatten(1), module.lora_B.flatten(1)]
    return torch.cat([p.expand(pack.num_samples, -1) for p in parts], 1)


@pytest.mark.parametrize("flow", [False, True])
def test_draws_are_named_and_more_begin_with_fewer(flow: bool) -> None:
    config = config_of(flow=flow)
    state = state_of(config)
    many = factors_of(METHOD.predict_pack(state, config, Draw(("a",), 5)))
    assert torch.equal(factors_of(METHOD.predict_pack(state, config, Draw(("a",), 2))), many[:2])
    assert torch.equal(factors_of(METHOD.train_pack(state, config, Draw(("a",), 5))), many)
    other = factors_of(METHOD.predict_pack(state, config, Draw(("b",), 5)))
    assert (other != many).all()
    assert (many[0] != many[1]).all()


def test_the_mean_pack_is_the_mean_of_the_samples() -> None:
    """Each weight is linear in V and noise, so this is exact; 1,000 draws, five errors."""
    config = config_of(max_lambda=1.0, max_sd=1.0, prior_sd=2.0)
    state = state_of(config)
    n = 1000
    drawn = factors_of(METHOD.predict_pack(state, config, Draw(("mean",), n))).double()
    mean = factors_of(METHOD.mean_pack(state, config))[0].double()
    assert ((drawn.mean(0) - mean).abs() < 5 * drawn.std(0) / math.sqrt(n)).all()


def test_the_posterior_at_the_prior_has_the_priors_scale() -> None:
    """V standard normal and lambda 1: weights have standard deviation prior_sd / sqrt(inputs)."""
    config = config_of(max_lambda=1.0, max_sd=1.0, prior_sd=0.6)
    state = state_of(config)
    at_prior = {
        "inducing_mean": torch.zeros(6, R, R),
        "inducing_spread": torch.full((6, R, R), 40.0),
        "lambda_logit": torch.full((6,), 40.0),
    }
    state = AdapterState(SPECS, RANK, 2.0, {**state.params, **at_prior})
    n = 1500
    pack = METHOD.predict_pack(state, config, Draw(("prior",), n))
    for spec in SPECS:
        module = pack.modules[spec.name]
        for factor, inputs in ((module.lora_A, spec.d_in), (module.lora_B, RANK)):
            variance = factor.double().var(0)
            expected = 0.6**2 / inputs
            assert ((variance - expected).abs() < 5 * expected * math.sqrt(2 / n)).all()
    terms = METHOD.kl_terms(state, config, point_of(10), pack)
    assert all(abs(term.value.item()) < 1e-9 for term in terms.values())


def test_modules_that_are_not_named_keep_plain_lora() -> None:
    config = config_of(bayesian_modules=("q_proj", "lm_head"))
    state = state_of(config)
    name = SPECS[1].name
    assert f"{name}.lora_A" in state.params
    assert f"{SPECS[0].name}.lora_A" not in state.params
    pack = METHOD.predict_pack(state, config, Draw(("a",), 3))
    plain = pack.modules[name]
    assert torch.equal(plain.lora_A[0], state.params[f"{name}.lora_A"])
    assert torch.equal(plain.lora_B[0], state.params[f"{name}.lora_B"])
    assert pack.modules["lm_head"].lora_A.shape == (3, RANK, 7)
    assert pack.modules["lm_head"].lora_B.shape == (3, 4, RANK)
    groups = METHOD.param_groups(state, OptimConfig(lr=1e-3, weight_decay=0.1), config)
    assert sorted(groups[0].names) == [f"{name}.lora_A", f"{name}.lora_B"]
    assert (groups[0].lr, groups[0].weight_decay) == (1e-3, 0.1)
    assert (groups[1].lr, groups[1].weight_decay) == (7.4e-4, 0.0)
    assert sorted(n for g in groups for n in g.names) == sorted(state.params)
    with pytest.raises(ConfigError, match="k_proj, and none of them is an adapted module"):
        METHOD.init(SPECS, RANK, 0, config_of(bayesian_modules=("k_proj",)))
    with pytest.raises(ConfigError, match="k_proj, and none of them is an adapted module"):
        METHOD.shapes(SPECS, RANK, config_of(bayesian_modules=("k_proj",)))
    (only,) = METHOD.param_groups(state_of(config_of()), OptimConfig(), config_of())
    assert sorted(only.names) == sorted(state_of(config_of()).params)


@pytest.mark.parametrize("changes", [{}, {"bayesian_modules": ("v_proj",)}, {"flow": True}])
def test_the_shapes_are_those_of_the_initial_tensors(changes: dict[str, Any]) -> None:
    config = config_of(**changes)
    made = {name: tuple(t.shape) for name, t in METHOD.init(SPECS, RANK, 0, config).items()}
    assert METHOD.shapes(SPECS, RANK, config) == made


def test_seeds_and_modules_start_apart() -> None:
    first, second = (METHOD.init(SPECS, RANK, seed, config_of()) for seed in (1, 2))
    q, v = (f"{spec.name}.A_wide" for spec in SPECS[:2])
    assert not torch.equal(first[q], first[v])  # of equal shape
    assert not torch.equal(first[q], second[q])
    assert torch.equal(first[q], METHOD.init(SPECS, RANK, 1, config_of())[q])


def llama_8b() -> list[TargetSpec]:
    specs = []
    for i in range(32):
        place = f"model.layers.{i}.self_attn"
        specs.append(TargetSpec(f"{place}.q_proj", 4096, 4096, i))
        specs.append(TargetSpec(f"{place}.v_proj", 4096, 1024, i))
    return [*specs, TargetSpec("lm_head", 4096, 128256, None)]


def parameters(config: BayesianLoraConfig, specs: list[TargetSpec]) -> int:
    return sum(math.prod(shape) for shape in METHOD.shapes(specs, 8, config).values())


def test_the_parameter_counts_against_the_published_ones() -> None:
    """The published 5,262,274 has a flow and 18 numbers more in each of its 130 factors."""
    one = [TargetSpec("m", 4096, 1024, 0)]
    plain, flow = BayesianLoraConfig(), BayesianLoraConfig(flow=True)
    assert parameters(plain, one) == 2 * (162 + 1 + 18) + 9 * (4096 + 8 + 1024 + 8)
    assert parameters(flow, one) - parameters(plain, one) == 2 * 1554
    specs = llama_8b()
    assert count_parameters(specs, 8) == 4_466_688
    assert parameters(flow, specs) + 130 * 18 == 5_262_274 == 4_466_688 + 795_586
    some = BayesianLoraConfig(flow=True, bayesian_modules=("q_proj", "lm_head"))
    assert parameters(some, specs) + 66 * 18 == 4_466_688 + 514_946


# --- the loss on the data ---------------------------------------------------------------------


def test_label_smoothing_is_torchs() -> None:
    logits = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, 3, 1, 1, 2])
    found = METHOD.data_loss(logits, labels, None, config_of(label_smoothing=0.05))
    expected = F.cross_entropy(logits.flatten(0, 1), labels.repeat(3), label_smoothing=0.05)
    torch.testing.assert_close(found, expected)


def test_smoothing_and_entropy_speak_of_a_rows_own_labels() -> None:
    logits = torch.randn(2, 2, 4, generator=torch.Generator().manual_seed(1)).requires_grad_()
    labels = torch.tensor([0, 2])
    allowed = torch.tensor([[True, True, False, False], [True, True, True, True]])
    config = config_of(label_smoothing=0.1, entropy_bonus=0.05)
    found = METHOD.data_loss(logits, labels, allowed, config)
    total = 0.0
    for s in range(2):
        for b, own in enumerate(([0, 1], [0, 1, 2, 3])):
            weights = [math.exp(float(logits[s, b, c].detach())) for c in own]
            probs = [w / sum(weights) for w in weights]
            right = -math.log(probs[int(labels[b])])
            uniform = -math.fsum(map(math.log, probs)) / len(own)
            entropy = -math.fsum(p * math.log(p) for p in probs)
            total += 0.9 * right + 0.1 * uniform - 0.05 * entropy
    assert found.item() == pytest.approx(total / 4, rel=1e-5)
    found.backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()
    assert (logits.grad[:, 0, 2:] == 0).all()


def test_limits_of_the_settings() -> None:
    with pytest.raises(ValueError, match="init_lambda must be below max_lambda"):
        config_of(init_lambda=0.05)
    with pytest.raises(ValueError, match="init_sd must be below max_sd"):
        config_of(init_sd=0.2)


def test_the_start_is_the_published_one() -> None:
    config = BayesianLoraConfig()
    specs = llama_8b()[:1]
    state = AdapterState(tuple(specs), 8, 1.0, METHOD.init(specs, 8, 0, config))
    found = METHOD.summary(state, config)
    name = specs[0].name
    assert found["num_generated_factors"] == 2
    assert found["lambda"] == pytest.approx({f"{name}.lora_A": 1e-3, f"{name}.lora_B": 1e-3})
    assert found["mean_inducing_sd"] == pytest.approx(
        {f"{name}.lora_A": 1e-3, f"{name}.lora_B": 1e-3}
    )
    torch.testing.assert_close(
        F.softplus(state.params["diagonals"]), torch.full((2, 2, 9), 1e-3), rtol=1e-3, atol=0
    )
    z = state.params[f"{name}.A_wide"]
    assert abs(z.std().item() - 1 / 3) < 5 / 3 / math.sqrt(2 * z.numel())
