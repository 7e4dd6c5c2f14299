"""Bayesian-LoRA: each LoRA factor is generated from a small matrix of inducing weights.

A factor W (A, or B transposed: r rows, n columns) has a Gaussian prior, seen through a matrix U of
R x R inducing weights that is jointly Gaussian with it. The posterior has U Gaussian, or pushed
through a flow, and W given U as under the prior, with its standard deviations times lambda. The
factors themselves are no parameters. Equation numbers are those of docs/method.md.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F  # noqa: N812
from pydantic import Field, model_validator
from torch import Tensor

from dalorra_core.adapters.inject import TargetSpec
from dalorra_core.adapters.pack import ModulePack, SamplePack
from dalorra_core.adapters.state import AdapterState, Shapes, factor_shapes, init_factors
from dalorra_core.config import Design, MethodSettings, OptimConfig
from dalorra_core.errors import ConfigError
from dalorra_core.methods.method import (
    Draw,
    Method,
    ParamGroup,
    TrainingPoint,
    every_design,
    factors_and,
)
from dalorra_core.methods.row_flow import flow_size, init_flow, row_flow
from dalorra_core.objectives.elbo import KlTerm, label_log_probs, mean_nll
from dalorra_core.objectives.kl import normal_kl
from dalorra_core.sampling.designs import sample_normals
from dalorra_core.sampling.streams import normals

__all__ = [
    "METHOD",
    "BayesianLoraConfig",
    "Whitened",
    "conditional_kl",
    "factor_noise",
    "factor_samples",
    "whitened",
]

MEAN, SPREAD, LAMBDA = "inducing_mean", "inducing_spread", "lambda_logit"
DIAGONALS, FLOW = "diagonals", "flow"

_JITTER = 1e-5
"""Added to D^2, relative to the mean diagonal of Z Z^T, which has rank r < R on the narrow side."""


class BayesianLoraConfig(MethodSettings, frozen=True):
    """Bayesian-LoRA: LoRA factors generated from inducing weights, with Matheron's rule."""

    name: Literal["bayesian_lora"] = "bayesian_lora"
    bayesian_modules: tuple[str, ...] | None = Field(
        default=None,
        min_length=1,
        max_length=64,
        description="Last path components of the modules whose factors are generated, such as "
        "q_proj; the others keep plain LoRA. null: all adapted modules.",
    )
    num_inducing: int = Field(
        default=9, ge=1, le=64, description="R: rows and columns of the inducing weights U."
    )
    prior_sd: float = Field(
        default=0.1,
        gt=0,
        le=100,
        description="A weight's prior standard deviation times the square root of its inputs.",
    )
    init_lambda: float = Field(
        default=1e-3, gt=0, lt=1, description="lambda at the start, below max_lambda."
    )
    max_lambda: float = Field(
        default=0.03,
        gt=0,
        le=1,
        description="Upper limit of lambda, the factor on the standard deviations of W given U.",
    )
    init_sd: float = Field(
        default=1e-3,
        gt=0,
        lt=1,
        description="Standard deviations of the whitened U at the start, below max_sd.",
    )
    max_sd: float = Field(
        default=0.1, gt=0, le=1, description="Upper limit of those standard deviations."
    )
    flow: bool = Field(
        default=False,
        description="Push the rows of the whitened U through a masked autoregressive flow.",
    )
    num_train_samples: int = Field(
        default=1, ge=1, le=64, description="S: draws of the factors per optimiser step."
    )
    kl_weight: float = Field(default=1.0, ge=0, description="Factor on the KL; 1 is the ELBO.")
    kl_scale: Literal["per_example", "per_batch"] = Field(
        default="per_example",
        description="per_example: KL times kl_weight / N (the ELBO); per_batch: divided by the "
        "number of batches of an epoch instead, as the published code does.",
    )
    kl_start_epoch: int = Field(
        default=0, ge=0, description="Epochs without the KL at the start; published: 2."
    )
    label_smoothing: float = Field(
        default=0.0, ge=0, lt=1, description="Of the loss on the data; published: 0.05."
    )
    entropy_bonus: float = Field(
        default=0.0,
        ge=0,
        le=10,
        description="Times the answers' entropy, taken off the loss; published: 0.05.",
    )
    inducing_lr: float = Field(
        default=7.4e-4, gt=0, description="Peak learning rate of all but plain LoRA's factors."
    )
    inducing_weight_decay: float = Field(
        default=0.0, ge=0, description="Their weight decay; published: 0.027."
    )

    @model_validator(mode="after")
    def _starts_below_the_limits(self) -> "BayesianLoraConfig":
        if not self.init_lambda < self.max_lambda:
            raise ValueError(f"init_lambda must be below max_lambda {self.max_lambda}")
        if not self.init_sd < self.max_sd:
            raise ValueError(f"init_sd must be below max_sd {self.max_sd}")
        return self


