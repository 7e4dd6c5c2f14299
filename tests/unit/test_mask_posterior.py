"""benchmarks.mask_posterior: the exact posterior and the comparison, on numbers known otherwise."""

import math

import pytest
import torch

from benchmarks.mask_posterior import (
    FAMILIES,
    ExactPosterior,
    best_in_family,
    compare,
    every_mask,
    prior_log_probs,
    product_log_prob,
)
from dalorra_core.adapters.inject import TargetSpec
from dalorra_core.adapters.state import AdapterState
from tests.support import reference

SPECS = (TargetSpec("layers.0.q", 3, 2, 0), TargetSpec("layers.1.q", 3, 2, 1))
STATE = AdapterState(SPECS, 2, 1.0, {})
MASKS = every_mask(2, 2)


def exact_of(log_likelihood: torch.Tensor) -> ExactPosterior:
    return ExactPosterior(MASKS, prior_log_probs(MASKS, 0.5), log_likelihood.double())


def test_prior_and_product_are_those_of_independent_gates() -> None:
    phi = torch.tensor([[-1.0, 0.3], [2.0, 0.0]], dtype=torch.float64)
    keep = phi.sigmoid().flatten().tolist()
    log_q = product_log_prob(AdapterState(SPECS, 2, 1.0, {"phi": phi}), MASKS)
    log_p = prior_log_probs(MASKS, 0.3)
    for i, mask in enumerate(reference.every_mask(4)):
        assert MASKS[i].flatten().tolist() == list(mask)
        expected = reference.mask_probability(mask, keep)
        assert math.exp(log_q[i]) == pytest.approx(expected, rel=1e-9)
        expected = reference.mask_probability(mask, [0.3] * 4)
        assert math.exp(log_p[i]) == pytest.approx(expected, rel=1e-9)


def test_what_the_bound_misses_is_the_divergence() -> None:
    generator = torch.Generator().manual_seed(0)
    exact = exact_of(torch.randn(16, generator=generator))
    keep = [0.2, 0.7, 0.5, 0.9]
    phi = torch.tensor(keep, dtype=torch.float64).logit().view(2, 2)
    log_q = product_log_prob(AdapterState(SPECS, 2, 1.0, {"phi": phi}), MASKS)
    found = compare(log_q, exact)
    values = exact.log_likelihood.tolist()
    evidence = reference.log_evidence(values, 0.5)
    elbo = reference.elbo_by_enumeration(values, keep) - reference.mask_kl_loop(keep, 0.5)
    assert found["log_evidence_nats"] == pytest.approx(evidence)
    assert found["elbo_nats"] == pytest.approx(elbo)
    assert found["kl_to_exact_nats"] == pytest.approx(evidence - elbo)
    assert found["kl_to_prior_nats"] == pytest.approx(reference.mask_kl_loop(keep, 0.5))


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_holds_a_posterior_without_dependence(name: str) -> None:
    slopes = torch.tensor([2.0, -1.0, 0.5, 3.0], dtype=torch.float64)
    assert best_in_family(name, STATE, exact_of(MASKS.flatten(1) @ slopes)) < 1e-3


def test_the_chain_holds_dependence_between_its_layers_and_the_product_does_not() -> None:
    """Gate 0 of the two layers agree with probability e^4 / (1 + e^4)."""
    agree = (MASKS[:, 0, 0] == MASKS[:, 1, 0]).double()
    exact = exact_of(4 * agree)
    found = {name: best_in_family(name, STATE, exact) for name in ("dalorra", "mask_markov")}
    assert found["mask_markov"] < 1e-2
    assert found["dalorra"] > 0.5
    comparison = compare(exact.log_prior, exact)
    p = math.exp(4) / (1 + math.exp(4))
    assert comparison["strongest_correlation"]["exact"] == pytest.approx(2 * p - 1)
    assert comparison["strongest_correlation"]["q"] == pytest.approx(0.0, abs=1e-9)
    assert comparison["total_variation"] == pytest.approx(p - 0.5)
    assert comparison["keep_prob_max_abs_error"] == pytest.approx(0.0, abs=1e-9)
    assert comparison["masks_holding_nine_tenths_of_exact"] == 8
