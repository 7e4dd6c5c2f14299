"""C-LoRA: dW h = s B E(u) u with u = A h, where E(u) is a random r x r matrix that depends on u.

A small net of each adapted module reads the rank features u of one token and gives the mean and
the standard deviations of that token's matrix: E = E_mu(u) + Omega(u) o eps. Source: the published
method and its code, see docs/method.md, section 9.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F  # noqa: N812
from pydantic import Field
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
from dalorra_core.errors import ConfigError
from dalorra_core.methods.kl_bursts import KlCycleSettings, cycle_factor
from dalorra_core.methods.method import Draw, Method, ParamGroup, TrainingPoint, factors_and
from dalorra_core.methods.token_notes import TellTokens, TokenNotes, notes_of, with_token_axis
from dalorra_core.objectives.elbo import KlTerm, mean_nll
from dalorra_core.objectives.kl import normal_kl
from dalorra_core.sampling.designs import uniform_weights
from dalorra_core.sampling.token_normals import PositionNormals, RowNormals, TokenNormals

__all__ = ["METHOD", "CLoraConfig", "ContextualCore", "net_shapes"]

_PUBLISHED_KL_FACTOR = 1e-6
"""The published code multiplies the divergence by this, beside 1/L."""

_LARGEST_RANK = 64
"""A net of width H has more than 2 r^2 H parameters, and every token an r x r matrix."""

_NET = ("net_W1", "net_b1", "net_W2", "net_b2")


class CLoraConfig(KlCycleSettings, frozen=True):
    """C-LoRA: a random r x r matrix between A and B, given by a net that reads A h.

    The rank, adapter.r, is at most 64.
    """

    name: Literal["c_lora"] = "c_lora"
    width: int = Field(
        default=64, ge=1, le=1024, description="H: hidden units of each module's net."
    )
    prior_std: float = Field(
        default=0.2, gt=0, le=100, description="Prior standard deviation of every entry of E."
    )
    noise: Literal["token", "tied"] = Field(
        default="token",
        description="token: every token has noise of its own; tied: the tokens of a row share it, "
        "so that a sample is one function of the text.",
    )
    num_train_samples: int = Field(
        default=1, ge=1, le=64, description="S: draws of the noise per optimiser step."
    )
    nll_weight: float = Field(
        default=1.0,
        gt=0,
        le=1000,
        description="c_D: factor on the NLL; published 1 (ARC), 2 (WG-S, OBQA, BoolQ), 4 (WG-M).",
    )
    kl_scale: Literal["published", "per_example"] = Field(
        default="published",
        description="published: the sum over the rows of a step times 1e-6 / modules; per_example: "
        "the mean over rows (with a constant schedule, kl_weight 1 and nll_weight 1 the ELBO).",
    )
    kl_schedule: Literal["cyclic", "constant"] = Field(
        default="cyclic", description="cyclic: BLoB's burst at the end of each cycle."
    )
    kl_padding: bool = Field(
        default=False, description="Count padding in the KL, as the published code does."
    )
    net_lr: float = Field(
        default=0.01, gt=0, description="Peak learning rate of the nets, moved by plain SGD."
    )


def net_shapes(r: int, width: int) -> dict[str, tuple[int, ...]]:
    """Return the shapes of one module's net: r -> H, ReLU, H -> 2 r^2.

    In total H r + H + 2 r^2 (H + 1) numbers: 8,896 for r = 8 and H = 64.
    """
    out = 2 * r * r
    return dict(zip(_NET, ((width, r), (width,), (out, width), (out,)), strict=True))


@dataclass(frozen=True)
class ContextualCore:
    """Returns ``E(u) u`` for the rank features u of every token.

    Given u, the noise (Omega o eps) u of one token is Gaussian with independent entries of variance
    sum_j Omega_ij^2 u_j^2. Noise that no other token shares is drawn as that: r numbers for each
    token in place of r^2, and gradients that vary less. Tied noise needs the matrix itself.

    Attributes:
        net_W1: (H, r).
        net_b1: (H,).
        net_W2: (2 r^2, H); its first r^2 outputs are E_mu, row after row, the others g, and
            Omega = sigmoid(g)^2.
        net_b2: (2 r^2,).
        prior_std: Of every entry of E.
        normals: r numbers for each token, or r^2 for all tokens of a row; None: no noise.
        tied: The tokens of a row share their noise.
        notes: Where the KL of every token is noted, (M, B, T); None: nowhere.
    """

    net_W1: Tensor  # noqa: N815
    net_b1: Tensor
    net_W2: Tensor  # noqa: N815
    net_b2: Tensor
    prior_std: float
    normals: TokenNormals | None = None
    tied: bool = False
    notes: TokenNotes | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """Return E(u) u for rank features (M, B, ..., r)."""
        with torch.autocast(x.device.type, enabled=False):
            u = with_token_axis(x.to(self.net_W1.dtype))  # (M, B, T, r)
            mean, raw = self._matrices(u)
            out = (mean * u.unsqueeze(-2)).sum(-1)  # (M, B, T, r)
            if self.normals is not None:
                out = out + self._noise(u, raw, self.normals)
            if self.notes is not None:
                self.notes.add(self._kl(mean, raw))
        return out.view(x.shape).to(x.dtype)

    def _matrices(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Return E_mu and g, each (M, B, T, r, r)."""
        r = u.shape[-1]
        hidden = F.relu(F.linear(u, self.net_W1, self.net_b1))  # (M, B, T, H)
        out = F.linear(hidden, self.net_W2, self.net_b2).unflatten(-1, (2, r, r))
        return out[..., 0, :, :], out[..., 1, :, :]

    def _noise(self, u: Tensor, raw: Tensor, normals: TokenNormals) -> Tensor:
        """Return (Omega o eps) u, (M, B, T, r)."""
        rows, length, r = u.shape[1:]
        omega = raw.sigmoid().square()  # (M, B, T, r, r)
        eps = normals.of(rows, 1 if self.tied else length, u.device).to(u.dtype)
        if self.tied:
            return (omega * eps.unflatten(-1, (r, r)) * u.unsqueeze(-2)).sum(-1)
        variance = (omega * u.unsqueeze(-2)).square().sum(-1)  # (M, B, T, r)
        # A root has no derivative at 0, where features are exactly 0.
        return (variance + torch.finfo(torch.float32).tiny).sqrt() * eps

    def _kl(self, mean: Tensor, raw: Tensor) -> Tensor:
        """Return KL(N(E_mu, Omega^2) || N(0, prior_std^2)) of every token, (M, B, T)."""
        log_omega = 2 * F.logsigmoid(raw)
        return normal_kl(mean.flatten(-2), log_omega.flatten(-2), self.prior_std)

    def noting(self, notes: TokenNotes) -> "ContextualCore":
        """Return the same core with a sheet for what it notes."""
        return replace(self, notes=notes)

    def narrow(self, start: int, stop: int) -> "ContextualCore":
        """Return the core of some samples."""
        part = None if self.normals is None else self.normals.narrow(start, stop)
        return replace(self, normals=part)

    def to(self, device: torch.device, dtype: torch.dtype) -> "ContextualCore":
        """Return the core with its net there; noise is drawn where it is needed."""
        return replace(self, **{name: getattr(self, name).to(device, dtype) for name in _NET})

    def tensors(self) -> Sequence[Tensor]:
        """Return the net and the noise drawn so far."""
        kept = () if self.normals is None else self.normals.tensors()
        return (self.net_W1, self.net_b1, self.net_W2, self.net_b2, *kept)

    def bytes_to_come(self, length: int) -> int:
        """Return what the table of noise will take beside that for rows of this length."""
        positions = 1 if self.tied else length
        return 0 if self.normals is None else self.normals.bytes_to_come(positions)


