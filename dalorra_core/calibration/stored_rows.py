"""The calibration rows as an artifact stores them: scores and digests, never a text."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from safetensors.torch import save
from torch import Tensor

from dalorra_core.artifact.calibration_record import HIGHER_IS_SURER, ScoreName
from dalorra_core.calibration.scores import ScoreTable
from dalorra_core.calibration.split import PARTS, Part

__all__ = ["StoredRows"]


@dataclass(frozen=True, eq=False)
class StoredRows:
    """What is kept of n calibration rows.

    Attributes:
        digest: (n, 16) uint8, of what was asked.
        part: (n,) uint8, index into ``PARTS``.
        table: Labels, predictions and scores under the calibrated default predictive.
    """

    digest: Tensor
    part: Tensor
    table: ScoreTable

    def of_part(self, part: Part) -> ScoreTable:
        """Return the rows of one part."""
        return self.table.rows(self.part == PARTS.index(part))

    def to_bytes(self) -> bytes:
        """Return the rows as safetensors."""
        tensors = {
            "digest": self.digest,
            "part": self.part,
            "labels": self.table.labels.to(torch.int32),
            "predicted": self.table.predicted.to(torch.int32),
            **self.table.scores,
        }
        return save({name: value.contiguous() for name, value in tensors.items()})

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> "StoredRows":
        """Return the rows that ``Artifact.calibration_scores`` holds."""
        scores: dict[ScoreName, Tensor] = {n: tensors[n] for n in HIGHER_IS_SURER if n in tensors}
        table = ScoreTable(tensors["labels"].long(), tensors["predicted"].long(), scores)
        return cls(tensors["digest"], tensors["part"], table)