@dataclass(frozen=True)
class _Factor:
    """One generated factor: A, or B transposed.

    Attributes:
        spec: Its module.
        which: A or B.
        width: n, its columns: d_in of A, d_out of B.
        inputs: Inputs of the factor as a linear map: d_in of A, r of B.
    """

    spec: TargetSpec
    which: Literal["A", "B"]
    width: int
    inputs: int

    @property
    def narrow(self) -> str:
        """Name of Z on the side of the ranks, (R, r)."""
        return f"{self.spec.name}.{self.which}_narrow"

    @property
    def wide(self) -> str:
        """Name of Z on the other side, (R, n)."""
        return f"{self.spec.name}.{self.which}_wide"


def _is_bayesian(spec: TargetSpec, config: BayesianLoraConfig) -> bool:
    wanted = config.bayesian_modules
    return wanted is None or spec.name.rpartition(".")[2] in wanted


def _factors(
    specs: Sequence[TargetSpec], r: int, config: BayesianLoraConfig
) -> tuple[_Factor, ...]:
    """Return the generated factors in the order of the stacked tensors.

    Raises:
        ConfigError: There is none.
    """
    found = tuple(
        factor
        for spec in specs
        if _is_bayesian(spec, config)
        for factor in (
            _Factor(spec, "A", spec.d_in, spec.d_in),
            _Factor(spec, "B", spec.d_out, r),
        )
    )
    if not found:
        raise ConfigError(
            f"method.bayesian_modules names {', '.join(config.bayesian_modules or ())}, and none "
            "of them is an adapted module"
        )
    return found


# --- the Gaussian algebra of one factor -------------------------------------------------------


@dataclass(frozen=True)
class Whitened:
    """One side's Z and D, with K = Z Z^T + D^2 = L L^T divided out; float64.

    Attributes:
        basis: L^-1 Z, (R, n).
        rest: L^-1 D, (R, R), so that basis basis^T + rest rest^T is the identity.
    """

    basis: Tensor
    rest: Tensor


def whitened(z: Tensor, diagonal: Tensor) -> Whitened:
    """Return one side's inducing locations with their covariance divided out.

    A jitter becomes part of D, so that what is drawn and what is divided out agree exactly.

    Args:
        z: Z (R, n); n may be smaller than R.
        diagonal: D (R,), positive.

    Source:
        docs/method.md, eq. (I1).
    """
    z = z.double()  # n < R leaves K nearly singular
    gram = z @ z.T
    squares = diagonal.double().square() + _JITTER * gram.diagonal().mean()
    root = torch.linalg.cholesky(gram + torch.diag(squares))
    both = torch.cat([z, torch.diag(squares.sqrt())], dim=1)
    solved = torch.linalg.solve_triangular(root, both, upper=False)  # (R, n + R)
    return Whitened(solved[:, : z.shape[1]], solved[:, z.shape[1] :])


