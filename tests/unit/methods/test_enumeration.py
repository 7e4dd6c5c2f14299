"""DALorRA against the sum over every mask: predictive, ELBO and evidence, without noise.

Six gates make 64 masks. Each mask's probabilities come from weights merged by hand into a plain
model in float64; nothing of ours but the tensors goes into the expected values.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from dalorra_core.adapters.state import AdapterState
from dalorra_core.data.collate import EncodedExample
from dalorra_core.methods import METHODS
from dalorra_core.methods.dalorra import DalorraConfig
from dalorra_core.methods.method import Draw
from dalorra_core.metrics.calibration import nll
from dalorra_core.metrics.uncertainty import log_mean_probs, mean_probs
from dalorra_core.objectives.elbo import KlTerm, mean_nll, neg_elbo
from dalorra_core.predictive.scoring import score_rows
from tests.support.reference import (
    elbo_by_enumeration,
    every_mask,
    log_evidence,
    mask_kl_loop,
    mask_probability,
)
from tests.support.tiny_models import (
    TinyAdapter,
    batch_of,
    gated_pack,
    merged_label_logits,
    point_of,
    random_rows,
    tiny_adapter,
)

DALORRA = METHODS["dalorra"]
PRIOR = 0.6
CONFIG = DalorraConfig(prior_prob=PRIOR)


def divergences(state: AdapterState, n: int) -> Mapping[str, KlTerm]:
    return DALORRA.kl_terms(state, CONFIG, point_of(n), DALORRA.mean_pack(state, CONFIG))


@dataclass(frozen=True)
class Enumerated:
    """A tiny adapter, a few rows, and log p(label | row, mask) of every mask."""

    tiny: TinyAdapter
    rows: list[EncodedExample]
    masks: list[tuple[int, ...]]
    log_probs: Tensor  # (2^G, B, C), float64

    @property
    def keep(self) -> list[float]:
        return self.tiny.state.params["phi"].double().sigmoid().flatten().tolist()

    @property
    def gates(self) -> Tensor:
        """(2^G, L, r)."""
        state = self.tiny.state
        return torch.tensor(self.masks).float().view(-1, len(state.specs), state.r)

    @property
    def weights(self) -> Tensor:
        return torch.tensor([mask_probability(mask, self.keep) for mask in self.masks]).double()

    @property
    def log_likelihood(self) -> list[float]:
        """ln p(all labels | mask) for each mask."""
        return [
            math.fsum(float(of_mask[b, row.label]) for b, row in enumerate(self.rows))
            for of_mask in self.log_probs
        ]


def enumerated(tiny: TinyAdapter) -> Enumerated:
    rows = random_rows((5, 3, 6, 4))
    masks = every_mask(tiny.num_gates)
    found = []
    for mask in masks:
        z = torch.tensor(mask).float().view(len(tiny.state.specs), tiny.state.r)
        gates = {spec.name: z[i] for i, spec in enumerate(tiny.state.specs)}
        logits = [merged_label_logits(tiny, row.token_ids, gates) for row in rows]
        found.append(torch.stack(logits).log_softmax(-1))
    return Enumerated(tiny, rows, masks, torch.stack(found))


@pytest.fixture(scope="module")
def six() -> Enumerated:
    return enumerated(tiny_adapter(r=2, layers=(1, 1)))


@pytest.fixture(scope="module")
def one() -> Enumerated:
    """A single gate, whose posterior is a Bernoulli distribution exactly."""
    return enumerated(tiny_adapter(r=1, targets=("v_proj",), layers=(0, 0)))


def test_the_fused_forward_of_all_masks_is_the_enumeration(six: Enumerated) -> None:
    pack = gated_pack(six.tiny.state, six.gates)
    found = score_rows(six.tiny.model, pack, six.rows, num_labels=5, max_padded_tokens=300)
    torch.testing.assert_close(found.log_probs.double(), six.log_probs, rtol=1e-5, atol=1e-5)


def test_monte_carlo_converges_to_the_exact_predictive(six: Enumerated) -> None:
    samples, weights = 4000, six.weights.view(-1, 1, 1)
    probs = six.log_probs.exp()
    exact = (weights * probs).sum(0)  # (B, C)
    error = ((weights * (probs - exact).square()).sum(0) / samples).sqrt()
    pack = DALORRA.predict_pack(six.tiny.state, CONFIG, Draw(("mc",), samples))
    found = score_rows(six.tiny.model, pack, six.rows, num_labels=5, max_padded_tokens=4000)
    estimate = mean_probs(found.log_probs)
    assert error.max() > 1e-3  # the masks matter
    assert ((estimate - exact).abs() < 5 * error + 1e-6).all()
    mean_mask = score_rows(
        six.tiny.model,
        DALORRA.mean_pack(six.tiny.state, CONFIG),
        six.rows,
        num_labels=5,
        max_padded_tokens=4000,
    )
    off = (mean_mask.log_probs[0].double().exp() - exact).abs()
    assert (off > 5 * error + 1e-6).any()  # which the deterministic pass is not


def test_drawn_masks_have_the_posteriors_frequencies(six: Enumerated) -> None:
    samples = 4000
    pack = DALORRA.predict_pack(six.tiny.state, CONFIG, Draw(("counts",), samples))
    gates = [pack.modules[spec.name].z for spec in six.tiny.state.specs]
    drawn = torch.cat([z for z in gates if z is not None], dim=1).int()  # (M, G)
    index = (drawn * 2 ** torch.arange(5, -1, -1)).sum(1)
    counts = torch.bincount(index, minlength=64).double()
    expected = samples * six.weights
    assert ((counts - expected).abs() < 5 * (expected * (1 - six.weights)).sqrt() + 1).all()


def test_the_loss_is_the_exact_negative_elbo_per_example(six: Enumerated) -> None:
    """E_q over hard masks of the code's NLL, plus the code's KL/N, against enumeration."""
    batch, n = batch_of(six.rows), len(six.rows)
    with torch.no_grad():
        logits = six.tiny.model(batch, gated_pack(six.tiny.state, six.gates)).logits  # (64, B, C)
    nll = torch.stack([mean_nll(logits[i : i + 1], batch.labels) for i in range(64)])
    expected_nll = (six.weights * nll.double()).sum()
    found = neg_elbo(expected_nll, divergences(six.tiny.state, n)).item()
    elbo = elbo_by_enumeration(six.log_likelihood, six.keep) - mask_kl_loop(six.keep, PRIOR)
    assert found == pytest.approx(-elbo / n, rel=1e-5)
    assert -n * found <= log_evidence(six.log_likelihood, PRIOR)  # it is a bound


def test_the_nll_of_hard_draws_is_unbiased(six: Enumerated) -> None:
    samples, batch = 3000, batch_of(six.rows)
    per_mask = -torch.tensor(six.log_likelihood).double() / len(six.rows)
    exact = float((six.weights * per_mask).sum())
    error = math.sqrt(float((six.weights * (per_mask - exact).square()).sum()) / samples)
    pack = DALORRA.predict_pack(six.tiny.state, CONFIG, Draw(("nll",), samples))
    with torch.no_grad():
        found = mean_nll(six.tiny.model(batch, pack).logits, batch.labels).item()
    assert abs(found - exact) < 5 * error
    assert error > 1e-3


def test_the_bound_is_tight_at_the_exact_posterior(one: Enumerated) -> None:
    """With one gate the exact posterior is in the family: the ELBO is the evidence there only."""
    closed, opened = one.log_likelihood
    posterior_logit = opened - closed + math.log(PRIOR / (1 - PRIOR))
    n, evidence = len(one.rows), log_evidence(one.log_likelihood, PRIOR)
    nll = torch.tensor([-closed / n, -opened / n], dtype=torch.float64)

    def bound(logit: float) -> float:
        phi = torch.tensor([[logit]], dtype=torch.float64)
        state = replace(one.tiny.state, params={**one.tiny.state.params, "phi": phi})
        weights = torch.stack([(-phi).sigmoid(), phi.sigmoid()]).flatten()
        loss = neg_elbo((weights * nll).sum(), divergences(state, n))
        return -n * loss.item()

    assert bound(posterior_logit) == pytest.approx(evidence, abs=1e-9)
    for shift in (-1.0, -0.1, 0.1, 1.0):
        assert bound(posterior_logit + shift) < evidence - 1e-5


def test_the_mixture_averages_probabilities(six: Enumerated) -> None:
    pack = gated_pack(six.tiny.state, six.gates[[0, 21, 63]])
    log_probs = score_rows(
        six.tiny.model, pack, six.rows, num_labels=5, max_padded_tokens=300
    ).log_probs
    expected = six.log_probs[[0, 21, 63]].exp().mean(0)
    torch.testing.assert_close(mean_probs(log_probs), expected, rtol=1e-4, atol=1e-6)
    of_logs = six.log_probs[[0, 21, 63]].mean(0).softmax(-1)
    assert (of_logs - expected).abs().max() > 0.01


def test_a_sample_that_gives_a_label_nothing_leaves_the_mixtures_nll_finite() -> None:
    log_probs = torch.tensor([[[0.0, -math.inf]], [[-math.inf, 0.0]], [[-200.0, 0.0]]])
    value = float(nll(log_mean_probs(log_probs), torch.tensor([0])))
    assert value == pytest.approx(math.log(3), rel=1e-12)
