"""Explicit state of one adapter, and the LoRA factors every method starts from."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dalorra_core.adapters.inject import LM_HEAD, TargetSpec
from dalorra_core.adapters.pack import ModulePack
from dalorra_core.sampling.designs import uniform_weights

__all__ = [
    "AdapterState",
    "Shapes",
    "factor_shapes",
    "init_factors",
    "label_rows_only",
    "module_packs",
]

Shapes = Mapping[str, tuple[int, ...]]
"""Tensor name to shape."""


@dataclass(frozen=True)
class AdapterState:
    """What a method's functions work on: which modules, at what scale, and the tensors.

    Attributes:
        specs: Adapted modules in forward order; row l of every stacked tensor is specs[l].
        r: Rank.
        scaling: lora_alpha / r.
        params: Flat mapping: ``<module>.lora_A`` (r, d_in), ``<module>.lora_B`` (d_out, r), and
            the method's own, such as ``phi`` (L, r). float32.
    """

    specs: tuple[TargetSpec, ...]
    r: int
    scaling: float
    params: Mapping[str, Tensor]


def label_rows_only(specs: Sequence[TargetSpec], num_labels: int) -> tuple[TargetSpec, ...]:
    """Return ``specs`` with ``lm_head`` cut to its C label rows, the only ones that are trained.

    The loss normalises over the label subset, so every other row of lm_head's B keeps a zero
    gradient and stays at its initial zero for ever (docs/method.md, section 3).
    """
    return tuple(
        TargetSpec(s.name, s.d_in, num_labels, None) if s.name == LM_HEAD else s for s in specs
    )


def factor_shapes(specs: Sequence[TargetSpec], r: int) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the LoRA factors of all modules, under their artifact names."""
    shapes: dict[str, tuple[int, ...]] = {}
    for spec in specs:
        shapes[f"{spec.name}.lora_A"] = (r, spec.d_in)
        shapes[f"{spec.name}.lora_B"] = (spec.d_out, r)
    return shapes


def init_factors(specs: Sequence[TargetSpec], r: int, seed: int) -> dict[str, Tensor]:
    """Return LoRA's initial factors: A uniform in +-1/sqrt(d_in), B zero.

    Each A comes from a stream of its own name, so adding a module changes no other module.

    Args:
        specs: Modules to adapt, ``lm_head`` already cut to its label rows.
        r: Rank.
        seed: Run seed.

    Returns:
        ``<module>.lora_A`` (r, d_in) and ``<module>.lora_B`` (d_out, r), float32.
    """
    params: dict[str, Tensor] = {}
    for spec in specs:
        key = ("init", seed, spec.name, "lora_A")
        params[f"{spec.name}.lora_A"] = uniform_weights(key, (r, spec.d_in), spec.d_in)
        params[f"{spec.name}.lora_B"] = torch.zeros(spec.d_out, r)
    return params


def module_packs(state: AdapterState, z: Tensor | None) -> dict[str, ModulePack]:
    """Return every module's shared factors with its own gates.

    Args:
        state: The adapter.
        z: Gates (M, L, r), or None for all ones.
    """
    return {
        spec.name: ModulePack(
            lora_A=state.params[f"{spec.name}.lora_A"].unsqueeze(0),  # (1, r, d_in)
            lora_B=state.params[f"{spec.name}.lora_B"].unsqueeze(0),  # (1, d_out, r)
            z=None if z is None else z[:, i],  # (M, r)
        )
        for i, spec in enumerate(state.specs)
    }