@dataclass(frozen=True)
class _Noise:
    """Standard normal numbers of M draws of one factor, float64.

    Attributes:
        weights: (M, r, n), of the prior draw of W.
        narrow: (M, r, R) and
        wide: (M, R, R), of the part of the prior draw of U that W does not determine.
    """

    weights: Tensor
    narrow: Tensor
    wide: Tensor


def factor_noise(
    key: tuple[str | int, ...],
    num_samples: int,
    r: int,
    n: int,
    num_inducing: int,
    design: Design = "iid",
) -> _Noise:
    """Return the noise of M draws of one factor.

    Args:
        key: Name of the streams.
        num_samples: M.
        r: Rows of the factor.
        n: Its columns.
        num_inducing: R.
        design: How the draws are made together.
    """
    sizes = (num_inducing * num_inducing, r * num_inducing, r * n)
    flat = sample_normals(key, num_samples, (sum(sizes),), design).double()
    wide, narrow, weights = flat.split(sizes, dim=1)
    m = num_samples
    return _Noise(
        weights.view(m, r, n),
        narrow.view(m, r, num_inducing),
        wide.view(m, num_inducing, num_inducing),
    )


def factor_samples(
    narrow: Whitened, wide: Whitened, v: Tensor, scale: Tensor, noise: _Noise | None
) -> Tensor:
    """Return draws of a factor given whitened inducing weights, by Matheron's rule.

    Draw weights and inducing weights from the prior together, then move the weights by what the
    inducing weights were off: this needs no covariance of all r n weights.

    Args:
        narrow: The side of the ranks.
        wide: The other side.
        v: Whitened inducing weights V (M, R, R), or (1, R, R) for all.
        scale: lambda, a scalar; 1 draws from the prior's conditional.
        noise: None for the mean.

    Returns:
        (M, r, n), float64, in units of the prior's standard deviation.

    Source:
        docs/method.md, eq. (I3) and (I4).
    """
    if noise is None:
        return narrow.basis.T @ v @ wide.basis
    across = noise.weights @ wide.basis.T + noise.narrow @ wide.rest.T  # (M, r, R)
    drawn = narrow.basis @ across + narrow.rest @ noise.wide  # (M, R, R), the prior's V
    return narrow.basis.T @ (v - scale * drawn) @ wide.basis + scale * noise.weights


def conditional_kl(scale: Tensor, num_weights: int) -> Tensor:
    """Return KL(q(W | U) || p(W | U)) in nats: equal means, a covariance times lambda^2.

    Args:
        scale: lambda, positive.
        num_weights: r n.

    Source:
        docs/method.md, eq. (I5).

    Example:
        >>> float(conditional_kl(torch.tensor(1.0), 7))
        0.0
    """
    return num_weights * (0.5 * scale.square() - scale.log() - 0.5)


# --- the method -------------------------------------------------------------------------------


def _shapes(specs: Sequence[TargetSpec], r: int, config: BayesianLoraConfig) -> Shapes:
    k = config.num_inducing
    plain = [spec for spec in specs if not _is_bayesian(spec, config)]
    shapes: dict[str, tuple[int, ...]] = factor_shapes(plain, r)
    factors = _factors(specs, r, config)
    for factor in factors:
        shapes[factor.narrow], shapes[factor.wide] = (k, r), (k, factor.width)
    count = len(factors)
    shapes |= {
        MEAN: (count, k, k),
        SPREAD: (count, k, k),
        LAMBDA: (count,),
        DIAGONALS: (count, 2, k),
    }
    return shapes | ({FLOW: (count, flow_size(k))} if config.flow else {})


