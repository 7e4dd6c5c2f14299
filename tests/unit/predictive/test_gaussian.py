"""Gaussian label logits: draws, approximations without draws, and answers to rows."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dalorra_core.adapters.gradients import LabelGradients
from dalorra_core.methods.method import Draw
from dalorra_core.predictive.gaussian import (
    logit_draws,
    probit_logits,
    score_gaussian,
)
from dalorra_core.predictive.scoring import Prediction, score_rows
from tests.support.tiny_models import assert_near, gated_pack, random_rows, tiny_adapter

DRAW = Draw(("gaussian", 1), 4000)


def covariances(rows: int, labels: int, rank: int) -> Tensor:
    root = torch.randn(rows, labels, rank, generator=torch.Generator().manual_seed(3))
    return root @ root.transpose(1, 2)


@pytest.mark.parametrize("rank", [1, 3])
def test_draws_have_the_mean_and_the_covariance(rank: int) -> None:
    """Also of a covariance without full rank. Five standard errors."""
    n, covariance = DRAW.num_samples, covariances(2, 3, rank)
    mean = torch.tensor([[1.0, -2.0, 0.5], [0.0, 3.0, 0.0]])
    drawn = logit_draws(mean, covariance, DRAW).double()
    variance = covariance.diagonal(dim1=-2, dim2=-1).double()
    error = (drawn.mean(0) - mean).abs()
    assert (error <= 5 * (variance / n).sqrt() + 1e-5).all()
    centred = drawn - mean
    found = torch.einsum("mbc,mbd->bcd", centred, centred) / n
    spread = covariance.double().square() + variance.unsqueeze(2) * variance.unsqueeze(1)
    assert ((found - covariance).abs() <= 5 * (spread / n).sqrt() + 1e-5).all()


def test_a_draw_does_not_depend_on_how_many_there_are_or_on_other_rows() -> None:
    mean, covariance = torch.zeros(2, 3), covariances(2, 3, 3)
    many = logit_draws(mean, covariance, Draw(("k", 1), 7))
    few = logit_draws(mean[1:], covariance[1:], Draw(("k", 1), 3))
    assert torch.equal(many[:3, 1:], few)
    assert not torch.equal(few, logit_draws(mean[1:], covariance[1:], Draw(("k", 2), 3)))


def test_no_covariance_is_no_spread() -> None:
    mean = torch.tensor([[1.0, -2.0]])
    drawn = logit_draws(mean, torch.zeros(1, 2, 2), Draw(("k",), 5))
    assert torch.equal(drawn, mean.expand(5, 1, 2))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -1.0])
def test_a_row_without_a_sound_covariance_spoils_no_other(bad: float) -> None:
    covariance = covariances(2, 3, 3)
    sound = logit_draws(torch.zeros(2, 3), covariance, Draw(("k",), 4))
    covariance[0, 1, 1] = bad
    drawn = logit_draws(torch.zeros(2, 3), covariance, Draw(("k",), 4))
    assert drawn[:, 0].isnan().any()
    assert torch.equal(drawn[:, 1], sound[:, 1])


@pytest.mark.parametrize("variance", [0.1, 1.0, 4.0])
@pytest.mark.parametrize("mean", [-2.0, 0.3, 1.5])
def test_probit_is_the_mean_probability_of_two_labels_to_one_per_cent(
    mean: float, variance: float
) -> None:
    """One logit is fixed, so their difference has this variance; methods.md 8."""
    means = torch.tensor([[mean, 0.0]])
    covariance = torch.tensor([[[variance, 0.0], [0.0, 0.0]]])
    nodes, weights = np.polynomial.hermite_e.hermegauss(80)
    first = weights / weights.sum() @ (1 / (1 + np.exp(-(mean + math.sqrt(variance) * nodes))))
    found = probit_logits(means, covariance).softmax(-1)[0].tolist()
    assert found == pytest.approx([first, 1 - first], abs=0.01)


LENGTHS = (5, 2, 7, 3)


def some_covariance(gradients: LabelGradients) -> Tensor:
    """A covariance that depends on the row alone: outer products of its own derivatives."""
    module = gradients.modules["lm_head"]
    flat = torch.einsum("cbto,bti->cboi", module.outputs, module.inputs).flatten(2)
    return torch.einsum("cbk,dbk->bcd", flat, flat) / flat.shape[-1]


def answers(lengths: tuple[int, ...] = LENGTHS, **changes: Any) -> Prediction:
    tiny = tiny_adapter()
    allowed = (None, (0, 3), None, (1, 2, 4))
    options: dict[str, Any] = {
        "modules": tuple(spec.name for spec in tiny.state.specs),
        "covariance": some_covariance,
        "draw": Draw(("rows",), 6),
        "max_padded_tokens": 1000,
        **changes,
    }
    rows = options.pop("rows", random_rows(lengths, allowed=allowed[: len(lengths)]))
    return score_gaussian(tiny.model, gated_pack(tiny.state, None), rows, **options)


def plain(rows: Any) -> Prediction:
    tiny = tiny_adapter()
    pack = gated_pack(tiny.state, None)
    return score_rows(tiny.model, pack, rows, num_labels=5, max_padded_tokens=1000, label_mass=True)


ROWS = random_rows(LENGTHS, allowed=(None, (0, 3), None, (1, 2, 4)))


def test_without_spread_the_answers_are_those_of_the_mean_function() -> None:
    found = answers(covariance=lambda g: torch.zeros(len(g.logits), 5, 5), label_mass=True)
    expected = plain(ROWS)
    assert_near(found.log_probs, expected.log_probs.expand(6, -1, -1))
    assert found.log_probs[:, 1, 1].isneginf().all()
    assert found.label_mass is not None
    assert expected.label_mass is not None
    assert_near(found.label_mass, expected.label_mass)


@pytest.mark.parametrize("limit", [1, 40, 10_000])
def test_neither_order_nor_chunks_change_an_answer(limit: int) -> None:
    whole = answers()
    assert_near(answers(max_padded_tokens=limit).log_probs, whole.log_probs)
    backwards = answers(rows=ROWS[::-1], max_padded_tokens=limit)
    assert_near(backwards.log_probs.flip(1), whole.log_probs)
    assert bool((whole.log_probs.exp().sum(-1) - 1).abs().max() < 1e-5)


def test_rows_that_nobody_wants_are_left_out_and_nan() -> None:
    whole = answers(label_mass=True)
    seen: list[int] = []
    found = answers(wanted=lambda n: n not in (0, 2), label_mass=True, on_progress=seen.append)
    assert found.answered_rows == [1, 3]
    assert found.log_probs[:, [0, 2]].isnan().all()
    assert_near(found.of_answered().log_probs, whole.log_probs[:, [1, 3]])
    assert found.label_mass is not None
    assert found.label_mass[[0, 2]].isnan().all()
    assert sum(seen) == 4  # with those that were left out
    nobody = answers(wanted=lambda _: False, label_mass=True)
    assert nobody.answered_rows == []


def test_without_a_draw_there_is_one_answer_the_probit_one() -> None:
    found = answers(draw=None, covariance=lambda g: torch.eye(5).expand(len(g.logits), 5, 5))
    assert found.log_probs.shape[0] == 1
    logits = plain(ROWS).log_probs[0]  # normalised: equal to the logits up to a constant
    expected = (logits / math.sqrt(1 + math.pi / 8)).log_softmax(-1)
    torch.testing.assert_close(found.log_probs[0], expected, rtol=1e-5, atol=1e-5)
