"""Markov masks against the sum over every mask of a small chain, and against DALorRA at C = 0."""

import math
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from dalorra_core.adapters.inject import TargetSpec
from dalorra_core.adapters.pack import SamplePack
from dalorra_core.adapters.state import AdapterState, module_packs
from dalorra_core.config import OptimConfig
from dalorra_core.methods import METHODS
from dalorra_core.methods.dalorra import DalorraConfig
from dalorra_core.methods.mask_markov import MaskMarkovConfig, log_prob
from dalorra_core.methods.method import Draw
from dalorra_core.objectives.elbo import KlTerm
from tests.support.reference import every_mask, mask_probability
from tests.support.tiny_models import point_of

MARKOV, DALORRA = METHODS["mask_markov"], METHODS["dalorra"]
PRIOR = 0.6
CONFIG = MaskMarkovConfig(prior_prob=PRIOR)
SPECS = (
    TargetSpec("model.layers.4.self_attn.q_proj", 5, 4, 4),
    TargetSpec("model.layers.4.self_attn.v_proj", 5, 3, 4),
    TargetSpec("model.layers.5.self_attn.q_proj", 5, 4, 5),
    TargetSpec("model.layers.6.self_attn.q_proj", 5, 4, 6),
    TargetSpec("lm_head", 5, 3, None),
)
BEFORE = (None, None, 0, 2, None)
"""Which module each one depends on: three q_proj in a row, the rest alone."""


def state_of(config: MaskMarkovConfig = CONFIG, *, r: int = 2, links: float = 2.0) -> AdapterState:
    generator = torch.Generator().manual_seed(1)
    params = MARKOV.init(SPECS, r, 0, config)
    for name in ("phi", "links"):
        scale = links if name == "links" else 1.0
        params[name] = scale * torch.randn(params[name].shape, generator=generator)
    return AdapterState(SPECS, r, 2.0, params)


def gates_of(pack: SamplePack) -> Tensor:
    gates = [pack.modules[spec.name].z for spec in SPECS]
    return torch.stack([z for z in gates if z is not None], dim=1)  # (M, L, r)


def probability_loop(state: AdapterState, mask: tuple[int, ...]) -> float:
    """Return q(mask): a product along the chains, number by number."""
    r, phi = state.r, state.params["phi"].double().tolist()
    links = iter(state.params["links"].double().tolist())
    total = 1.0
    for place, before in enumerate(BEFORE):
        pull = [0.0] * r
        if before is not None:
            matrix = next(links)
            off = [mask[before * r + i] - 1 / (1 + math.exp(-phi[before][i])) for i in range(r)]
            pull = [math.fsum(matrix[j][i] * off[i] for i in range(r)) for j in range(r)]
        for j in range(r):
            keep = 1 / (1 + math.exp(-(phi[place][j] + pull[j])))
            total *= keep if mask[place * r + j] else 1 - keep
    return total


@pytest.fixture(scope="module")
def enumerated() -> tuple[AdapterState, list[tuple[int, ...]], list[float]]:
    """All 1,024 masks of ten gates, and their probabilities."""
    state = state_of()
    masks = every_mask(10)
    return state, masks, [probability_loop(state, mask) for mask in masks]


def as_gates(masks: list[tuple[int, ...]]) -> Tensor:
    return torch.tensor(masks).float().view(len(masks), len(SPECS), -1)


def divergences(state: AdapterState, z: Tensor, config: MaskMarkovConfig = CONFIG) -> KlTerm:
    pack = SamplePack(len(z), 2.0, module_packs(state, z))
    terms: Mapping[str, KlTerm] = MARKOV.kl_terms(state, config, point_of(10), pack)
    return terms["mask_kl"]


