"""The label mass from one label's biased log-probability."""

import pytest
import torch
from torch import Tensor

from server.engines.vllm_mass import LABEL_BIAS, label_mass

LABELS = (4, 11, 250)


def biased(logits: Tensor, count: int) -> list[list[list[float | None]]]:
    """Return what vLLM says in float32: the labels among the most probable tokens."""
    shifted = logits.clone()
    shifted[..., list(LABELS)] += LABEL_BIAS
    log_probs = shifted.float().log_softmax(-1)
    least = log_probs.topk(count).values[..., -1:]
    shown = log_probs[..., list(LABELS)]
    return [
        [[float(x) if x >= low else None for x in row] for row, low in zip(rows, lows, strict=True)]
        for rows, lows in zip(shown, least, strict=True)
    ]


@pytest.mark.parametrize("shift", [-4.0, 0.0, 4.0, 8.0])
def test_it_is_the_share_of_the_labels_in_the_vocabulary(shift: float) -> None:
    generator = torch.Generator().manual_seed(1)
    logits = 2 * torch.randn(4, 5, 500, generator=generator, dtype=torch.float64)
    logits[..., list(LABELS)] += shift
    within = logits[..., list(LABELS)].log_softmax(-1)
    expected = logits.softmax(-1)[..., list(LABELS)].sum(-1).mean(0)
    found = label_mass(within, biased(logits, 3))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=2e-2, atol=1e-4)


def test_labels_that_never_show_have_no_mass() -> None:
    within = torch.zeros(2, 1, 3, dtype=torch.float64).log_softmax(-1)
    unseen: list[list[float | None]] = [[None, None, None]]
    assert label_mass(within, [unseen, unseen]).tolist() == [0.0]
    half = label_mass(within, [unseen, [[-0.0, None, None]]])
    assert 0.49 < half.item() <= 0.5


def test_labels_that_are_everything_have_a_mass_of_about_one() -> None:
    within = torch.zeros(1, 1, 3, dtype=torch.float64).log_softmax(-1)
    shown: list[float | None] = [float(within[0, 0, 0])] * 3
    assert label_mass(within, [[shown]]).item() == pytest.approx(1, abs=1e-3)
