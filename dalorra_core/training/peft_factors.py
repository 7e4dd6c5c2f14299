"""The factors of a PEFT LoRA for the modules of a base model, under their artifact names."""

import math
from pathlib import Path

import torch
from torch import Tensor, nn

from dalorra_core.adapters.inject import (
    LM_HEAD,
    TargetSpec,
    linear_layers,
    lm_head_name_of,
    lm_head_of,
)
from dalorra_core.adapters.plain_lora import PlainLora, trimmed
from dalorra_core.artifact.peft_io import copied_weights, read_peft
from dalorra_core.config import AdapterConfig
from dalorra_core.errors import BaseModelError, ConfigError

__all__ = ["factors_for", "read_lora", "specs_of", "starting_factors"]


def read_lora(directory: Path, model: nn.Module) -> PlainLora:
    """Return the LoRA of a PEFT directory, without ranks that do nothing.

    Args:
        directory: Of unknown origin.
        model: The base model that it is for.

    Raises:
        ArtifactError: See ``read_peft``.
        BaseModelError: It holds a weight of the base model that is not this one's.
    """
    lora = trimmed(read_peft(directory))
    weights = dict(model.named_parameters(remove_duplicate=False))
    for name, copy in copied_weights(directory).items():
        own = weights.get(f"{name}.weight")
        # compared at the lower precision of the two: either may be stored in bfloat16
        if own is None or own.shape != copy.shape or not _same(own.detach().cpu(), copy):
            raise BaseModelError(
                f"{directory} holds a weight of the base model, {name}, that is not this base "
                "model's: it belongs to another one, or was trained too"
            )
    return lora


def _same(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one.to(other.dtype), other) or torch.equal(one, other.to(one.dtype))


def specs_of(model: nn.Module, lora: PlainLora, num_labels: int) -> tuple[TargetSpec, ...]:
    """Return the modules that a LoRA adapts, in forward order, ``lm_head`` cut to its label rows.

    Args:
        model: The base model.
        lora: Module paths as the model has them.
        num_labels: C.

    Raises:
        BaseModelError: It has none of that name in its layers, or of another shape.
    """
    name, head = lm_head_name_of(model), lm_head_of(model)
    specs = [spec for spec in linear_layers(model) if spec.name in lora.modules]
    shapes = {spec.name: (spec.d_in, spec.d_out) for spec in specs}
    if name in lora.modules:
        specs.append(TargetSpec(LM_HEAD, head.in_features, num_labels, None))
        shapes[name] = (head.in_features, head.out_features)
    if missing := sorted(lora.modules.keys() - shapes.keys()):
        raise BaseModelError(
            f"the base model has no linear layer {missing[0]!r} to adapt"
            + (f" (nor {len(missing) - 1} more)" if len(missing) > 1 else "")
        )
    for module, factors in lora.modules.items():
        found = (factors.down.shape[1], factors.up.shape[0])
        if found != shapes[module]:
            raise BaseModelError(
                f"module {module!r} of the base model has (d_in, d_out) {shapes[module]}, the "
                f"LoRA's has {found}"
            )
    return tuple(specs)


def factors_for(
    model: nn.Module, lora: PlainLora, specs: tuple[TargetSpec, ...], token_ids: tuple[int, ...]
) -> dict[str, Tensor]:
    """Return a LoRA's factors under their artifact names; of a head, the label rows.

    A question is answered over its labels, so what the LoRA does to other tokens is never seen.

    Args:
        model: The base model.
        lora: Of these modules.
        specs: From ``specs_of``.
        token_ids: Token of each label.
    """
    params = {}
    for spec in specs:
        name = lm_head_name_of(model) if spec.name == LM_HEAD else spec.name
        factors = lora.modules[name]
        up = factors.up[list(token_ids)] if spec.name == LM_HEAD else factors.up
        params[f"{spec.name}.lora_A"], params[f"{spec.name}.lora_B"] = factors.down, up
    return params


def starting_factors(
    adapter: AdapterConfig,
    model: nn.Module,
    specs: tuple[TargetSpec, ...],
    token_ids: tuple[int, ...],
) -> dict[str, Tensor] | None:
    """Return the factors that a run starts from, where its settings name a LoRA.

    Args:
        adapter: Settings of the run.
        model: Its base model.
        specs: Its adapted modules.
        token_ids: Token of each label.

    Raises:
        ArtifactError: See ``read_peft``.
        BaseModelError: The LoRA is not of this base model.
        ConfigError: It has another rank, scale or other modules than the run; names both.
    """
    if adapter.start is None:
        return None
    lora = read_lora(Path(adapter.start), model)
    own = specs_of(model, lora, len(token_ids))
    alpha, names = lora.scaling * lora.r, ([s.name for s in own], [s.name for s in specs])
    for name, there, here, same in (
        ("r", lora.r, adapter.r, lora.r == adapter.r),
        ("lora_alpha", alpha, adapter.lora_alpha, math.isclose(alpha, adapter.lora_alpha)),
        ("target_modules", *names, names[0] == names[1]),
    ):
        if not same:
            raise ConfigError(
                f"adapter.{name} must be that of adapter.start {adapter.start}, {there}, got {here}"
            )
    return factors_for(model, lora, specs, token_ids)
