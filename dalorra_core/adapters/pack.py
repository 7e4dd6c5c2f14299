"""A sample pack: the value that fixes M functions of one adapted model.

Holds tensors only. It knows nothing of methods, random streams or Hugging Face models.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from dalorra_core.errors import ConfigError

__all__ = ["ModulePack", "SamplePack", "fold", "unfold"]


@dataclass(frozen=True)
class ModulePack:
    """The factors of one adapted module for all M samples.

    Attributes:
        lora_A: Down factors, (1, r, d_in) when all samples share them, else (M, r, d_in).
        lora_B: Up factors, (1, d_out, r) or (M, d_out, r).
        z: Rank gates (M, r), hard in {0, 1} or relaxed in (0, 1); None stands for all ones.
    """

    lora_A: Tensor  # noqa: N815  PEFT's name, and the key in the artifact
    lora_B: Tensor  # noqa: N815
    z: Tensor | None = None


@dataclass(frozen=True)
class SamplePack:
    """The adapter of M samples, ready to be lent to the layers.

    Attributes:
        num_samples: M, at least 1.
        scaling: lora_alpha / r; never depends on the gates.
        modules: Module name to its factors.
    """

    num_samples: int
    scaling: float
    modules: Mapping[str, ModulePack]

    def __post_init__(self) -> None:
        """Refuse a pack whose tensors disagree with M."""
        if self.num_samples < 1:
            raise ConfigError(f"num_samples must be at least 1, got {self.num_samples}")
        for name, module in self.modules.items():
            if module.z is not None and module.z.shape[0] != self.num_samples:
                raise ConfigError(
                    f"module {name}: z holds {module.z.shape[0]} samples, "
                    f"the pack holds {self.num_samples}"
                )
            for factor in (module.lora_A, module.lora_B):
                if factor.shape[0] not in (1, self.num_samples):
                    raise ConfigError(
                        f"module {name}: a factor holds {factor.shape[0]} samples; "
                        f"allowed are 1 and {self.num_samples}"
                    )

    def to(self, device: torch.device, dtype: torch.dtype) -> "SamplePack":
        """Return the same pack with every tensor on ``device`` in ``dtype``."""
        moved = {
            name: ModulePack(
                lora_A=m.lora_A.to(device, dtype),
                lora_B=m.lora_B.to(device, dtype),
                z=None if m.z is None else m.z.to(device, dtype),
            )
            for name, m in self.modules.items()
        }
        return SamplePack(self.num_samples, self.scaling, moved)

    def narrow(self, start: int, stop: int) -> "SamplePack":
        """Return samples ``start`` to ``stop - 1`` as a pack of their own."""

        def cut(x: Tensor) -> Tensor:
            return x if x.shape[0] == 1 and self.num_samples > 1 else x[start:stop]

        return SamplePack(
            stop - start,
            self.scaling,
            {
                name: ModulePack(
                    cut(m.lora_A), cut(m.lora_B), None if m.z is None else m.z[start:stop]
                )
                for name, m in self.modules.items()
            },
        )


def fold(x: Tensor, num_samples: int) -> Tensor:
    """Repeat a batch once per sample: (B, ...) to (M*B, ...), row m*B + b."""
    return x.repeat(num_samples, *([1] * (x.dim() - 1)))


def unfold(x: Tensor, num_samples: int) -> Tensor:
    """Undo the folding of rows: (M*B, ...) to (M, B, ...)."""
    return x.unflatten(0, (num_samples, -1))
