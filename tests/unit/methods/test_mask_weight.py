"""dalorra_core.methods.mask_weight: between DALorRA and BLoB, and exact in between."""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Literal

import pytest
import torch
from torch import Tensor
from torch.distributions import Bernoulli, Normal, kl_divergence

from dalorra_core.adapters.inject import TargetSpec
from dalorra_core.adapters.linear import low_rank_delta
from dalorra_core.adapters.state import AdapterState
from dalorra_core.config import OptimConfig
from dalorra_core.methods import METHODS
from dalorra_core.methods.blob import BlobConfig
from dalorra_core.methods.dalorra import DalorraConfig
from dalorra_core.methods.mask_weight import MaskWeightConfig
from dalorra_core.methods.method import Draw
from dalorra_core.methods.mle import MleConfig
from dalorra_core.objectives.elbo import KlTerm
from tests.support.tiny_models import point_of

HYBRID, BLOB, DALORRA = METHODS["mask_weight"], METHODS["blob"], METHODS["dalorra"]
SPECS = (TargetSpec("layers.0.q", 6, 4, 0), TargetSpec("lm_head", 7, 5, None))
Per = Literal["entry", "rank"]


def state_of(config: MaskWeightConfig) -> AdapterState:
    params = HYBRID.init(SPECS, 3, 0, config)
    generator = torch.Generator().manual_seed(0)
    for name, value in params.items():
        drawn = torch.randn(value.shape, generator=generator)
        if name.endswith("log_sigma"):
            params[name] = -1 + 0.4 * drawn
        elif not name.endswith("lora_A"):
            params[name] = drawn
    return AdapterState(SPECS, 3, 2.0, params)


def sigma_of(state: AdapterState, i: int) -> Tensor:
    """(r, d_in) or (r, 1)."""
    params = state.params
    if "log_sigma" in params:
        return params["log_sigma"][i].exp().unsqueeze(-1)
    return params[f"{SPECS[i].name}.log_sigma"].exp()


def divergences(state: AdapterState, config: MaskWeightConfig, n: int = 50) -> Mapping[str, KlTerm]:
    return HYBRID.kl_terms(state, config, point_of(n), HYBRID.mean_pack(state, config))


@pytest.mark.parametrize("per", ["entry", "rank"])
def test_the_divergence_is_that_of_the_joint_spike_and_slab(per: Per) -> None:
    """E_q[log q(z, a) / p(z, a)], summed over both values of every gate."""
    config = MaskWeightConfig(sigma_per=per, prior_prob=0.3, prior_sigma=0.4, kl_weight=0.7)
    state = state_of(config)
    expected = 0.0
    for i, spec in enumerate(SPECS):
        mean = state.params[f"{spec.name}.lora_A"].double()
        q = Normal(mean, sigma_of(state, i).double().expand_as(mean))
        slab = kl_divergence(q, Normal(torch.zeros_like(mean), 0.4)).sum(-1)  # (r,)
        for j in range(3):
            keep = float(state.params["phi"][i, j].double().sigmoid())
            opened = math.log(keep / 0.3) + float(slab[j])
            closed = math.log((1 - keep) / 0.7)  # there the entries have their prior
            expected += keep * opened + (1 - keep) * closed
    terms = divergences(state, config)
    assert sum(float(t.value) for t in terms.values()) == pytest.approx(expected, rel=1e-6)
    assert [t.weight for t in terms.values()] == pytest.approx([0.7 / 50] * 2)


def test_the_weights_divergence_has_a_factor_of_its_own() -> None:
    config = MaskWeightConfig(kl_weight=0.5, weight_kl_weight=0.1)
    terms = divergences(state_of(config), config)
    assert terms["mask_kl"].weight == pytest.approx(0.5 / 50)
    assert terms["weight_kl"].weight == pytest.approx(0.05 / 50)


def test_with_open_gates_the_divergence_is_blobs() -> None:
    config = MaskWeightConfig(prior_sigma=0.2)
    state = state_of(config)
    opened = replace(state, params={**state.params, "phi": torch.full((2, 3), 60.0)})
    roots = {
        f"{s.name}.sigma_root": (0.5 * state.params[f"{s.name}.log_sigma"].double()).exp()
        for s in SPECS
    }
    blob, blob_config = (
        replace(state, params={**state.params, **roots}),
        BlobConfig(prior_sigma=0.2),
    )
    expected = BLOB.kl_terms(blob, blob_config, point_of(50), BLOB.mean_pack(blob, blob_config))[
        "weight_kl"
    ]
    found = divergences(opened, config)["weight_kl"].value
    torch.testing.assert_close(found, expected.value, rtol=1e-10, atol=0)
    half = replace(state, params={**state.params, "phi": torch.zeros(2, 3)})
    torch.testing.assert_close(divergences(half, config)["weight_kl"].value, found / 2)


def test_the_gates_divergence_is_dalorras() -> None:
    config = MaskWeightConfig(prior_prob=0.3)
    state = state_of(config)
    expected = kl_divergence(Bernoulli(logits=state.params["phi"]), Bernoulli(torch.tensor(0.3)))
    torch.testing.assert_close(divergences(state, config)["mask_kl"].value, expected.sum())


