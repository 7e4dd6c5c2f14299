"""DALorRA with gates of each token, read from its rank features; a form of our own.

A small net of each adapted module reads u = A h of one token and adds a deviation to the module's
global logits. All tokens of a sample compare their probabilities with the same uniform numbers, so
a sample is one function of the text. Equation numbers are those of docs/method.md, section 9.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from dalorra_core.adapters.inject import TargetSpec
from dalorra_core.adapters.pack import SamplePack
from dalorra_core.adapters.state import (
    AdapterState,
    Shapes,
    factor_shapes,
    init_factors,
    module_packs,
)
from dalorra_core.config import OptimConfig
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
from dalorra_core.methods.token_notes import TellTokens, TokenNotes, notes_of, with_token_axis
from dalorra_core.objectives.elbo import KlTerm
from dalorra_core.objectives.kl import gate_kl
from dalorra_core.sampling.designs import uniform_weights

__all__ = ["METHOD", "AmortisedTokenConfig", "TokenGates"]

_NET = ("gate_in", "gate_in_bias", "gate_out", "gate_out_bias")


class AmortisedTokenConfig(AmortisedSettings, frozen=True):
    """Amortised gates, by token: every token's rank features shift the gate logits."""

    name: Literal["amortised_token"] = "amortised_token"


def _net_shapes(num_modules: int, r: int, width: int) -> dict[str, tuple[int, ...]]:
    """Return the shapes of all nets: r -> K, ReLU, K -> r; 2 r K + K + r numbers each."""
    return {
        "gate_in": (num_modules, width, r),
        "gate_in_bias": (num_modules, width),
        "gate_out": (num_modules, r, width),
        "gate_out_bias": (num_modules, r),
    }


def _shapes(specs: Sequence[TargetSpec], r: int, config: AmortisedTokenConfig) -> Shapes:
    own: dict[str, tuple[int, ...]] = {PHI: (len(specs), r)}
    return factor_shapes(specs, r) | own | _net_shapes(len(specs), r, config.width)


def _init(
    specs: Sequence[TargetSpec], r: int, seed: int, config: AmortisedTokenConfig
) -> dict[str, Tensor]:
    shapes = _net_shapes(len(specs), r, config.width)
    own = {name: torch.zeros(shape) for name, shape in shapes.items()}
    for name in ("gate_in", "gate_in_bias"):
        for i, spec in enumerate(specs):
            shape = tuple(own[name][i].shape)
            own[name][i] = uniform_weights(("init", seed, spec.name, name), shape, r)
    return init_factors(specs, r, seed) | {PHI: prior_logits(len(specs), r, config)} | own


