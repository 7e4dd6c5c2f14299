"""How long a batch takes: fitted to a server that was measured, or the bound of the cost model."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from benchmarks.cost_model import Shape, bound_s, pass_work
from dalorra_core.predictive.scoring import plan_chunks

__all__ = ["Bound", "Linear", "Service", "passes_of"]

Service = Callable[[Sequence[int], int], float]
"""From the lengths of a batch's rows and the samples M to the seconds it takes."""


def passes_of(lengths: Sequence[int], samples: int, limit: int) -> list[tuple[int, int, int]]:
    """Return rows, longest row and samples of every forward pass that a batch is cut into."""
    found: list[tuple[int, int, int]] = []
    for rows, step in plan_chunks(lengths, samples, limit):
        longest = max(lengths[i] for i in rows)
        found += [
            (len(rows), longest, min(step, samples - start)) for start in range(0, samples, step)
        ]
    return found


@dataclass(frozen=True)
class Linear:
    """So much for a pass, and so much for each of its tokens times samples.

    Attributes:
        pass_s: Seconds of a pass.
        token_s: Seconds of a token of one sample, or of padding where there is any.
        pass_tokens: What one pass takes at most, see ``padded_token_limit``.
        unpadded: Whether rows share a pass without padding.
    """

    pass_s: float
    token_s: float
    pass_tokens: int
    unpadded: bool = False

    def __call__(self, lengths: Sequence[int], samples: int) -> float:
        """Return the seconds that a batch takes."""
        passes, tokens = self.counts(lengths, samples, self.pass_tokens, unpadded=self.unpadded)
        return self.pass_s * passes + self.token_s * tokens

    @staticmethod
    def counts(
        lengths: Sequence[int], samples: int, pass_tokens: int, *, unpadded: bool = False
    ) -> tuple[int, int]:
        """Return the passes of a batch, and their tokens times samples together."""
        passes = passes_of(lengths, samples, pass_tokens)
        padded = sum(rows * longest * m for rows, longest, m in passes)
        return len(passes), sum(lengths) * samples if unpadded else padded

    @classmethod
    def fit(
        cls,
        counts: Sequence[tuple[int, int]],
        seconds: Sequence[float],
        pass_tokens: int,
        *,
        unpadded: bool = False,
    ) -> "Linear":
        """Return the least squares of relative errors, neither part below zero.

        Args:
            counts: Passes and tokens of what was measured, see ``counts``.
            seconds: How long it took.
            pass_tokens: What one pass takes at most.
            unpadded: How the tokens were counted.
        """
        known = np.array(counts, dtype=float) / np.array(seconds)[:, None]  # (n, 2)
        ones = np.ones(len(seconds))
        both = np.linalg.lstsq(known, ones, rcond=None)[0]
        if both.min() >= 0:
            return cls(float(both[0]), float(both[1]), pass_tokens, unpadded)
        alone = [float(known[:, i].sum() / (known[:, i] ** 2).sum()) for i in (0, 1)]
        errors = [float(((alone[i] * known[:, i] - 1) ** 2).sum()) for i in (0, 1)]
        better = int(errors[1] < errors[0])
        return cls(*((0.0, alone[1]) if better else (alone[0], 0.0)), pass_tokens, unpadded)


@dataclass(frozen=True)
class Bound:
    """The cost model's bound of every pass, at rates that are given.

    Attributes:
        shape: Of model and adapter.
        flops_per_s: Rate of matrix products that is reached.
        bytes_per_s: Bandwidth that is reached.
        bytes_per_weight: 2 in bfloat16.
        pass_tokens: What one pass takes at most.
    """

    shape: Shape
    flops_per_s: float
    bytes_per_s: float
    bytes_per_weight: int
    pass_tokens: int

    def __call__(self, lengths: Sequence[int], samples: int) -> float:
        """Return the seconds that a batch takes at least, label mass included."""
        return sum(
            bound_s(
                pass_work(self.shape, rows, longest, m, label_mass=True),
                self.flops_per_s,
                self.bytes_per_s,
                self.bytes_per_weight,
            )
            for rows, longest, m in passes_of(lengths, samples, self.pass_tokens)
        )