@pytest.mark.parametrize("per", ["entry", "rank"])
@pytest.mark.parametrize("kind", ["flipout", "weight_sample"])
def test_without_spread_it_is_dalorra(per: Per, kind: Literal["flipout", "weight_sample"]) -> None:
    """The same gates from the same draw, and the same functions, in training and prediction."""
    config = MaskWeightConfig(sigma_per=per, train_noise=kind, test_noise=kind, tau=0.4)
    state = state_of(config)
    still = {
        name: torch.full_like(value, -math.inf) if name.endswith("log_sigma") else value
        for name, value in state.params.items()
    }
    h = torch.randn(4 * 2, 3, 7, generator=torch.Generator().manual_seed(1))
    for which in ("train_pack", "predict_pack"):
        draw = Draw(("same", which), 4)
        ours = getattr(HYBRID, which)(replace(state, params=still), config, draw)
        theirs = getattr(DALORRA, which)(state, DalorraConfig(tau=0.4), draw)
        found = low_rank_delta(h, ours.modules["lm_head"], 4, 2.0)
        expected = low_rank_delta(h, theirs.modules["lm_head"], 4, 2.0)
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("per", ["entry", "rank"])
@pytest.mark.parametrize("kind", ["flipout", "weight_sample"])
def test_mean_and_variance_over_samples(
    per: Per, kind: Literal["flipout", "weight_sample"]
) -> None:
    """Per rank u = z (a h + n): mean p a h, second moment p ((a h)^2 + sum sigma^2 h^2)."""
    n, config = 2500, MaskWeightConfig(sigma_per=per, test_noise=kind)
    state = state_of(config)
    identity = {**state.params, "lm_head.lora_B": torch.eye(5, 3)}
    state = replace(state, params=identity)
    h = torch.randn(7, generator=torch.Generator().manual_seed(1))
    pack = HYBRID.predict_pack(state, config, Draw(("mean", per, kind), n))
    u = low_rank_delta(h.expand(n, 7), pack.modules["lm_head"], n, 1.0)[:, :3].double()
    p = state.params["phi"][1].double().sigmoid()
    signal = state.params["lm_head.lora_A"].double() @ h.double()
    variance = (sigma_of(state, 1).double().square() * h.double().square()).sum(-1)
    for power, expected in ((1, p * signal), (2, p * (signal.square() + variance))):
        values = u**power
        error = values.std(0) / math.sqrt(n)
        assert ((values.mean(0) - expected).abs() < 5 * error).all()
    mean = low_rank_delta(h[None], HYBRID.mean_pack(state, config).modules["lm_head"], 1, 1.0)
    torch.testing.assert_close(mean[0, :3].double(), p * signal)


def test_a_sample_is_one_function_in_training_too() -> None:
    """Unlike BLoB's default, see docs/method.md 9.4."""
    config = MaskWeightConfig()
    for pack in (HYBRID.train_pack, HYBRID.predict_pack):
        modules = pack(state_of(config), config, Draw(("run", 1), 2)).modules.values()
        assert all(module.beside is None and len(module.lora_A) == 2 for module in modules)


@pytest.mark.parametrize("per", ["entry", "rank"])
def test_it_starts_at_the_prior_gates_and_the_asked_for_spread(per: Per) -> None:
    config = MaskWeightConfig(sigma_per=per, prior_prob=0.7, initial_sigma=0.01)
    params = HYBRID.init(SPECS, 3, 5, config)
    state = AdapterState(SPECS, 3, 2.0, params)
    torch.testing.assert_close(params["phi"].sigmoid(), torch.full((2, 3), 0.7))
    for i in range(2):
        assert sigma_of(state, i).flatten().tolist() == pytest.approx(
            [0.01] * (3 if per == "rank" else 3 * SPECS[i].d_in)
        )
    plain = METHODS["mle"].init(SPECS, 3, 5, MleConfig())
    assert all(torch.equal(params[name], value) for name, value in plain.items())
    shapes = HYBRID.shapes(SPECS, 3, config)
    assert {name: tuple(value.shape) for name, value in params.items()} == dict(shapes)


@pytest.mark.parametrize("per", ["entry", "rank"])
def test_spreads_and_gates_have_rates_of_their_own_and_no_decay(per: Per) -> None:
    optim = OptimConfig(lr=3e-4, weight_decay=0.1)
    config = MaskWeightConfig(sigma_per=per, mask_lr=0.02, sigma_lr=0.003)
    state = state_of(config)
    named = {n: g for g in HYBRID.param_groups(state, optim, config) for n in g.names}
    assert sorted(named) == sorted(state.params)
    assert {g.optimizer for g in named.values()} == {"adamw"}
    for name, group in named.items():
        spread = name.endswith("log_sigma")
        expected = (0.003, 0.0) if spread else (0.02, 0.0) if name == "phi" else (3e-4, 0.1)
        assert (group.lr, group.weight_decay) == expected
    assert not HYBRID.divergence_apart


def test_the_summary_has_gates_and_spreads() -> None:
    config = MaskWeightConfig()
    state = state_of(config)
    summary = HYBRID.summary(state, config)
    assert summary["num_gates"] == 6
    assert summary["mean_sigma"]["lm_head"] == pytest.approx(float(sigma_of(state, 1).mean()))