def test_the_log_probability_is_that_of_the_chain(
    enumerated: tuple[AdapterState, list[tuple[int, ...]], list[float]],
) -> None:
    state, masks, expected = enumerated
    found = log_prob(state, as_gates(masks)).double().exp()
    torch.testing.assert_close(found, torch.tensor(expected).double(), rtol=1e-4, atol=1e-9)
    assert math.fsum(expected) == pytest.approx(1.0, abs=1e-12)


def test_the_kl_on_average_over_the_posterior_is_the_enumerated_one(
    enumerated: tuple[AdapterState, list[tuple[int, ...]], list[float]],
) -> None:
    state, masks, q = enumerated
    prior = [mask_probability(mask, [PRIOR] * 10) for mask in masks]
    exact = math.fsum(a * math.log(a / b) for a, b in zip(q, prior, strict=True))
    gates = as_gates(masks)
    each = [float(divergences(state, gates[i : i + 1]).value) for i in range(len(masks))]
    found = math.fsum(a * value for a, value in zip(q, each, strict=True))
    assert found == pytest.approx(exact, rel=1e-5)
    at_the_mean = float(
        MARKOV.kl_terms(state, CONFIG, point_of(10), MARKOV.mean_pack(state, CONFIG))[
            "mask_kl"
        ].value
    )
    assert abs(at_the_mean - exact) > 0.1  # which the gates' means alone do not give


def test_the_kl_of_several_samples_is_their_mean() -> None:
    state, z = state_of(), as_gates(every_mask(10)[100:103])
    each = [float(divergences(state, z[i : i + 1]).value) for i in range(3)]
    found = divergences(state, z, MaskMarkovConfig(prior_prob=PRIOR, kl_weight=0.5))
    assert float(found.value) == pytest.approx(sum(each) / 3, rel=1e-6)
    assert found.weight == pytest.approx(0.5 / 10)


def test_drawn_gates_have_the_chains_marginals_and_pairs(
    enumerated: tuple[AdapterState, list[tuple[int, ...]], list[float]],
) -> None:
    """Ten means and 45 means of products, each within five standard errors."""
    state, masks, q = enumerated
    n = 20_000
    drawn = (
        gates_of(MARKOV.predict_pack(state, CONFIG, Draw(("marginals",), n))).flatten(1).double()
    )
    weights, z = torch.tensor(q).double(), torch.tensor(masks).double()
    for i in range(10):
        for j in range(i + 1):
            exact = float((weights * z[:, i] * z[:, j]).sum())
            found = float((drawn[:, i] * drawn[:, j]).mean())
            assert abs(found - exact) < 5 * math.sqrt(exact * (1 - exact) / n) + 1e-12
    exact = (weights[:, None] * z).sum(0)
    assert (exact - state.params["phi"].double().sigmoid().flatten()).abs().max() > 0.01
    covariance = torch.cov(z.T, aweights=weights, correction=0)
    chained = [i * 2 + j for i in (0, 2, 3) for j in range(2)]
    alone = [2, 3, 8, 9]
    assert covariance[chained][:, chained].fill_diagonal_(0).abs().max() > 0.05
    assert covariance[alone][:, chained].abs().max() < 1e-8


def test_without_links_it_is_dalorra_draw_for_draw() -> None:
    markov = state_of(links=0.0)
    plain = AdapterState(SPECS, 2, 2.0, {k: v for k, v in markov.params.items() if k != "links"})
    draw, ours = Draw(("run", 5), 6), DalorraConfig(prior_prob=PRIOR)
    for masks in ("relaxed", "straight_through"):
        a = MARKOV.train_pack(markov, MaskMarkovConfig(prior_prob=PRIOR, train_masks=masks), draw)
        b = DALORRA.train_pack(plain, DalorraConfig(prior_prob=PRIOR, train_masks=masks), draw)
        # Vectors of other lengths: the last bit of a sigmoid may differ.
        torch.testing.assert_close(gates_of(a), gates_of(b), rtol=1e-6, atol=1e-7)
        found = MARKOV.kl_terms(markov, CONFIG, point_of(10), a)["mask_kl"]
        expected = DALORRA.kl_terms(plain, ours, point_of(10), b)["mask_kl"]
        torch.testing.assert_close(found.value, expected.value, rtol=1e-6, atol=1e-6)
        assert found.weight == expected.weight
    found, expected = (
        MARKOV.predict_pack(markov, CONFIG, draw),
        DALORRA.predict_pack(plain, ours, draw),
    )
    assert torch.equal(gates_of(found), gates_of(expected))
    relaxed = MaskMarkovConfig(test_masks="relaxed"), DalorraConfig(test_masks="relaxed")
    torch.testing.assert_close(
        gates_of(MARKOV.predict_pack(markov, relaxed[0], draw)),
        gates_of(DALORRA.predict_pack(plain, relaxed[1], draw)),
    )