def _init(
    specs: Sequence[TargetSpec], r: int, seed: int, config: BayesianLoraConfig
) -> dict[str, Tensor]:
    k, factors = config.num_inducing, _factors(specs, r, config)

    def drawn(what: str, *shape: int) -> Tensor:
        numbers = normals(("init", seed, what), math.prod(shape))
        return torch.from_numpy(numbers).float().view(shape)

    params = init_factors([s for s in specs if not _is_bayesian(s, config)], r, seed)
    for factor in factors:
        for name, width in ((factor.narrow, r), (factor.wide, factor.width)):
            params[name] = drawn(name, k, width) / math.sqrt(k)
    count = len(factors)
    params[MEAN] = drawn(MEAN, count, k, k)
    params[SPREAD] = torch.full((count, k, k), _logit(config.init_sd / config.max_sd))
    params[LAMBDA] = torch.full((count,), _logit(config.init_lambda / config.max_lambda))
    params[DIAGONALS] = torch.full((count, 2, k), math.log(math.expm1(1e-3)))
    if config.flow:
        flows = [init_flow(("init", seed, FLOW, i), k) for i in range(count)]
        params[FLOW] = torch.stack(flows)
    return params


def _logit(share: float) -> float:
    return math.log(share) - math.log1p(-share)


def _spread(state: AdapterState, config: BayesianLoraConfig) -> Tensor:
    """Return the standard deviations of the whitened U before the flow, (F, R, R), float64."""
    return config.max_sd * state.params[SPREAD].double().sigmoid()


def _lambdas(state: AdapterState, config: BayesianLoraConfig) -> Tensor:
    """Return lambda of every factor, (F,), float64."""
    return config.max_lambda * state.params[LAMBDA].double().sigmoid()


def _base_weights(state: AdapterState, config: BayesianLoraConfig, draw: Draw | None) -> Tensor:
    """Return whitened inducing weights before the flow, (M, F, R, R), float64."""
    mean = state.params[MEAN].double()
    if draw is None:
        return mean.unsqueeze(0)
    shape = tuple(mean.shape)
    noise = sample_normals((*draw.key, "V"), draw.num_samples, shape, draw.design)
    return mean + _spread(state, config) * noise.double().to(mean.device)


def _through_flow(
    state: AdapterState, config: BayesianLoraConfig, v: Tensor
) -> tuple[Tensor, Tensor]:
    """Return V (M, F, R, R), and the logarithms of the flow's determinants (M, F)."""
    if not config.flow:
        return v, v.new_zeros(v.shape[:2])
    moved = [row_flow(v[:, f], params.double()) for f, params in enumerate(state.params[FLOW])]
    return torch.stack([x for x, _ in moved], 1), torch.stack([d.sum(-1) for _, d in moved], 1)


def _noise_of(factor: _Factor, r: int, config: BayesianLoraConfig, draw: Draw) -> _Noise:
    key, inducing = (*draw.key, "W", factor.spec.name, factor.which), config.num_inducing
    return factor_noise(key, draw.num_samples, r, factor.width, inducing, draw.design)


def _pack(state: AdapterState, config: BayesianLoraConfig, draw: Draw | None) -> SamplePack:
    """Return the pack of a draw; None stands for the mean, without noise."""
    v, _ = _through_flow(state, config, _base_weights(state, config, draw))
    lambdas, r = _lambdas(state, config), state.r
    generated: dict[str, dict[str, Tensor]] = {}
    for f, factor in enumerate(_factors(state.specs, r, config)):
        diagonals = F.softplus(state.params[DIAGONALS][f].double())
        narrow = whitened(state.params[factor.narrow], diagonals[0])
        wide = whitened(state.params[factor.wide], diagonals[1])
        noise = None
        if draw is not None:
            found = _noise_of(factor, r, config, draw)
            device = v.device
            noise = _Noise(found.weights.to(device), found.narrow.to(device), found.wide.to(device))
        drawn = factor_samples(narrow, wide, v[:, f], lambdas[f], noise)
        scaled = (drawn * (config.prior_sd / math.sqrt(factor.inputs))).float()
        generated.setdefault(factor.spec.name, {})[factor.which] = scaled
    modules = {}
    for spec in state.specs:
        if spec.name in generated:
            a, b = generated[spec.name]["A"], generated[spec.name]["B"].transpose(1, 2)
        else:
            a = state.params[f"{spec.name}.lora_A"].unsqueeze(0)
            b = state.params[f"{spec.name}.lora_B"].unsqueeze(0)
        modules[spec.name] = ModulePack(a, b)
    return SamplePack(1 if draw is None else draw.num_samples, state.scaling, modules)


