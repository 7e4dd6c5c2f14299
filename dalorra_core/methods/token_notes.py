"""What a core notes of every token while a forward pass runs, for divergences and reports.

A core does not know which positions are padding; the rows do. ``TellTokens`` hands that to the
cores of a pack when the rows are known, and each gets an empty sheet for this one pass.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from dalorra_core.adapters.pack import ModulePack, RowContext, SamplePack, Transform

__all__ = ["NotingCore", "TellTokens", "TokenNotes", "notes_of", "with_token_axis"]

_AXES = 4
"""Sample, row, token, feature."""


def with_token_axis(x: Tensor) -> Tensor:
    """Return activations (M, B, T, k); those of ``lm_head`` (M, B, k) are of one position."""
    return x if x.dim() == _AXES else x.unsqueeze(2)


@dataclass(frozen=True)
class TokenNotes:
    """One module's sheet for one forward pass.

    Attributes:
        is_token: (B, T) bool, False for padding.
        values: What the core noted, (M, B, T, ...); the last entry counts.
    """

    is_token: Tensor
    values: list[Tensor] = field(default_factory=list[Tensor])

    def add(self, value: Tensor) -> None:
        """Note a value of every token, (M, B, T, ...)."""
        self.values.append(value)

    @property
    def value(self) -> Tensor:
        """What was noted, (M, B, T, ...).

        Raises:
            RuntimeError: No forward pass has run with this pack.
        """
        if not self.values:
            raise RuntimeError("nothing is noted: no forward pass has run with this pack")
        return self.values[-1]

    def weights(self, *, padding: bool = False) -> Tensor:
        """Return 1 for tokens and 0 for padding, (B, T) of the noted value.

        Args:
            padding: Count padding as tokens.
        """
        rows, length = self.value.shape[1:3]
        if padding or length == 1 < self.is_token.shape[1]:  # one position: the row's last token
            return torch.ones(rows, length, device=self.is_token.device)
        # Rows that shared the pass may have been longer than all of these.
        return F.pad(self.is_token, (0, length - self.is_token.shape[1])).float()


@runtime_checkable
class NotingCore(Transform, Protocol):
    """A core that notes something of every token once it has a sheet."""

    notes: TokenNotes | None

    def noting(self, notes: TokenNotes) -> "NotingCore":
        """Return the same core with a sheet."""
        ...


@dataclass(frozen=True)
class TellTokens:
    """Gives every noting core of a pack an empty sheet for the rows; a ``PerRow``."""

    def __call__(
        self, modules: Mapping[str, ModulePack], context: RowContext
    ) -> Mapping[str, ModulePack]:
        """Return the modules with their sheets."""
        return {name: _with_sheet(module, context) for name, module in modules.items()}

    def narrow(self, start: int, stop: int) -> "TellTokens":  # noqa: ARG002
        """Return itself: nothing in it depends on the sample."""
        return self

    def to(self, device: torch.device, dtype: torch.dtype) -> "TellTokens":  # noqa: ARG002
        """Return itself: it holds no tensor."""
        return self

    def tensors(self) -> Sequence[Tensor]:
        """Return nothing."""
        return ()


def _with_sheet(module: ModulePack, context: RowContext) -> ModulePack:
    if not isinstance(module.core, NotingCore):
        return module
    return replace(module, core=module.core.noting(TokenNotes(context.is_token)))


def notes_of(pack: SamplePack) -> list[TokenNotes]:
    """Return the sheets of a pack that a forward pass has used, module after module.

    Raises:
        RuntimeError: A module has none: the pack was never told its rows.
    """
    sheets = []
    for name, module in pack.modules.items():
        notes = module.core.notes if isinstance(module.core, NotingCore) else None
        if notes is None:
            raise RuntimeError(f"module {name} has noted nothing: its pack was not settled")
        sheets.append(notes)
    return sheets
