"""The network linearised in its gates, against finite differences and enumerated masks."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from dalorra_core.adapters.inject import LM_HEAD
from dalorra_core.config import MethodSettings
from dalorra_core.errors import ConfigError
from dalorra_core.methods.dalorra import DalorraConfig
from dalorra_core.methods.frozen_gates import METHOD as FROZEN_GATES
from dalorra_core.methods.method import Draw
from dalorra_core.predictive.gates import independent_gates
from dalorra_core.predictive.gaussian import probit_logits
from dalorra_core.predictive.gradients import label_gradients_of_rows
from dalorra_core.predictive.linearised import (
    LinearisedGates,
    controlled,
    flat_gates,
    gate_covariance,
    gates_to_linearise,
)
from tests.support.reference import every_mask, mask_probability
from tests.support.tiny_models import (
    FAMILIES,
    TinyAdapter,
    assert_near,
    gated_pack,
    merged_label_logits,
    probs_of_masks,
    random_rows,
    tiny_adapter,
)

ROWS = random_rows((5, 1, 3))


def keep_of(tiny: TinyAdapter) -> Tensor:
    return tiny.state.params["phi"].sigmoid()  # (L, r)


def linearised(tiny: TinyAdapter, limit: int = 1000) -> LinearisedGates:
    pack = gated_pack(tiny.state, keep_of(tiny)[None])
    keep = independent_gates(DalorraConfig(), pack)
    return LinearisedGates.of(tiny.model, pack, ROWS, keep=keep, max_padded_tokens=limit)


def weights_of(tiny: TinyAdapter) -> Tensor:
    keep = keep_of(tiny).flatten().tolist()
    weights = [mask_probability(mask, keep) for mask in every_mask(tiny.num_gates)]
    return torch.tensor(weights, dtype=torch.float64)


def logits_at(tiny: TinyAdapter, z: Tensor) -> Tensor:
    """Return the logits (B, C) under gates (L, r) in float64, without our layers."""
    gates = {spec.name: z[i] for i, spec in enumerate(tiny.state.specs)}
    return torch.stack([merged_label_logits(tiny, row.token_ids, gates) for row in ROWS])


@pytest.mark.parametrize("family", FAMILIES)
def test_the_jacobian_is_finite_differences_in_the_gates(family: str) -> None:
    tiny = tiny_adapter(family, r=2, targets=("q_proj", "down_proj", "lm_head"), layers=(0, 0))
    found, p, step = linearised(tiny), keep_of(tiny), 0.01
    assert_near(found.logits.double(), logits_at(tiny, p))
    assert found.jacobian.shape == (3, 5, tiny.num_gates)
    for g in range(tiny.num_gates):
        unit = torch.zeros(tiny.num_gates)
        unit[g] = step
        unit = unit.view_as(p)
        near = logits_at(tiny, p + unit) - logits_at(tiny, p - unit)
        far = logits_at(tiny, p + 2 * unit) - logits_at(tiny, p - 2 * unit)
        slope = (8 * near - far) / (12 * step)  # five points, since norms are float32
        error = (found.jacobian[..., g] - slope).abs().max()
        assert error < 5e-4 * max(1.0, float(slope.abs().max()))


def test_gates_that_are_always_on_or_off_take_no_derivative_and_change_no_covariance() -> None:
    tiny = tiny_adapter(r=2, targets=("q_proj", "down_proj", "lm_head"))
    keep = keep_of(tiny).clone()
    keep[:3] = torch.tensor([1.0, 0.0])  # of the lower layers
    pack = gated_pack(tiny.state, keep[None])
    every = independent_gates(DalorraConfig(), pack)
    some = gates_to_linearise(DalorraConfig(), pack, num_labels=5)
    assert list(some) == list(every)[3:]
    whole = LinearisedGates.of(tiny.model, pack, ROWS, keep=every, max_padded_tokens=1000)
    ((places, gradients),) = label_gradients_of_rows(
        tiny.model, pack, ROWS, modules=tuple(some), max_padded_tokens=1000
    )
    found = gate_covariance(pack, some)(gradients)
    assert_near(found, whole.covariance[places])
    assert float(found.diagonal(dim1=1, dim2=2).min()) > 0


@pytest.fixture(scope="module")
def linear() -> TinyAdapter:
    """Return an adapter whose logits are linear in its six gates: those of the head alone."""
    return tiny_adapter(r=6, targets=("lm_head",))


def test_of_a_linear_network_it_is_the_network(linear: TinyAdapter) -> None:
    masks = torch.tensor(every_mask(6)).float()
    exact = probs_of_masks(linear, ROWS)
    assert_near(linearised(linear).log_probs(masks).double().exp(), exact)


def test_of_a_linear_network_the_two_moments_are_those_over_all_masks(linear: TinyAdapter) -> None:
    found, weights = linearised(linear), weights_of(linear)
    logits = torch.stack(
        [logits_at(linear, torch.tensor(mask).view(1, 6)) for mask in every_mask(6)]
    )
    mean = torch.einsum("z,zbc->bc", weights, logits)
    centred = logits - mean
    covariance = torch.einsum("z,zbc,zbd->bcd", weights, centred, centred)
    assert_near(found.logits.double(), mean)
    torch.testing.assert_close(found.covariance, covariance, rtol=1e-4, atol=1e-4)
    draws = found.gaussian(Draw(("k",), 3))
    assert draws.shape == (3, 3, 5)
    assert_near(draws.exp().sum(-1), torch.ones(3, 3))
    expected = probit_logits(found.logits, found.covariance).log_softmax(-1)
    assert_near(found.probit(), expected.float())


def scaled(factor: float) -> TinyAdapter:
    tiny = tiny_adapter(r=2, layers=(1, 1))  # six gates of q_proj, v_proj and lm_head
    params = {
        name: factor * value if name.endswith("lora_B") else value
        for name, value in tiny.state.params.items()
    }
    return replace(tiny, state=replace(tiny.state, params=params))


def test_with_little_spread_its_mean_probability_is_nearer_than_the_mean_masks() -> None:
    tiny = scaled(0.3)
    exact = torch.einsum("z,zbc->bc", weights_of(tiny), probs_of_masks(tiny, ROWS))
    found = linearised(tiny)
    drawn = found.gaussian(Draw(("near",), 5000)).double().exp().mean(0)
    at_mean = found.logits.double().softmax(-1)
    assert (drawn - exact).square().sum() < 0.25 * (at_mean - exact).square().sum()


def test_rows_keep_their_order_and_their_choices_in_every_chunk() -> None:
    tiny = tiny_adapter(r=2)
    pack = gated_pack(tiny.state, keep_of(tiny)[None])
    keep = independent_gates(DalorraConfig(), pack)
    rows = random_rows((5, 1, 3), allowed=(None, (0, 2), None))
    chunks = [
        LinearisedGates.of(tiny.model, pack, rows, keep=keep, max_padded_tokens=limit)
        for limit in (1, 1000)
    ]
    assert_near(chunks[0].jacobian, chunks[1].jacobian)
    found = chunks[0].log_probs(torch.ones(1, tiny.num_gates))
    assert_near(found, chunks[1].log_probs(torch.ones(1, tiny.num_gates)))
    assert found[0, 1].isneginf().tolist() == [False, True, False, True, True]


def of_masks(tiny: TinyAdapter, places: Tensor) -> tuple[Tensor, Tensor]:
    """Return log-probabilities of network and linearised network under some masks."""
    masks = torch.tensor(every_mask(tiny.num_gates)).float()[places]
    return probs_of_masks(tiny, ROWS)[places].log(), linearised(tiny).log_probs(masks)


def test_over_all_masks_the_control_variate_has_no_bias() -> None:
    """Every mask as often as it is probable: the surrogate cancels, whatever it is."""
    tiny = tiny_adapter(r=2, layers=(1, 1))
    params = {**tiny.state.params, "phi": torch.tensor([[0.0, 0.0], [0.0, 0.0], [0.0, 0.0]])}
    tiny = replace(tiny, state=replace(tiny.state, params=params))
    log_probs, surrogate = of_masks(tiny, torch.arange(64))
    found = controlled(log_probs, surrogate, surrogate)
    exact = log_probs.exp()
    assert_near(found.mean_probs, exact.mean(0))
    within = torch.special.entr(exact).sum(-1).mean(0)
    assert_near(found.expected_entropy, within)
    total = torch.special.entr(exact.mean(0)).sum(-1)
    assert_near(found.mutual_information, total - within)


def test_the_control_variate_has_a_smaller_error_than_its_samples() -> None:
    tiny = scaled(0.3)
    weights = weights_of(tiny)
    log_probs, surrogate = of_masks(tiny, torch.arange(64))
    exact = torch.einsum("z,zbc->bc", weights, log_probs.exp())
    generator = torch.Generator().manual_seed(2)
    known = torch.multinomial(weights, 20_000, replacement=True, generator=generator)
    plain, corrected = 0.0, 0.0
    for _ in range(200):
        drawn = torch.multinomial(weights, 4, replacement=True, generator=generator)
        found = controlled(log_probs[drawn], surrogate[drawn], surrogate[known])
        assert_near(found.mean_probs.sum(-1), torch.ones(3, dtype=torch.float64))
        plain += float((log_probs[drawn].exp().mean(0) - exact).square().sum())
        corrected += float((found.mean_probs - exact).square().sum())
    assert corrected < 0.3 * plain


def test_gates_stand_in_the_order_of_the_modules() -> None:
    tiny = tiny_adapter(r=2)
    z = torch.rand(3, len(tiny.state.specs), 2, generator=torch.Generator().manual_seed(0))
    pack = gated_pack(tiny.state, z)
    assert torch.equal(flat_gates(pack), z.flatten(1))
    keep = independent_gates(DalorraConfig(), gated_pack(tiny.state, z[:1]))
    assert list(keep)[-1] == LM_HEAD
    assert torch.equal(torch.cat(list(keep.values())), z[0].flatten())


@pytest.mark.parametrize(
    "config", [DalorraConfig(test_masks="relaxed"), FROZEN_GATES.settings(name="frozen_gates")]
)
def test_other_posteriors_are_refused(config: MethodSettings) -> None:
    tiny = tiny_adapter()
    with pytest.raises(ConfigError, match="independent hard gates of method dalorra"):
        independent_gates(config, gated_pack(tiny.state, None))