def test_it_starts_as_dalorra_with_one_matrix_for_each_pair_of_layers() -> None:
    params = MARKOV.init(SPECS, 2, 3, CONFIG)
    plain = DALORRA.init(SPECS, 2, 3, DalorraConfig(prior_prob=PRIOR))
    assert set(params) - set(plain) == {"links"}
    assert all(torch.equal(params[name], plain[name]) for name in plain)
    assert torch.equal(params["links"], torch.zeros(2, 2, 2))
    layers = range(32)
    llama = [
        TargetSpec(f"model.layers.{i}.self_attn.{p}_proj", 1, 1, i) for i in layers for p in "qv"
    ]
    shapes = MARKOV.shapes([*llama, TargetSpec("lm_head", 1, 1, None)], 8, CONFIG)
    assert math.prod(shapes["links"]) == 3968  # the design's number for q and v of 32 layers


def test_gradients_reach_the_links_through_gates_and_divergence() -> None:
    state = state_of()
    wide = {name: state.params[name].double().requires_grad_() for name in ("phi", "links")}
    grown = AdapterState(SPECS, 2, 2.0, {**state.params, **wide})
    draw = Draw(("gradient",), 2)

    def loss(phi: Tensor, links: Tensor) -> Tensor:
        at = AdapterState(SPECS, 2, 2.0, {**grown.params, "phi": phi, "links": links})
        pack = MARKOV.train_pack(at, CONFIG, draw)
        return (
            MARKOV.kl_terms(at, CONFIG, point_of(10), pack)["mask_kl"].value + gates_of(pack).sum()
        )

    assert torch.autograd.gradcheck(loss, (wide["phi"], wide["links"]))


def test_more_samples_begin_with_fewer() -> None:
    state = state_of()
    few = gates_of(MARKOV.predict_pack(state, CONFIG, Draw(("m",), 3)))
    many = gates_of(MARKOV.predict_pack(state, CONFIG, Draw(("m",), 7)))
    assert torch.equal(many[:3], few)
    assert not torch.equal(many, gates_of(MARKOV.predict_pack(state, CONFIG, Draw(("k",), 7))))


def test_its_own_parameters_have_their_own_rate_and_no_decay() -> None:
    state = state_of()
    groups = MARKOV.param_groups(state, OptimConfig(lr=1e-3, weight_decay=0.1), CONFIG)
    assert sorted(name for group in groups for name in group.names) == sorted(state.params)
    assert groups[1].names == ("phi", "links")
    assert (groups[1].lr, groups[1].weight_decay) == (CONFIG.mask_lr, 0.0)
    assert (groups[0].lr, groups[0].weight_decay) == (1e-3, 0.1)


def test_the_summary_names_the_links() -> None:
    state = state_of()
    found = MARKOV.summary(state, CONFIG)
    strongest = state.params["links"].double().abs().flatten(1).amax(1).tolist()
    assert found["num_links"] == 2
    assert found["strongest_link"] == {
        "model.layers.5.self_attn.q_proj": strongest[0],
        "model.layers.6.self_attn.q_proj": strongest[1],
    }
    assert found["num_gates"] == 10