@dataclass(frozen=True)
class TokenGates:
    """Multiplies the rank features of every token by gates that depend on them.

    Attributes:
        phi: Global logits (r,).
        gate_in: (K, r).
        gate_in_bias: (K,).
        gate_out: (r, K).
        gate_out_bias: (r,).
        uniforms: (M, r) in float64, the same for all tokens; None for the keep probabilities.
        kind: How gates come from logits.
        tau: Relaxation temperature.
        notes: Where the logits of every token are noted, (M, B, T, r); None: nowhere.
    """

    phi: Tensor
    gate_in: Tensor
    gate_in_bias: Tensor
    gate_out: Tensor
    gate_out_bias: Tensor
    uniforms: Tensor | None
    kind: GateKind
    tau: float
    notes: TokenNotes | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """Return the gated rank features (M, B, ..., r)."""
        with torch.autocast(x.device.type, enabled=False):
            u = x.to(self.phi.dtype)
            logits = self._logits(u)
            if self.notes is not None:
                self.notes.add(with_token_axis(logits))
            z = gates_of(logits, self._uniforms(x.dim()), self.kind, self.tau)
            return (z * u).to(x.dtype)

    def _logits(self, u: Tensor) -> Tensor:
        """Return the gate logits of every token.

        Source:
            docs/method.md, eq. (A3).
        """
        hidden = F.relu(F.linear(u, self.gate_in, self.gate_in_bias))  # (M, B, ..., K)
        return self.phi + F.linear(hidden, self.gate_out, self.gate_out_bias)

    def _uniforms(self, dims: int) -> Tensor | None:
        """Return the uniforms with as many axes as the activations, or None."""
        if self.uniforms is None:
            return None
        return self.uniforms.view(len(self.uniforms), *[1] * (dims - 2), -1)

    def keep_probs(self) -> Tensor:
        """Return the mean keep probabilities over each row's tokens, (B, r), as last noted.

        Raises:
            RuntimeError: Nothing was noted.
        """
        if self.notes is None:
            raise RuntimeError("these gates note nothing: their pack was not settled")
        return _mean_over_tokens(self.notes, self.notes.value.sigmoid()).mean(0)

    def noting(self, notes: TokenNotes) -> "TokenGates":
        """Return the same core with a sheet for what it notes."""
        return replace(self, notes=notes)

    def narrow(self, start: int, stop: int) -> "TokenGates":
        """Return the gates of some samples."""
        return replace(self, uniforms=None if self.uniforms is None else self.uniforms[start:stop])

    def to(self, device: torch.device, dtype: torch.dtype) -> "TokenGates":
        """Return the same there; uniforms stay float64, or hard gates would be others."""
        moved = {name: getattr(self, name).to(device, dtype) for name in (PHI, *_NET)}
        numbers = None if self.uniforms is None else self.uniforms.to(device)
        return replace(self, **moved, uniforms=numbers)

    def tensors(self) -> Sequence[Tensor]:
        """Return what it holds."""
        held = [getattr(self, name) for name in (PHI, *_NET, "uniforms")]
        return [t for t in held if t is not None]


def _mean_over_tokens(notes: TokenNotes, per_token: Tensor) -> Tensor:
    """Return the mean of (M, B, T, r) over the tokens of each row, (M, B, r)."""
    weights = notes.weights().unsqueeze(-1)  # (B, T, 1)
    return (per_token * weights).sum(2) / weights.sum(1)


def _pack(
    state: AdapterState, config: AmortisedTokenConfig, draw: Draw | None, kind: GateKind
) -> SamplePack:
    params = state.params
    drawn = None if draw is None else gate_uniforms(state, draw).to(params[PHI].device)
    modules = {
        name: replace(
            module,
            core=TokenGates(
                params[PHI][i],
                *(params[key][i] for key in _NET),
                uniforms=None if drawn is None else drawn[:, i],
                kind=kind,
                tau=config.tau,
            ),
        )
        for i, (name, module) in enumerate(module_packs(state, z=None).items())
    }
    return SamplePack(1 if draw is None else draw.num_samples, state.scaling, modules)


def _train_pack(state: AdapterState, config: AmortisedTokenConfig, draw: Draw) -> SamplePack:
    return replace(_pack(state, config, draw, config.train_masks), per_row=TellTokens())


def _predict_pack(state: AdapterState, config: AmortisedTokenConfig, draw: Draw) -> SamplePack:
    return _pack(state, config, draw, config.test_masks)


def _mean_pack(state: AdapterState, config: AmortisedTokenConfig) -> SamplePack:
    return replace(_pack(state, config, None, "mean"), per_row=TellTokens())


def _kl_terms(
    state: AdapterState, config: AmortisedTokenConfig, point: TrainingPoint, pack: SamplePack
) -> Mapping[str, KlTerm]:
    of_modules = [
        _mean_over_tokens(notes, gate_kl(notes.value, phi)).sum(-1)  # (S, B)
        for notes, phi in zip(notes_of(pack), state.params[PHI], strict=True)
    ]
    return gate_divergences(state, config, point, torch.stack(of_modules).sum(0).mean())


def _param_groups(
    state: AdapterState, optim: OptimConfig, config: AmortisedTokenConfig
) -> tuple[ParamGroup, ...]:
    return gate_groups(state, optim, config, _NET)


METHOD = Method(
    settings=AmortisedTokenConfig,
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
