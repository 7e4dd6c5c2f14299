"""DALorRA with gates of each prompt, known before the forward pass; a form of our own.

The mean of a prompt's frozen input embeddings gives K features; every adapted module adds a linear
function of them to its global logits. One prompt has one set of gates for all of its tokens, so a
sample is one function of the text. Equation numbers are those of docs/method.md, section 9.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

import torch
import torch.nn.functional as F  # noqa: N812
from pydantic import Field
from torch import Tensor

from dalorra_core.adapters.inject import LM_HEAD, TargetSpec
from dalorra_core.adapters.pack import ModulePack, RowContext, SamplePack
from dalorra_core.adapters.state import (
    AdapterState,
    Shapes,
    factor_shapes,
    init_factors,
    module_packs,
)
from dalorra_core.config import OptimConfig
from dalorra_core.errors import ConfigError
from dalorra_core.methods.amortised import AmortisedSettings, gate_divergences, gate_groups
from dalorra_core.methods.dalorra import (
    PHI,
    GateKind,
    gate_summary,
    gate_uniforms,
    gates_of,
    prior_logits,
)
from dalorra_core.methods.method import Draw, Method, ParamGroup, TrainingPoint, every_design
from dalorra_core.objectives.elbo import KlTerm
from dalorra_core.objectives.kl import gate_kl
from dalorra_core.sampling.streams import normals

__all__ = ["GATE_IN", "GATE_OUT", "METHOD", "AmortisedPromptConfig", "prompt_logits"]

GATE_IN = "gate_in"
"""Name of the learned projection of the embeddings, (K, d)."""

GATE_OUT = "gate_out"
"""Name of the modules' linear functions of the features, (L, r, K)."""

_LEAST_VARIANCE = 1e-12
"""Keeps a mean embedding of equal numbers finite; input embeddings may have variances of 1e-4."""


class AmortisedPromptConfig(AmortisedSettings, frozen=True):
    """Amortised gates, by prompt: the input's mean embedding shifts the gate logits."""

    name: Literal["amortised_prompt"] = "amortised_prompt"
    projection: Literal["frozen", "learned"] = Field(
        default="frozen",
        description="From the embeddings to the features: frozen is random, named by its sizes and "
        "not stored; learned is trained.",
    )


def _embedding_width(specs: Sequence[TargetSpec]) -> int:
    """Return d as far as the adapted modules tell: what lm_head, or else the first one, reads."""
    heads = [spec for spec in specs if spec.name == LM_HEAD]
    return (heads or list(specs))[0].d_in


def _shapes(specs: Sequence[TargetSpec], r: int, config: AmortisedPromptConfig) -> Shapes:
    own: dict[str, tuple[int, ...]] = {
        PHI: (len(specs), r),
        GATE_OUT: (len(specs), r, config.width),
    }
    if config.projection == "learned":
        own[GATE_IN] = (config.width, _embedding_width(specs))
    return factor_shapes(specs, r) | own


def _init(
    specs: Sequence[TargetSpec], r: int, seed: int, config: AmortisedPromptConfig
) -> dict[str, Tensor]:
    own = {
        PHI: prior_logits(len(specs), r, config),
        GATE_OUT: torch.zeros(len(specs), r, config.width),
    }
    if config.projection == "learned":
        size = (config.width, _embedding_width(specs))
        own[GATE_IN] = _projection(("init", seed, GATE_IN), *size).float()
    return init_factors(specs, r, seed) | own


def _projection(key: tuple[str | int, ...], width: int, d: int) -> Tensor:
    """Return (K, d) in float64: features of a normalised embedding have variance 1."""
    draw = normals(key, width * d) / math.sqrt(d)
    with torch.inference_mode(mode=False):  # it may be kept beyond the pass that made it
        return torch.from_numpy(draw).view(width, d)


@lru_cache(maxsize=4)
def _frozen_projection(width: int, d: int) -> Tensor:
    return _projection(("amortised_prompt", "projection", width, d), width, d)


