"""dalorra_core.methods.scalabl: Gaussian singular values."""

import math
from dataclasses import replace

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from dalorra_core.adapters.inject import TargetSpec
from dalorra_core.adapters.linear import low_rank_delta
from dalorra_core.adapters.state import AdapterState
from dalorra_core.config import OptimConfig
from dalorra_core.errors import ConfigError
from dalorra_core.methods import METHODS
from dalorra_core.methods.method import Draw
from dalorra_core.methods.mle import MleConfig
from dalorra_core.methods.scalabl import ScalablConfig
from tests.support.tiny_models import point_of

SCALABL = METHODS["scalabl"]
SPECS = (TargetSpec("layers.0.q", 6, 4, 0), TargetSpec("lm_head", 7, 5, None))


def state_of(config: ScalablConfig) -> AdapterState:
    params = SCALABL.init(SPECS, 3, 0, config)
    generator = torch.Generator().manual_seed(0)
    for name, value in params.items():
        if name.endswith("lora_B"):
            params[name] = torch.randn(value.shape, generator=generator)
        if name == "log_sigma":
            params[name] = -1 + 0.5 * torch.randn(value.shape, generator=generator)
    return AdapterState(SPECS, 3, 2.0, params)


def test_it_starts_from_the_singular_values_of_a_default_factor() -> None:
    """V^T diag(z^2) V is A^T A: of A = U diag(z) V, U alone is left out."""
    params = SCALABL.init(SPECS, 3, 4, ScalablConfig())
    plain = METHODS["mle"].init(SPECS, 3, 4, MleConfig())
    for i, spec in enumerate(SPECS):
        v, scale = params[f"{spec.name}.lora_A"].double(), params["log_scale"][i].double().exp()
        torch.testing.assert_close(v @ v.T, torch.eye(3, dtype=torch.float64), rtol=0, atol=1e-6)
        a = plain[f"{spec.name}.lora_A"].double()
        ours = scale.unsqueeze(1) * v
        torch.testing.assert_close(ours.T @ ours, a.T @ a, rtol=1e-5, atol=1e-6)
        assert params[f"{spec.name}.lora_B"].abs().max() == 0
    sigma = params["log_sigma"].double().exp()
    assert ((sigma >= 0.05 / math.sqrt(2) - 1e-6) & (sigma <= 0.05 + 1e-6)).all()
    assert sigma.unique().numel() == 6


def test_a_rank_above_the_width_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"layers\.0\.q has 6, got 7"):
        SCALABL.init(SPECS, 7, 0, ScalablConfig())


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_the_divergence_is_torchs(direction: str) -> None:
    config = ScalablConfig.model_validate({"kl_direction": direction, "prior_sigma": 0.7})
    state = state_of(config)
    scale = state.params["log_scale"].double().exp()
    q = Normal(scale, state.params["log_sigma"].double().exp())
    p = Normal(torch.zeros_like(scale), 0.7)
    expected = kl_divergence(q, p) if direction == "forward" else kl_divergence(p, q)
    point = point_of(640, step=315, batch_size=4)
    (term,) = SCALABL.kl_terms(state, config, point, SCALABL.mean_pack(state, config)).values()
    assert float(term.value) == pytest.approx(float(expected.sum()), rel=1e-10)
    assert term.weight == pytest.approx(0.5)  # the last step of a cycle of 316


def test_samples_are_normal_around_the_mean_pack() -> None:
    n, config = 6000, ScalablConfig()
    state = state_of(config)
    pack = SCALABL.predict_pack(state, config, Draw(("n",), n))
    mean, sigma = state.params["log_scale"].exp(), state.params["log_sigma"].exp()
    for i, spec in enumerate(SPECS):
        z = pack.modules[spec.name].z
        assert z is not None
        off = ((z - mean[i]) / sigma[i]).double()
        assert (off.mean(0).abs() < 5 / math.sqrt(n)).all()
        assert ((off.square().mean(0) - 1).abs() < 5 * math.sqrt(2 / n)).all()
        assert (torch.corrcoef(off.T) - torch.eye(3)).abs().max() < 5 / math.sqrt(n)
    h = torch.randn(7, generator=torch.Generator().manual_seed(1))
    drawn = low_rank_delta(h.expand(n, 7), pack.modules["lm_head"], n, 2.0).double()
    v, b = state.params["lm_head.lora_A"], state.params["lm_head.lora_B"]
    expected = 2.0 * b @ (mean[1] * (v @ h))
    assert ((drawn.mean(0) - expected).abs() < 5 * drawn.std(0) / math.sqrt(n)).all()
    alone = low_rank_delta(h[None], SCALABL.mean_pack(state, config).modules["lm_head"], 1, 2.0)
    torch.testing.assert_close(alone[0], expected)


def test_adamw_moves_everything_and_sgd_the_values_alone() -> None:
    optim = OptimConfig(lr=3e-4, weight_decay=0.1)
    config = ScalablConfig()
    state = state_of(config)
    groups = SCALABL.param_groups(state, optim, config)
    adamw = [g for g in groups if g.optimizer == "adamw"]
    (sgd,) = (g for g in groups if g.optimizer == "sgd")
    assert sorted(n for g in adamw for n in g.names) == sorted(state.params)
    decays = {n: g.weight_decay for g in adamw for n in g.names}
    assert (decays["log_scale"], decays["lm_head.lora_A"]) == (0.0, 0.1)
    assert (sorted(sgd.names), sgd.lr) == (["log_scale", "log_sigma"], 0.2)
    assert SCALABL.divergence_apart


def test_without_spread_every_sample_is_the_mean() -> None:
    state = state_of(ScalablConfig())
    still = replace(state, params={**state.params, "log_sigma": torch.full((2, 3), -math.inf)})
    z = SCALABL.predict_pack(still, ScalablConfig(), Draw(("x",), 2)).modules["lm_head"].z
    assert z is not None
    torch.testing.assert_close(z, state.params["log_scale"][1].exp().expand(2, 3))


def test_the_summary_names_values_and_spreads() -> None:
    state = state_of(ScalablConfig())
    summary = SCALABL.summary(state, ScalablConfig())
    expected = state.params["log_scale"][1].double().exp().tolist()
    assert summary["scale"]["lm_head"] == pytest.approx(expected)
    assert list(summary["sigma"]) == ["layers.0.q", "lm_head"]
