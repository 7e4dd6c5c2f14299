"""What must hold of per-row uncertainty for any samples whatever."""

import math
from random import Random

import torch
from hypothesis import given
from hypothesis import strategies as st

from dalorra_core import metrics

# One part in 10^12 covers the rounding of at most 8 x 6 float64 terms of size log 6.
ROUNDING = 1e-12


@st.composite
def log_probabilities(draw: st.DrawFn) -> torch.Tensor:
    """Draw (M, B, C) log-probabilities, some of them saturated, some labels impossible."""
    samples, rows, labels = draw(st.tuples(st.integers(1, 8), st.integers(1, 4), st.integers(1, 6)))
    size = samples * rows * labels
    logits = draw(
        st.lists(
            st.floats(-60, 60) | st.sampled_from([0.0, 800.0, -800.0]), min_size=size, max_size=size
        )
    )
    table = torch.tensor(logits, dtype=torch.float64).reshape(samples, rows, labels)
    allowed = draw(st.integers(1, labels))
    table[..., allowed:] = -torch.inf
    return table.log_softmax(dim=-1)


@given(log_probabilities())
def test_mutual_information_stays_between_zero_and_log_min_m_c(log_probs: torch.Tensor) -> None:
    samples, _, labels = log_probs.shape
    found = metrics.mutual_information(log_probs)
    assert bool((found >= 0).all())
    assert bool((found <= math.log(min(samples, labels)) + ROUNDING).all())


@given(log_probabilities())
def test_every_measure_stays_in_its_domain(log_probs: torch.Tensor) -> None:
    labels = log_probs.shape[-1]
    found = metrics.summarise(log_probs)
    assert bool(((found.mean_probs >= 0) & (found.mean_probs <= 1)).all())
    torch.testing.assert_close(
        found.mean_probs.sum(-1), torch.ones_like(found.confidence), rtol=0, atol=ROUNDING
    )
    assert bool((found.confidence >= 1 / labels - ROUNDING).all())
    assert bool((found.predictive_entropy <= math.log(labels) + ROUNDING).all())
    assert bool((found.expected_entropy <= found.predictive_entropy + ROUNDING).all())
    for share in (found.normalized_entropy, found.variation_ratio):
        assert bool(((share >= 0) & (share <= 1)).all())
    assert bool(((found.confidence_std >= 0) & (found.confidence_std <= 0.5 + ROUNDING)).all())


@given(log_probabilities(), st.randoms(use_true_random=False))
def test_order_of_samples_and_labels_changes_nothing(
    log_probs: torch.Tensor, random: Random
) -> None:
    samples, _, labels = log_probs.shape
    mixed = log_probs[random.sample(range(samples), samples)]
    mixed = mixed[..., random.sample(range(labels), labels)]
    before, after = metrics.summarise(log_probs), metrics.summarise(mixed)
    for name in ("confidence", "predictive_entropy", "expected_entropy", "mutual_information"):
        torch.testing.assert_close(
            getattr(before, name), getattr(after, name), rtol=0, atol=ROUNDING
        )


@given(log_probabilities())
def test_a_row_does_not_depend_on_its_batch_mates(log_probs: torch.Tensor) -> None:
    together = metrics.summarise(log_probs)
    alone = metrics.summarise(log_probs[:, :1])
    torch.testing.assert_close(
        together.mutual_information[:1], alone.mutual_information, rtol=0, atol=ROUNDING
    )
    torch.testing.assert_close(together.mean_probs[:1], alone.mean_probs, rtol=0, atol=ROUNDING)


@given(log_probabilities(), st.integers(2, 4))
def test_repeating_every_sample_changes_nothing(log_probs: torch.Tensor, times: int) -> None:
    before = metrics.summarise(log_probs)
    after = metrics.summarise(log_probs.repeat(times, 1, 1))
    torch.testing.assert_close(
        before.mutual_information, after.mutual_information, rtol=0, atol=ROUNDING
    )
    torch.testing.assert_close(before.mean_probs, after.mean_probs, rtol=0, atol=ROUNDING)
