"""How the M uniforms behind one gate are drawn together.

Only the independent design exists so far; its samples are prefixes of one another, so M = 4 uses
the first four masks of M = 10.
"""

import numpy as np
import torch
from torch import Tensor

from dalorra_core.sampling.streams import uniforms

__all__ = ["iid_uniforms"]


def iid_uniforms(key: tuple[str | int, ...], num_samples: int, num_modules: int, r: int) -> Tensor:
    """Return independent uniforms (M, L, r) in float64, one stream per sample.

    Args:
        key: What the draw is for, such as (adapter sha256, seed, "z").
        num_samples: M.
        num_modules: L.
        r: Rank.
    """
    draws = [uniforms((*key, m), num_modules * r) for m in range(num_samples)]
    return torch.from_numpy(np.stack(draws)).view(num_samples, num_modules, r)  # (M, L, r)
