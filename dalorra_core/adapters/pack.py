"""A sample pack: the value that fixes M functions of one adapted model.

Holds tensors, and functions of activations that a method may bring along. It knows nothing of
methods, random streams or Hugging Face models.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from dalorra_core.errors import ConfigError

__all__ = [
    "GrowingTransform",
    "MaybePositionless",
    "ModulePack",
    "PerRow",
    "RowContext",
    "SamplePack",
    "Transform",
    "fold",
    "unfold",
]


@runtime_checkable
class Transform(Protocol):
    """A function of activations at one place of an adapted layer, for all M samples.

    In prediction, what it does to a token may depend on the sample, the token's position and its
    activation, never on the other rows of the batch: an answer does not depend on its company. In
    training it may also depend on the row's place, as noise that each row has for itself does.
    """

    def __call__(self, x: Tensor) -> Tensor:
        """Return the transformed activations (M, B, ..., k), in the dtype of ``x``."""
        ...

    def narrow(self, start: int, stop: int) -> "Transform":
        """Return the transform of samples ``start`` to ``stop - 1``."""
        ...

    def to(self, device: torch.device, dtype: torch.dtype) -> "Transform":
        """Return the same transform with its tensors there."""
        ...

    def tensors(self) -> Sequence[Tensor]:
        """Return what it keeps in memory."""
        ...


@runtime_checkable
class GrowingTransform(Transform, Protocol):
    """A transform that keeps more when it meets a longer row."""

    def bytes_to_come(self, length: int) -> int:
        """Return what it will keep beside its tensors once a row of this many tokens was there."""
        ...


@runtime_checkable
class MaybePositionless(Transform, Protocol):
    """A transform that may treat all positions alike.

    It does where its noise is a token's own in every pass, or one for all tokens: what it does to a
    token then has the same distribution wherever the token stands, and it may be shown some of them
    only.
    """

    @property
    def positionless(self) -> bool:
        """Whether this one does."""
        ...


@dataclass(frozen=True)
class ModulePack:
    """The factors of one adapted module for all M samples.

    The layer computes ``s * B core(z * (A before(h) + beside(h)))``.

    Attributes:
        lora_A: Down factors, (1, r, d_in) when all samples share them, else (M, r, d_in).
        lora_B: Up factors, (1, d_out, r) or (M, d_out, r).
        z: Rank gates (M, r), (1, r) when all samples share them, or (M, B, r) where each row has
            its own: hard in {0, 1}, relaxed in (0, 1), or any real scale; None stands for all ones.
        before: Applied to the module's inputs, such as dropout.
        beside: Added to the rank features, such as noise of its own on every token.
        core: Applied to the gated rank features.
    """

    lora_A: Tensor  # noqa: N815  PEFT's name, and the key in the artifact
    lora_B: Tensor  # noqa: N815
    z: Tensor | None = None
    before: Transform | None = None
    beside: Transform | None = None
    core: Transform | None = None

    @property
    def transforms(self) -> Iterator[Transform]:
        """The transforms that are there."""
        return (t for t in (self.before, self.beside, self.core) if t is not None)

    @cached_property
    def shared(self) -> bool:
        """Whether the module is one function, the same for all samples, and shows it."""
        parts = (self.lora_A, self.lora_B, self.z)
        return all(t is None or len(t) == 1 for t in parts) and not any(self.transforms)


@dataclass(frozen=True)
class RowContext:
    """What a pack may know of the rows before the forward pass begins.

    Attributes:
        embed: Works ``mean_embedding`` out; asked at most once.
        is_token: (B, T) bool, False for padding. Activations may be longer than T, where other
            rows share the forward pass; what is beyond is padding.
    """

    embed: Callable[[], Tensor]
    is_token: Tensor

    @cached_property
    def mean_embedding(self) -> Tensor:
        """(B, d) mean of the frozen input embeddings over the row's tokens, float32."""
        return self.embed()


@runtime_checkable
class PerRow(Protocol):
    """Completes the modules of a pack once the rows are known, such as gates of each prompt."""

    def __call__(
        self, modules: Mapping[str, ModulePack], context: RowContext
    ) -> Mapping[str, ModulePack]:
        """Return the modules for these rows."""
        ...

    def narrow(self, start: int, stop: int) -> "PerRow":
        """Return the same for samples ``start`` to ``stop - 1``."""
        ...

    def to(self, device: torch.device, dtype: torch.dtype) -> "PerRow":
        """Return the same with its tensors there."""
        ...

    def tensors(self) -> Sequence[Tensor]:
        """Return what it keeps in memory."""
        ...