def _check_rank(r: int) -> None:
    if r > _LARGEST_RANK:
        raise ConfigError(f"method c_lora needs adapter.r of at most {_LARGEST_RANK}, got {r}")


def _shapes(specs: Sequence[TargetSpec], r: int, config: CLoraConfig) -> Shapes:
    _check_rank(r)
    net = net_shapes(r, config.width)
    nets = {f"{spec.name}.{key}": shape for spec in specs for key, shape in net.items()}
    return factor_shapes(specs, r) | nets


def _init(specs: Sequence[TargetSpec], r: int, seed: int, config: CLoraConfig) -> dict[str, Tensor]:
    _check_rank(r)
    params = init_factors(specs, r, seed)
    for spec in specs:
        for key, shape in net_shapes(r, config.width).items():
            fan_in = r if key in ("net_W1", "net_b1") else config.width
            name = ("init", seed, spec.name, key)
            params[f"{spec.name}.{key}"] = uniform_weights(name, shape, fan_in)
    return params


def _pack(
    state: AdapterState, config: CLoraConfig, normals: Mapping[str, TokenNormals] | None, m: int
) -> SamplePack:
    modules = {}
    for name, module in module_packs(state, z=None).items():
        core = ContextualCore(
            *(state.params[f"{name}.{key}"] for key in _NET),
            prior_std=config.prior_std,
            normals=None if normals is None else normals[name],
            tied=config.noise == "tied",
        )
        modules[name] = replace(module, core=core)
    return SamplePack(m, state.scaling, modules)


