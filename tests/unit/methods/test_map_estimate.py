"""MAP: the prior's part of the loss, and the weight decay that stands for it in published code."""

import pytest
import torch
from pydantic import ValidationError
from torch.distributions import Normal

from dalorra_core.adapters.state import AdapterState
from dalorra_core.config import OptimConfig
from dalorra_core.methods import METHODS
from dalorra_core.methods.map_estimate import MapConfig
from dalorra_core.methods.method import Draw
from dalorra_core.methods.mle import MleConfig
from tests.support.tiny_models import batch_of, point_of, random_rows, tiny_adapter

MAP, MLE = METHODS["map"], METHODS["mle"]
TINY = tiny_adapter()


def state_of(seed: int = 0) -> AdapterState:
    generator = torch.Generator().manual_seed(seed)
    params = {
        name: torch.randn(value.shape, generator=generator).requires_grad_()
        for name, value in TINY.state.params.items()
        if name != "phi"
    }
    return AdapterState(TINY.state.specs, TINY.state.r, 2.0, params)


def terms_of(state: AdapterState, config: MapConfig, n: int) -> torch.Tensor:
    (term,) = MAP.kl_terms(state, config, point_of(n), MAP.mean_pack(state, config)).values()
    return term.weight * term.value


@pytest.mark.parametrize("prior_var", [0.04, 1.0, 25.0])
def test_the_term_is_the_negative_log_prior_per_example(prior_var: float) -> None:
    config, n = MapConfig(prior_var=prior_var), 70
    first, second = state_of(1), state_of(2)

    def neg_log_prior(state: AdapterState) -> torch.Tensor:
        prior = Normal(torch.zeros((), dtype=torch.float64), prior_var**0.5)
        parts = [prior.log_prob(v.double()).sum() for v in state.params.values()]
        return -torch.stack(parts).sum()

    found = terms_of(first, config, n) - terms_of(second, config, n)
    expected = (neg_log_prior(first) - neg_log_prior(second)) / n  # the constant cancels
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-7)


def test_its_gradient_pulls_every_factor_to_zero() -> None:
    state, config = state_of(), MapConfig(prior_var=0.5)
    terms_of(state, config, 8).backward()
    for value in state.params.values():
        torch.testing.assert_close(value.grad, value.detach() / (0.5 * 8))


def test_a_wide_prior_leaves_the_likelihood_alone() -> None:
    assert terms_of(state_of(), MapConfig(prior_var=1e6), 100) < 1e-4


def test_weight_decay_is_no_term_but_a_rate_of_the_optimiser() -> None:
    state, config = state_of(), MapConfig(prior="weight_decay")
    assert MAP.kl_terms(state, config, point_of(8), MAP.mean_pack(state, config)) == {}
    optim = OptimConfig(lr=2e-4, weight_decay=0.1)
    (group,) = MAP.param_groups(state, optim, config)
    assert (group.lr, group.weight_decay) == (2e-4, 1e-5)
    (group,) = MAP.param_groups(state, optim, MapConfig())
    assert (group.lr, group.weight_decay) == (2e-4, 0.1)
    assert sorted(group.names) == sorted(state.params)


def test_it_answers_as_plain_lora_does() -> None:
    state, batch = state_of(), batch_of(random_rows((4, 6)))
    pack = MAP.predict_pack(state, MapConfig(), Draw(("any",), 9))
    assert not MAP.stochastic
    assert pack.num_samples == 1
    with torch.no_grad():
        found = TINY.model(batch, pack).logits
        expected = TINY.model(batch, MLE.mean_pack(state, MleConfig())).logits
    assert torch.equal(found, expected)


@pytest.mark.parametrize("prior_var", [0.0, -1.0, float("inf"), 1e7])
def test_a_prior_has_a_finite_positive_variance(prior_var: float) -> None:
    with pytest.raises(ValidationError):
        MapConfig(prior_var=prior_var)
