"""Plain LoRA: one function as two factors a module and one scale, as other programs keep it."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from dalorra_core.adapters.inject import LM_HEAD
from dalorra_core.adapters.pack import ModulePack, SamplePack
from dalorra_core.errors import ConfigError

__all__ = [
    "Factors",
    "PlainLora",
    "opened",
    "padded",
    "plain_loras",
    "trimmed",
    "why_not_plain",
    "with_full_head",
]


@dataclass(frozen=True)
class Factors:
    """The two matrices of one module.

    Attributes:
        down: A (r, d_in), float32.
        up: B (d_out, r), float32.
    """

    down: Tensor
    up: Tensor


@dataclass(frozen=True)
class PlainLora:
    """One function: every module adds ``scaling * up @ down @ h`` to its output.

    Attributes:
        r: Rank of every module, at least 1.
        scaling: lora_alpha / r, above 0.
        modules: Path in the model, or ``lm_head``, to factors.
    """

    r: int
    scaling: float
    modules: Mapping[str, Factors]


def why_not_plain(pack: SamplePack) -> str | None:
    """Return why the samples of a pack are more than two factors a module; None where they are not.

    Says what the pack holds, whatever method drew it.
    """
    if pack.per_row is not None:
        return "its gates or its noise depend on the question"
    for name, module in pack.modules.items():
        if module.z is not None and module.z.dim() != 2:  # noqa: PLR2004  (M, r)
            return f"each question has gates of its own at {name}"
        if module.before is not None:
            return f"it changes the inputs of {name} (dropout, as a rule)"
        if module.beside is not None:
            return f"each token has noise of its own at {name}"
        if module.core is not None:
            return f"it has a function between the factors of {name}"
    return None


def opened(pack: SamplePack) -> SamplePack:
    """Return the samples with every gate at one: the factors as they are."""
    modules = {name: replace(module, z=None) for name, module in pack.modules.items()}
    return replace(pack, modules=modules)


def plain_loras(pack: SamplePack) -> Iterator[PlainLora]:
    """Yield each of the M samples as plain LoRA; gates are multiplied into the columns of B.

    Raises:
        ConfigError: A sample is more than that; see ``why_not_plain``.
    """
    reason = why_not_plain(pack)
    if reason is not None:
        raise ConfigError(f"a pack of plain LoRA has factors and gates only; here {reason}")
    for m in range(pack.num_samples):
        modules = {name: _factors(module, m) for name, module in pack.modules.items()}
        r = next(iter(modules.values())).down.shape[0]
        yield PlainLora(r, pack.scaling, modules)


def _factors(module: ModulePack, m: int) -> Factors:
    down = module.lora_A[m if len(module.lora_A) > 1 else 0]  # (r, d_in)
    up = module.lora_B[m if len(module.lora_B) > 1 else 0]  # (d_out, r)
    if module.z is not None:
        up = up * module.z[m if len(module.z) > 1 else 0]
    return Factors(down.detach().float().cpu(), up.detach().float().cpu())


def padded(lora: PlainLora, ranks: Sequence[int]) -> PlainLora:
    """Return the same function at the least of ``ranks`` that holds it, at the same scale.

    The new rows of A and columns of B are zero.

    Args:
        lora: Of any rank.
        ranks: Allowed ranks, ascending.

    Raises:
        ConfigError: All of them are below its rank.
    """
    found = next((r for r in ranks if r >= lora.r), None)
    if found is None:
        raise ConfigError(f"the rank must be at most {max(ranks)} to be exported, got {lora.r}")
    return replace(
        lora, r=found, modules={name: _grown(f, found) for name, f in lora.modules.items()}
    )


def _grown(factors: Factors, r: int) -> Factors:
    more = r - factors.down.shape[0]
    return Factors(F.pad(factors.down, (0, 0, 0, more)), F.pad(factors.up, (0, more)))


def trimmed(lora: PlainLora) -> PlainLora:
    """Return the same function without ranks that are zero in both factors.

    Such ranks come from padding. Their gradients are zero too, so training would never use them.
    """
    kept = {}
    for name, factors in lora.modules.items():
        alive = factors.down.any(1) | factors.up.any(0)  # (r,)
        kept[name] = Factors(factors.down[alive], factors.up[:, alive])
    r = max(1, *(f.down.shape[0] for f in kept.values()))
    return replace(lora, r=r, modules={name: _grown(f, r) for name, f in kept.items()})


def with_full_head(
    lora: PlainLora, token_ids: Sequence[int], num_tokens: int, name: str
) -> PlainLora:
    """Return the same function with B of the output projection over the whole vocabulary.

    Args:
        lora: Its ``lm_head``, where it has one, has a row of B for each label.
        token_ids: Token of each label.
        num_tokens: V, rows of the output projection; all but the labels' become zero.
        name: What the model calls its output projection.
    """
    modules = dict(lora.modules)
    head = modules.pop(LM_HEAD, None)
    if head is None:
        return lora
    up = torch.zeros(num_tokens, lora.r)
    up[list(token_ids)] = head.up
    return replace(lora, modules={**modules, name: Factors(head.down, up)})
