"""Put adapted layers into a Hugging Face causal LM. The only file that walks such a model."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from dalorra_core.adapters.binding import Binding
from dalorra_core.adapters.linear import AdaptedLinear
from dalorra_core.errors import BaseModelError, ConfigError

__all__ = [
    "LM_HEAD",
    "TargetSpec",
    "count_parameters",
    "decoder_of",
    "find_targets",
    "inject",
    "linear_layers",
    "lm_head_name_of",
    "lm_head_of",
    "num_layers_of",
]

LM_HEAD = "lm_head"
"""Name of the output projection as an adapted module, whatever the model calls it."""

_LAYER_NUMBER = re.compile(r"\.layers\.(\d+)\.")


@dataclass(frozen=True)
class TargetSpec:
    """One module to adapt.

    Attributes:
        name: Its path in the model, or ``lm_head``.
        d_in: Input features.
        d_out: Output features; for ``lm_head`` the vocabulary size.
        layer: Decoder layer number, None for ``lm_head``.
    """

    name: str
    d_in: int
    d_out: int
    layer: int | None


def decoder_of(model: nn.Module) -> nn.Module:
    """Return the part of a causal LM that ends in the last hidden states."""
    decoder = model.base_model
    if decoder is model or not isinstance(decoder, nn.Module):
        raise ConfigError(f"{type(model).__name__} has no decoder apart from its output head")
    return decoder


def lm_head_of(model: Any) -> nn.Linear:
    """Return the output projection of a causal LM."""
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        raise ConfigError(
            f"{type(model).__name__} has no linear output projection (found {type(head).__name__})"
        )
    return head


def lm_head_name_of(model: nn.Module) -> str:
    """Return what a causal LM calls its output projection, as a path in the model."""
    head = lm_head_of(model)
    return next(name for name, module in model.named_modules() if module is head)


def num_layers_of(model: nn.Module) -> int:
    """Return the number of decoder layers, counted from the module paths."""
    matches = (_LAYER_NUMBER.search(f".{name}.") for name, _ in model.named_modules())
    return max((int(m[1]) for m in matches if m), default=-1) + 1


def find_targets(
    model: nn.Module, target_modules: Sequence[str], layers: tuple[int, int] | None = None
) -> list[TargetSpec]:
    """List the modules that ``target_modules`` names, in forward order, ``lm_head`` last.

    Args:
        model: A causal LM; weights may be on the meta device.
        target_modules: Last components of module paths, such as ``q_proj``; ``lm_head`` names
            the output projection.
        layers: First and last decoder layer to adapt (both included, from 0); None for all.

    Raises:
        ConfigError: If a name matches no linear layer or the layer range is empty.
    """
    wanted = [t for t in target_modules if t != LM_HEAD]
    total = num_layers_of(model)
    first, last = layers if layers is not None else (0, total - 1)
    if not 0 <= first <= last < total:
        raise ConfigError(
            f"adapter.layers must satisfy 0 <= first <= last <= {total - 1} for this base model, "
            f"got {first}..{last}"
        )
    found = [s for s in linear_layers(model) if s.name.rpartition(".")[2] in wanted]
    matched = {s.name.rpartition(".")[2] for s in found}
    if missing := sorted(set(wanted) - matched):
        known = sorted({s.name.rpartition(".")[2] for s in linear_layers(model)} | {LM_HEAD})
        raise ConfigError(
            f"adapter.target_modules names {', '.join(missing)}, which this base model does not "
            f"have; it has {', '.join(known)}"
        )
    specs = [s for s in found if s.layer is not None and first <= s.layer <= last]
    if LM_HEAD in target_modules:
        head = lm_head_of(model)
        specs.append(TargetSpec(LM_HEAD, head.in_features, head.out_features, None))
    return specs


def linear_layers(model: nn.Module) -> Iterator[TargetSpec]:
    """Yield the model's own linear layers, whether another adapter has adapted them or not."""
    adapted = {id(m.base) for m in model.modules() if isinstance(m, AdaptedLinear)}
    for name, module in model.named_modules():
        number = _LAYER_NUMBER.search(f".{name}.")
        linear = module.base if isinstance(module, AdaptedLinear) else module
        if number and isinstance(linear, nn.Linear) and id(module) not in adapted:
            yield TargetSpec(name, linear.in_features, linear.out_features, int(number[1]))


def inject(model: nn.Module, specs: Sequence[TargetSpec], binding: Binding) -> None:
    """Replace every decoder module of ``specs`` by an adapted layer; changes ``model``.

    A layer that is adapted already stays as it is: with nothing bound for it, it is exactly its
    base layer, so one model serves any number of adapters. ``lm_head`` is left alone: it is often
    tied to the input embedding, and only the label rows of an adapter are ever used
    (predictive/label_head.py applies them).

    Args:
        model: A causal LM.
        specs: Modules of one adapter.
        binding: Through which packs are lent to the new layers; the same one at every call.

    Raises:
        BaseModelError: A module is no linear layer of this model, or has another shape or layer
            number than its spec says. Nothing has been replaced then.
    """
    wanted = [spec for spec in specs if spec.name != LM_HEAD]
    layers = [_layer_named(model, spec) for spec in wanted]
    for spec, layer in zip(wanted, layers, strict=True):
        if not isinstance(layer, AdaptedLinear):
            parent, _, child = spec.name.rpartition(".")
            setattr(model.get_submodule(parent), child, AdaptedLinear(layer, spec.name, binding))


def _layer_named(model: nn.Module, spec: TargetSpec) -> nn.Linear | AdaptedLinear:
    """Return the layer that a spec names."""
    layer: nn.Module = model
    for part in spec.name.split("."):
        # What lies inside an adapted layer is no module of the base model.
        inside = {} if isinstance(layer, AdaptedLinear) else dict(layer.named_children())
        if part not in inside:
            raise BaseModelError(f"the base model has no module {spec.name!r} to adapt")
        layer = inside[part]
    if not isinstance(layer, nn.Linear | AdaptedLinear):
        raise BaseModelError(
            f"module {spec.name!r} of the base model must be a linear layer to be adapted, "
            f"got {type(layer).__name__}"
        )
    linear = layer.base if isinstance(layer, AdaptedLinear) else layer
    number = _LAYER_NUMBER.search(f".{spec.name}.")
    found = (linear.in_features, linear.out_features, int(number[1]) if number else None)
    if found != (spec.d_in, spec.d_out, spec.layer):
        raise BaseModelError(
            f"module {spec.name!r} of the base model has (d_in, d_out, layer) {found}, "
            f"the adapter's has {(spec.d_in, spec.d_out, spec.layer)}"
        )
    return layer


def count_parameters(specs: Sequence[TargetSpec], r: int) -> int:
    """Return the number of LoRA parameters: the sum over modules of r * (d_in + d_out).

    ``lm_head`` counts all vocabulary rows, as published tables do, although classification
    trains and stores its label rows only.
    """
    return sum(r * (s.d_in + s.d_out) for s in specs)
