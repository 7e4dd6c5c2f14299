"""dalorra_core.sampling: draws of normals for dense noise."""

import math

import torch
from scipy import stats

from dalorra_core.sampling.designs import iid_normals


def test_normals_are_normal_and_a_smaller_draw_is_a_prefix() -> None:
    drawn = iid_normals(("noise", 1), 4, (3, 2000))
    assert drawn.shape == (4, 3, 2000)
    assert drawn.dtype == torch.float32
    assert torch.equal(iid_normals(("noise", 1), 2, (3, 2000)), drawn[:2])
    assert stats.kstest(drawn.flatten().numpy(), "norm").pvalue > 1e-4
    flat = drawn.flatten(1).double()
    assert (torch.corrcoef(flat) - torch.eye(4)).abs().max() < 5 / math.sqrt(6000)