def _numbers_at_once(state: AdapterState, config: CLoraConfig) -> int:
    return state.r**2 if config.noise == "tied" else state.r


def _train_pack(state: AdapterState, config: CLoraConfig, draw: Draw) -> SamplePack:
    width, samples = _numbers_at_once(state, config), range(draw.num_samples)
    normals = {
        spec.name: RowNormals((*draw.row_key, "eps", spec.name), samples, width, draw.first_row)
        for spec in state.specs
    }
    return replace(_pack(state, config, normals, draw.num_samples), per_row=TellTokens())


def _predict_pack(state: AdapterState, config: CLoraConfig, draw: Draw) -> SamplePack:
    width = _numbers_at_once(state, config)
    normals = {
        spec.name: PositionNormals.named((*draw.key, "eps", spec.name), draw.num_samples, width)
        for spec in state.specs
    }
    return _pack(state, config, normals, draw.num_samples)


def _mean_pack(state: AdapterState, config: CLoraConfig) -> SamplePack:
    return _pack(state, config, None, 1)


def _data_loss(
    logits: Tensor, labels: Tensor, allowed: Tensor | None, config: CLoraConfig
) -> Tensor:
    return config.nll_weight * mean_nll(logits, labels, allowed)


def _kl_terms(
    state: AdapterState, config: CLoraConfig, point: TrainingPoint, pack: SamplePack
) -> Mapping[str, KlTerm]:
    sheets = notes_of(pack)
    of_modules = [(s.value * s.weights(padding=config.kl_padding)).sum(-1) for s in sheets]
    value = torch.stack(of_modules).sum(0).mean()  # mean over samples and rows
    return {"core_kl": KlTerm(value.float(), _kl_factor(len(state.specs), config, point))}


def _kl_factor(num_modules: int, config: CLoraConfig, point: TrainingPoint) -> float:
    cyclic = config.kl_schedule == "cyclic"
    factor = cycle_factor(config, point) if cyclic else config.kl_weight
    if config.kl_scale == "published":
        factor *= _PUBLISHED_KL_FACTOR / num_modules * point.batch_size
    return factor


def _param_groups(
    state: AdapterState, optim: OptimConfig, config: CLoraConfig
) -> tuple[ParamGroup, ...]:
    nets = tuple(name for name in state.params if name.rpartition(".")[2] in _NET)
    return factors_and(state, optim, ParamGroup(nets, config.net_lr, 0.0, "sgd"))


def _summary(state: AdapterState, config: CLoraConfig) -> dict[str, Any]:
    of_one = sum(math.prod(shape) for shape in net_shapes(state.r, config.width).values())
    return {"net_parameters": of_one * len(state.specs), "net_parameters_per_module": of_one}


METHOD = Method(
    settings=CLoraConfig,
    stochastic=True,
    init=_init,
    shapes=_shapes,
    train_pack=_train_pack,
    predict_pack=_predict_pack,
    mean_pack=_mean_pack,
    kl_terms=_kl_terms,
    data_loss=_data_loss,
    param_groups=_param_groups,
    num_train_samples=lambda config: config.num_train_samples,
    summary=_summary,
)