def _mean_pack(state: AdapterState, config: BayesianLoraConfig) -> SamplePack:
    """Return the function of the mean factors; with a flow, of what it makes of the base's mean."""
    return _pack(state, config, None)


def _kl_factor(config: BayesianLoraConfig, point: TrainingPoint) -> float:
    if point.step * point.batch_size // point.num_examples < config.kl_start_epoch:
        return 0.0
    if config.kl_scale == "per_example":
        return config.kl_weight / point.num_examples
    return config.kl_weight / math.ceil(point.num_examples / point.batch_size)


def _kl_terms(
    state: AdapterState, config: BayesianLoraConfig, point: TrainingPoint, _: SamplePack
) -> Mapping[str, KlTerm]:
    mean, spread = state.params[MEAN], _spread(state, config)
    if config.flow:  # the samples of the forward pass, drawn again
        draw = Draw(point.key, config.num_train_samples)
        v, log_det = _through_flow(state, config, _base_weights(state, config, draw))
        energy = 0.5 * v.square().sum((-3, -2, -1)) - log_det.sum(-1)  # (S,)
        inducing = energy.mean() - (spread.log() + 0.5).sum()
    else:
        inducing = normal_kl(mean, spread.log(), 1.0).sum()
    sizes = [state.r * factor.width for factor in _factors(state.specs, state.r, config)]
    lambdas = _lambdas(state, config)
    each = [conditional_kl(scale, size) for scale, size in zip(lambdas, sizes, strict=True)]
    weight = _kl_factor(config, point)
    return {
        "inducing_kl": KlTerm(inducing, weight),
        "conditional_kl": KlTerm(torch.stack(each).sum(), weight),
    }


def _data_loss(
    logits: Tensor, labels: Tensor, allowed: Tensor | None, config: BayesianLoraConfig
) -> Tensor:
    loss = mean_nll(logits, labels, allowed)
    if config.label_smoothing == config.entropy_bonus == 0:
        return loss
    log_probs = label_log_probs(logits, allowed)  # (S, B, C)
    finite = log_probs if allowed is None else log_probs.masked_fill(~allowed, 0.0)
    count = log_probs.shape[-1] if allowed is None else allowed.sum(-1)
    spread_out = -(finite.sum(-1) / count).mean()
    entropy = -(log_probs.exp() * finite).sum(-1).mean()
    smoothing = config.label_smoothing
    return (1 - smoothing) * loss + smoothing * spread_out - config.entropy_bonus * entropy


def _param_groups(
    state: AdapterState, optim: OptimConfig, config: BayesianLoraConfig
) -> tuple[ParamGroup, ...]:
    own = tuple(name for name in state.params if not name.endswith((".lora_A", ".lora_B")))
    decay = config.inducing_weight_decay
    return factors_and(state, optim, ParamGroup(own, config.inducing_lr, decay))


def _summary(state: AdapterState, config: BayesianLoraConfig) -> dict[str, Any]:
    names = [f"{f.spec.name}.lora_{f.which}" for f in _factors(state.specs, state.r, config)]
    spread = _spread(state, config).detach().flatten(1).mean(-1)
    return {
        "num_generated_factors": len(names),
        "lambda": dict(zip(names, _lambdas(state, config).detach().tolist(), strict=True)),
        "mean_inducing_sd": dict(zip(names, spread.tolist(), strict=True)),
    }


METHOD = Method(
    settings=BayesianLoraConfig,
    stochastic=True,
    init=_init,
    shapes=_shapes,
    train_pack=_pack,
    predict_pack=_pack,
    mean_pack=_mean_pack,
    designs=every_design,
    kl_terms=_kl_terms,
    data_loss=_data_loss,
    param_groups=_param_groups,
    num_train_samples=lambda config: config.num_train_samples,
    summary=_summary,
)