@dataclass(frozen=True)
class _PromptGates:
    """The gates of each row of a batch; a ``PerRow``.

    Attributes:
        phi: Global logits (L, r).
        gate_out: (L, r, K).
        gate_in: (K, d), or None for the frozen projection.
        uniforms: (M, L, r) in float64, or None for the keep probabilities.
        kind: How gates come from logits.
        tau: Relaxation temperature.
        dtype: In which logits are worked out. In prediction float64, so that no rounding that
            depends on a row's company turns a hard gate.
        noting: Leave the logits with the modules, for the divergence.
    """

    phi: Tensor
    gate_out: Tensor
    gate_in: Tensor | None
    uniforms: Tensor | None
    kind: GateKind
    tau: float
    dtype: torch.dtype
    noting: bool = False

    def __call__(
        self, modules: Mapping[str, ModulePack], context: RowContext
    ) -> Mapping[str, ModulePack]:
        """Return the modules with gates (M, B, r)."""
        with torch.autocast(context.is_token.device.type, enabled=False):
            logits = self.logits(context)  # (B, L, r)
            uniforms = None if self.uniforms is None else self.uniforms.unsqueeze(1)
            z = gates_of(logits, uniforms, self.kind, self.tau).to(self.phi.dtype)
        z = z.unsqueeze(0) if uniforms is None else z  # (M, B, L, r)
        return {
            name: replace(
                module,
                z=z[:, :, i],
                core=_RowLogits(logits[:, i]) if self.noting else None,
            )
            for i, (name, module) in enumerate(modules.items())
        }

    def logits(self, context: RowContext) -> Tensor:
        """Return the gate logits of every row, (B, L, r).

        Source:
            docs/method.md, eq. (A1).
        """
        mean = context.mean_embedding.to(self.dtype)  # (B, d)
        width, d = self.gate_out.shape[2], mean.shape[1]
        projection = _frozen_projection(width, d) if self.gate_in is None else self.gate_in
        if projection.shape[1] != d:
            raise ConfigError(
                f"the base model's embeddings have width {d}, the adapted modules read "
                f"{projection.shape[1]}: with these modules method.projection must be frozen"
            )
        normed = F.layer_norm(mean, (d,), eps=_LEAST_VARIANCE)
        features = F.relu(normed @ projection.to(mean.device, self.dtype).T)  # (B, K)
        deviation = torch.einsum("lrk,bk->blr", self.gate_out.to(self.dtype), features)
        return self.phi.to(self.dtype) + deviation

    def narrow(self, start: int, stop: int) -> "_PromptGates":
        """Return the gates of some samples."""
        return replace(self, uniforms=None if self.uniforms is None else self.uniforms[start:stop])

    def to(self, device: torch.device, dtype: torch.dtype) -> "_PromptGates":
        """Return the same there; uniforms stay float64, or hard gates would be others."""
        return replace(
            self,
            phi=self.phi.to(device, dtype),
            gate_out=self.gate_out.to(device, dtype),
            gate_in=None if self.gate_in is None else self.gate_in.to(device, dtype),
            uniforms=None if self.uniforms is None else self.uniforms.to(device),
        )

    def tensors(self) -> Sequence[Tensor]:
        """Return what it holds."""
        held = (self.phi, self.gate_out, self.gate_in, self.uniforms)
        return [t for t in held if t is not None]


@dataclass(frozen=True)
class _RowLogits:
    """Changes nothing; keeps the logits (B, r) behind a module's gates for the divergence."""

    logits: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """Return the activations as they are."""
        return x

    def narrow(self, start: int, stop: int) -> "_RowLogits":  # noqa: ARG002
        """Return itself: the samples share the logits."""
        return self

    def to(self, device: torch.device, dtype: torch.dtype) -> "_RowLogits":
        """Return the same there."""
        return replace(self, logits=self.logits.to(device, dtype))

    def tensors(self) -> Sequence[Tensor]:
        """Return the logits."""
        return (self.logits,)


def _gates(
    state: AdapterState, config: AmortisedPromptConfig, draw: Draw | None, kind: GateKind
) -> _PromptGates:
    phi = state.params[PHI]
    uniforms = None if draw is None else gate_uniforms(state, draw).to(phi.device)
    return _PromptGates(
        phi=phi,
        gate_out=state.params[GATE_OUT],
        gate_in=state.params.get(GATE_IN),
        uniforms=uniforms,
        kind=kind,
        tau=config.tau,
        dtype=torch.float64,
    )


def _pack(state: AdapterState, gates: _PromptGates, num_samples: int) -> SamplePack:
    return SamplePack(num_samples, state.scaling, module_packs(state, z=None), gates)


def _train_pack(state: AdapterState, config: AmortisedPromptConfig, draw: Draw) -> SamplePack:
    gates = _gates(state, config, draw, config.train_masks)
    gates = replace(gates, dtype=state.params[PHI].dtype, noting=True)
    return _pack(state, gates, draw.num_samples)


def _predict_pack(state: AdapterState, config: AmortisedPromptConfig, draw: Draw) -> SamplePack:
    return _pack(state, _gates(state, config, draw, config.test_masks), draw.num_samples)


def _mean_pack(state: AdapterState, config: AmortisedPromptConfig) -> SamplePack:
    return _pack(state, _gates(state, config, None, "mean"), 1)


def prompt_logits(
    state: AdapterState, config: AmortisedPromptConfig, context: RowContext
) -> Tensor:
    """Return the gate logits of every row, (B, L, r) in float64.

    Args:
        state: The adapter.
        config: Its settings.
        context: The rows.
    """
    return _gates(state, config, None, "mean").logits(context)


def _kl_terms(
    state: AdapterState, config: AmortisedPromptConfig, point: TrainingPoint, pack: SamplePack
) -> Mapping[str, KlTerm]:
    cores = [module.core for module in pack.modules.values()]
    logits = [core.logits for core in cores if isinstance(core, _RowLogits)]
    if len(logits) < len(cores):
        raise RuntimeError("the pack holds no logits of rows: it was not settled")
    of_gates = gate_kl(torch.stack(logits, dim=1), state.params[PHI])  # (B, L, r)
    return gate_divergences(state, config, point, of_gates.sum((1, 2)).mean())


def _param_groups(
    state: AdapterState, optim: OptimConfig, config: AmortisedPromptConfig
) -> tuple[ParamGroup, ...]:
    net = tuple(name for name in (GATE_IN, GATE_OUT) if name in state.params)
    return gate_groups(state, optim, config, net)


METHOD = Method(
    settings=AmortisedPromptConfig,
    stochastic=True,
    init=_init,
    shapes=_shapes,
    train_pack=_train_pack,
    predict_pack=_predict_pack,
    mean_pack=_mean_pack,
    designs=every_design,
    kl_terms=_kl_terms,
    param_groups=_param_groups,
    num_train_samples=lambda config: config.num_train_samples,
    summary=gate_summary,
)
