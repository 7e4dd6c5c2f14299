"""Designs against the sum over every mask: no bias in the mean probability, and less variance."""

import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from dalorra_core.adapters.state import AdapterState
from dalorra_core.config import Design
from dalorra_core.methods import METHODS
from dalorra_core.methods.dalorra import PHI, DalorraConfig
from dalorra_core.methods.method import Draw
from dalorra_core.sampling.designs import DESIGNS
from tests.support.reference import every_mask, mask_probability
from tests.support.tiny_models import (
    TinyAdapter,
    probs_of_masks,
    random_rows,
    tiny_adapter,
)

METHOD, CONFIG = METHODS["dalorra"], DalorraConfig()
PACKS = 600
M = 4


def with_keep(tiny: TinyAdapter, keep: Sequence[float]) -> AdapterState:
    phi = torch.tensor(keep).double().logit().float().view_as(tiny.state.params[PHI])
    return replace(tiny.state, params={**tiny.state.params, PHI: phi})


@pytest.fixture(scope="module")
def tiny() -> TinyAdapter:
    return tiny_adapter(r=2, layers=(1, 1))  # six gates


@pytest.fixture(scope="module")
def of_masks(tiny: TinyAdapter) -> Tensor:
    """Return the label probabilities of three rows under each of the 64 masks, (64, B, C)."""
    return probs_of_masks(tiny, random_rows((5, 3, 6)))


def gates_of(state: AdapterState, draw: Draw) -> Tensor:
    """Return the six gates of each sample, (M, 6)."""
    pack = METHOD.predict_pack(state, CONFIG, draw)
    gates = [pack.modules[spec.name].z for spec in state.specs]
    return torch.cat([z for z in gates if z is not None], dim=1).long()


def masks_of(state: AdapterState, draw: Draw) -> Tensor:
    """Return which of the 64 masks each sample is, (M,)."""
    return (gates_of(state, draw) * 2 ** torch.arange(5, -1, -1)).sum(1)


def pack_means(state: AdapterState, of_masks: Tensor, design: Design) -> Tensor:
    """Return the mean probabilities of many packs of M samples, (R, B, C)."""
    draws = [Draw(("pack", design, i), M, design=design) for i in range(PACKS)]
    return torch.stack([of_masks[masks_of(state, draw)].mean(0) for draw in draws])


@pytest.mark.parametrize("keep", [(0.5,) * 6, (0.91, 0.3, 0.62, 0.5, 0.75, 0.1)])
def test_the_mean_probability_is_unbiased_under_every_design(
    tiny: TinyAdapter, of_masks: Tensor, keep: tuple[float, ...]
) -> None:
    state = with_keep(tiny, keep)
    weights = [mask_probability(mask, keep) for mask in every_mask(6)]
    exact = (torch.tensor(weights).double().view(-1, 1, 1) * of_masks).sum(0)  # (B, C)
    variance: dict[Design, float] = {}
    for design in DESIGNS:
        means = pack_means(state, of_masks, design)
        error = means.std(0) / math.sqrt(PACKS)
        assert ((means.mean(0) - exact).abs() < 5 * error + 1e-9).all(), design
        variance[design] = float(means.var(0).sum())
    spread = (torch.tensor(weights).view(-1, 1, 1) * (of_masks - exact).square()).sum()
    assert variance["iid"] == pytest.approx(float(spread) / M, rel=0.2)
    assert variance["stratified"] < 0.7 * variance["iid"]
    assert variance["antithetic"] < variance["iid"]


def test_gates_of_a_pack_are_on_in_m_p_samples_rounded_down_or_up(tiny: TinyAdapter) -> None:
    keep = (0.91, 0.3, 0.62, 0.5, 0.75, 0.1)
    state = with_keep(tiny, keep)
    for i in range(200):
        active = gates_of(state, Draw(("count", i), M, design="stratified")).sum(0)
        for count, p in zip(active.tolist(), keep, strict=True):
            assert count in (math.floor(M * p), math.ceil(M * p))


def test_an_antithetic_pair_at_one_half_has_opposite_gates(tiny: TinyAdapter) -> None:
    state = with_keep(tiny, (0.5,) * 6)
    masks = masks_of(state, Draw(("pair",), 7, design="antithetic"))
    assert (masks[:6].view(3, 2).sum(1) == 63).all()
