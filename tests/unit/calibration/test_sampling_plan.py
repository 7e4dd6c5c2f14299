"""The choice of M and design: what it takes, what it refuses, and that noise does not fool it."""

import math

import pytest
import torch
from torch import Tensor

from dalorra_core.artifact.calibration_record import PlanCandidate
from dalorra_core.calibration.estimator_errors import reference_answers
from dalorra_core.calibration.sampling_plan import (
    PEER,
    SIZES,
    LinearisedAnswers,
    Option,
    PlanChoice,
    PlanRequest,
    choose_plan,
    mean_mask_row,
)
from dalorra_core.errors import ConfigError
from dalorra_core.sampling.designs import DESIGNS, sample_uniforms
from tests.support.reference import every_mask

ROWS, LABELS, REFERENCE = 64, 4, 512


def answers(gates: int, *, one_each: bool, strongly: int = 0) -> Tensor:
    """Return the probabilities under every mask of a few gates, (2^gates, B, C).

    Args:
        gates: How many.
        one_each: Whether a row answers to one gate only, else to all of them.
        strongly: So many of the first rows answer much more.
    """
    generator = torch.Generator().manual_seed(3)
    z = torch.tensor(every_mask(gates)).double()
    weights = torch.randn(gates, ROWS, LABELS, generator=generator, dtype=torch.float64) / 2
    if one_each:
        weights *= torch.eye(gates).repeat(1, ROWS // gates)[..., None]
    weights[:, :strongly] *= 4.0
    rest = torch.randn(ROWS, LABELS, generator=generator, dtype=torch.float64)
    return (torch.einsum("zg,gbc->zbc", z - 0.5, weights) + rest).softmax(-1)


def samples(of_masks: Tensor, name: str, keep: float, option: Option, packs: int) -> Tensor:
    """Return log-probabilities of independent packs, (R, M, B, C)."""
    gates = int(math.log2(len(of_masks)))
    v = sample_uniforms((name,), option[1], (packs, gates), option[0])
    index = (v > 1 - keep).long() @ 2 ** torch.arange(gates - 1, -1, -1)  # (M, R)
    return of_masks[index].log().transpose(0, 1)


def chosen(
    of_masks: Tensor, keep: float, *, packs: int = 8, seed: int = 0, outside: int = 0
) -> PlanChoice:
    reference = samples(of_masks, f"reference {seed}", keep, ("iid", REFERENCE), 1)[0]
    options: list[Option] = [(d, m) for d in DESIGNS if d != "iid" for m in SIZES]
    found = {o: samples(of_masks, f"pack {seed}", keep, o, packs) for o in options}
    return choose_plan(reference, found, torch.arange(ROWS) < outside)


def of(choice: PlanChoice, option: Option) -> PlanCandidate:
    return next(c for c in choice.candidates if (c.design, c.num_samples) == option)


@pytest.mark.parametrize("seed", range(4))
def test_at_one_half_two_stratified_samples_are_enough_where_a_row_answers_to_one_gate(
    seed: int,
) -> None:
    choice = chosen(answers(4, one_each=True), 0.5, seed=seed)
    assert choice.option == ("stratified", 2)
    taken, peer = of(choice, choice.option), of(choice, PEER)
    assert abs(taken.mean_error) < 0.05 * peer.mean_error
    assert taken.information_error is not None
    assert peer.information_error is not None
    assert abs(taken.information_error) < 0.05 * peer.information_error


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("one_each", [True, False])
def test_near_one_it_is_not_fooled(seed: int, one_each: bool) -> None:
    """By (J3) stratified M up to 5 is worse than ten independent samples at p = 0.91."""
    choice = chosen(answers(4, one_each=one_each), 0.91, seed=seed)
    assert choice.option[1] >= 6
    for design in DESIGNS:
        for m in (2, 3, 4):
            assert not of(choice, (design, m)).good_enough


@pytest.mark.parametrize("seed", range(4))
def test_the_mutual_information_needs_more_samples_than_the_mean(seed: int) -> None:
    """Gates together: the spread of a few samples is uncertain, whatever their mean is."""
    choice = chosen(answers(4, one_each=False), 0.5, seed=seed)
    for m in (2, 4):
        found = of(choice, ("stratified", m))
        assert found.mean_excess is not None
        assert found.information_excess is not None
        assert found.mean_excess < 0 < found.information_excess
    assert 5 <= choice.option[1] <= 10


def test_no_smaller_iid_set_is_ever_taken() -> None:
    for seed in range(3):
        choice = chosen(answers(4, one_each=False), 0.5, seed=seed)
        assert not any(
            c.good_enough for c in choice.candidates if c.design == "iid" and c.num_samples < 9
        )


def test_it_tells_out_of_scope_apart_as_the_reference_does() -> None:
    of_masks = answers(4, one_each=True, strongly=8)
    found = chosen(of_masks, 0.5, outside=8)
    assert found.option == ("stratified", 2)
    assert found.reference_auroc is not None
    assert found.reference_auroc > 0.8
    auroc = of(found, ("stratified", 2)).out_of_scope_auroc
    assert auroc == pytest.approx(found.reference_auroc, abs=0.005)
    few = chosen(of_masks, 0.5, outside=7)
    assert few.reference_auroc is None
    assert of(few, PEER).out_of_scope_auroc is None


def test_an_auroc_below_the_references_rules_an_option_out() -> None:
    """Samples that all agree are off by the mutual information alone, and tell nothing apart."""
    p = 0.5 + torch.linspace(0.1, 0.2, ROWS).double()  # the later a row, the more it is spread
    sides = torch.stack([torch.stack([p, 1 - p], -1), torch.stack([1 - p, p], -1)]).log()
    reference = sides[torch.randperm(512, generator=torch.Generator().manual_seed(0)) % 2]
    half = torch.full((8, 4, ROWS, 2), 0.5).double().log()
    outside = torch.arange(ROWS) >= ROWS // 2
    packs: dict[Option, Tensor] = {
        ("stratified", 4): half,
        ("stratified", 6): sides.repeat(3, 1, 1).expand(8, 6, ROWS, 2),
    }
    choice = choose_plan(reference, packs, outside)
    assert choice.reference_auroc == 1.0
    assert of(choice, ("stratified", 4)).out_of_scope_auroc == 0.5
    assert choice.option == ("stratified", 6)


def with_linearised(keep: float, passes: int, shift: float = 0.0) -> PlanChoice:
    """Return the choice where the linearised network is the network, but for a shift of a logit."""
    of_masks = answers(4, one_each=False)
    reference = samples(of_masks, "reference 0", keep, ("iid", REFERENCE), 1)[0]
    options: list[Option] = [("stratified", m) for m in SIZES]
    packs = {o: samples(of_masks, "pack 0", keep, o, 8) for o in options}
    drawn = samples(of_masks, "linearised", keep, ("iid", 256), 8)
    moved = drawn + shift * torch.eye(LABELS, dtype=drawn.dtype)[0]
    found = LinearisedAnswers(moved.log_softmax(-1), passes)
    return choose_plan(reference, packs, torch.zeros(ROWS, dtype=torch.bool), found)


def test_draws_of_a_linearised_network_are_taken_where_they_cost_less() -> None:
    choice = with_linearised(0.91, passes=5)
    assert (choice.estimator, choice.option) == ("linearised", ("iid", 256))
    taken = choice.candidates[-1]
    assert taken.estimator == "linearised"
    assert abs(taken.mean_error) < 0.1 * of(choice, PEER).mean_error
    dear = with_linearised(0.91, passes=11)
    assert dear.estimator == "monte_carlo"
    assert dear.candidates == choice.candidates
    assert dear.candidates[-1].good_enough


def test_a_linearised_network_that_is_another_one_is_not_taken() -> None:
    choice = with_linearised(0.91, passes=2, shift=1.0)
    assert choice.estimator == "monte_carlo"
    assert not choice.candidates[-1].good_enough


def test_mean_mask_is_a_row_without_mutual_information() -> None:
    of_masks = answers(4, one_each=True)
    reference = reference_answers(samples(of_masks, "r", 0.5, ("iid", REFERENCE), 1)[0])
    row = mean_mask_row(reference, of_masks.mean(0))
    assert row.estimator == "mean_mask"
    assert (row.information_error, row.mean_excess, row.good_enough) == (None, None, False)
    assert abs(row.mean_error) < 5 * row.mean_error_se + 1e-4
    off = mean_mask_row(reference, of_masks[0])
    assert off.mean_error > 10 * abs(row.mean_error)


def test_what_cannot_be_compared_is_refused() -> None:
    of_masks = answers(4, one_each=True)
    reference = samples(of_masks, "r", 0.5, ("iid", 64), 1)[0]
    inside = torch.zeros(ROWS, dtype=torch.bool)
    assert choose_plan(reference, {}, inside).option == PEER  # nothing else was tried
    with pytest.raises(ConfigError, match="at least 64 samples, got 63"):
        choose_plan(reference[1:], {}, inside)
    one: dict[Option, Tensor] = {
        ("stratified", 4): samples(of_masks, "p", 0.5, ("stratified", 4), 1)
    }
    with pytest.raises(ConfigError, match="2 packs of every option"):
        choose_plan(reference, one, inside)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"rows": 7}, "plan_rows must be at least 8, got 7"),
        ({"reference": 63}, "plan_reference must be at least 64, got 63"),
        ({"packs": 7}, "plan_packs must be at least 8, got 7"),
    ],
)
def test_too_little_is_refused(changes: dict[str, int], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        PlanRequest(**changes)