@dataclass(frozen=True)
class SamplePack:
    """The adapter of M samples, ready to be lent to the layers.

    Attributes:
        num_samples: M, at least 1.
        scaling: lora_alpha / r; never depends on the gates.
        modules: Module name to its factors.
        per_row: What depends on the rows; ``for_rows`` settles it.
    """

    num_samples: int
    scaling: float
    modules: Mapping[str, ModulePack]
    per_row: PerRow | None = None

    def __post_init__(self) -> None:
        """Refuse a pack whose tensors disagree with M."""
        if self.num_samples < 1:
            raise ConfigError(f"num_samples must be at least 1, got {self.num_samples}")
        for name, module in self.modules.items():
            factors = (("a factor", module.lora_A), ("a factor", module.lora_B))
            for part, tensor in (("z", module.z), *factors):
                if tensor is not None and len(tensor) not in {1, self.num_samples}:
                    raise ConfigError(
                        f"module {name}: {part} holds {len(tensor)} samples; "
                        f"allowed are 1 and {self.num_samples}"
                    )

    def to(self, device: torch.device, dtype: torch.dtype) -> "SamplePack":
        """Return the same pack with every tensor on ``device`` in ``dtype``."""

        def moved(transform: Transform | None) -> Transform | None:
            return None if transform is None else transform.to(device, dtype)

        modules = {
            name: ModulePack(
                lora_A=m.lora_A.to(device, dtype),
                lora_B=m.lora_B.to(device, dtype),
                z=None if m.z is None else m.z.to(device, dtype),
                before=moved(m.before),
                beside=moved(m.beside),
                core=moved(m.core),
            )
            for name, m in self.modules.items()
        }
        per_row = None if self.per_row is None else self.per_row.to(device, dtype)
        return SamplePack(self.num_samples, self.scaling, modules, per_row)

    def narrow(self, start: int, stop: int) -> "SamplePack":
        """Return samples ``start`` to ``stop - 1`` as a pack of their own."""

        def cut(x: Tensor) -> Tensor:
            return x if x.shape[0] == 1 and self.num_samples > 1 else x[start:stop]

        def part(transform: Transform | None) -> Transform | None:
            return None if transform is None else transform.narrow(start, stop)

        modules = {
            name: ModulePack(
                lora_A=cut(m.lora_A),
                lora_B=cut(m.lora_B),
                z=None if m.z is None else cut(m.z),
                before=part(m.before),
                beside=part(m.beside),
                core=part(m.core),
            )
            for name, m in self.modules.items()
        }
        per_row = None if self.per_row is None else self.per_row.narrow(start, stop)
        return SamplePack(stop - start, self.scaling, modules, per_row)

    def condensed(self) -> "SamplePack":
        """Return the same samples; gates of a module that are equal in all of them are kept once.

        Layers whose modules are all ``shared`` need to run once, not M times.
        """

        def once(module: ModulePack) -> ModulePack:
            z = module.z
            if z is None or z.dim() != 2 or not bool((z == z[:1]).all()):  # noqa: PLR2004  (M, r)
                return module
            return replace(module, z=z[:1])

        if self.per_row is not None:
            return self
        return replace(self, modules={name: once(m) for name, m in self.modules.items()})

    def for_rows(self, context: RowContext) -> "SamplePack":
        """Return the pack for these rows; nothing of it depends on other rows any more."""
        if self.per_row is None:
            return self
        return replace(self, modules=self.per_row(self.modules, context), per_row=None)

    def tensors(self) -> Iterator[Tensor]:
        """Yield all tensors; factors that samples share are the adapter's own."""
        for module in self.modules.values():
            yield from (t for t in (module.lora_A, module.lora_B, module.z) if t is not None)
            for transform in module.transforms:
                yield from transform.tensors()
        if self.per_row is not None:
            yield from self.per_row.tensors()

    def bytes_to_come(self, length: int) -> int:
        """Return what its transforms will keep beside ``tensors`` for rows of this many tokens."""
        return sum(
            transform.bytes_to_come(length)
            for module in self.modules.values()
            for transform in module.transforms
            if isinstance(transform, GrowingTransform)
        )


def fold(x: Tensor, num_samples: int) -> Tensor:
    """Repeat a batch once per sample: (B, ...) to (M*B, ...), row m*B + b."""
    return x.repeat(num_samples, *([1] * (x.dim() - 1)))


def unfold(x: Tensor, num_samples: int) -> Tensor:
    """Undo the folding of rows: (M*B, ...) to (M, B, ...)."""
    return x.view(num_samples, len(x) // num_samples, *x.shape[1:])
