"""Laplace: a Gaussian posterior over LoRA's factors around a trained adapter, fitted afterwards.

Its precision is the Gauss-Newton matrix of the label likelihood plus a scalar prior precision; one
Kronecker product stands for each factor's block. Answers come from the network linearised at the
trained adapter: Gaussian label logits. Sections and equations are those of docs/method.md.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor

from dalorra_core.adapters.gradients import LabelGradients, ModuleGradients
from dalorra_core.adapters.inject import LM_HEAD, TargetSpec
from dalorra_core.adapters.state import AdapterState, Shapes, factor_shapes
from dalorra_core.config import MethodSettings
from dalorra_core.errors import ConfigError
from dalorra_core.methods.map_estimate import MapConfig
from dalorra_core.methods.method import FitContext, Method, method_by_name
from dalorra_core.methods.mle import MleConfig, init_plain, plain_pack, the_plain_pack

__all__ = [
    "METHOD",
    "PRIOR_PRECISION",
    "LaplaceConfig",
    "Spectrum",
    "best_prior_precision",
    "log_evidence",
]

PRIOR_PRECISION = "prior_precision"
"""Name of lambda0 (1,)."""

_LARGE = 100
"""Kronecker factors below this size are never cut to a low rank."""


_RIDGE = 1e-14
"""See ``_eigen``."""


class LaplaceConfig(MethodSettings, frozen=True):
    """Laplace: Gaussian posterior around a trained adapter, linearised predictive."""

    name: Literal["laplace"] = "laplace"
    trained_as: Annotated[MapConfig | MleConfig, Field(discriminator="name")] = Field(
        default=MapConfig(),
        description="Method, `map` or `mle`, that trains the adapter before the fit.",
    )
    subset: Literal["all", "last_layer"] = Field(
        default="all",
        description="Whose factors have a posterior: all adapted modules', or lm_head's alone.",
    )
    kfac_rank: int | None = Field(
        default=None,
        ge=1,
        le=512,
        description="Rank to which Kronecker factors of size 100 or more are cut; null: none.",
    )
    kfac_mean_over: Literal["tokens", "rows"] = Field(
        default="tokens",
        description="What the input factor is a mean over: all tokens, or the rows alone (a sum "
        "over the tokens of each), which makes the curvature larger by a row's length.",
    )
    prior_precision: float | None = Field(
        default=None,
        gt=0,
        le=1e12,
        description="Prior precision of every parameter; null: the one of the largest marginal "
        "likelihood.",
    )
    link: Literal["sampled", "probit"] = Field(
        default="sampled",
        description="How Gaussian logits become probabilities: M draws of them, or one answer by "
        "the probit approximation, which has no epistemic part and no error of a small M.",
    )
    evidence_steps: int = Field(
        default=100, ge=1, le=10_000, description="Adam steps on the log prior precision."
    )
    evidence_lr: float = Field(
        default=0.1, gt=0, le=10, description="Adam's learning rate of those steps."
    )

    _by_name = field_validator("trained_as", mode="before")(method_by_name)


@dataclass(frozen=True)
class _Factor:
    """One LoRA matrix that has a posterior."""

    module: str
    name: Literal["lora_A", "lora_B"]
    d_out: int
    d_in: int

    @property
    def key(self) -> str:
        return f"{self.module}.{self.name}"

    def gradient_parts(self, state: AdapterState, found: ModuleGradients) -> tuple[Tensor, Tensor]:
        """Return its inputs (B, T, d_in) and the derivatives in its output (C, B, T, d_out).

        The scale s stands with the inputs of B and with the derivatives of A.
        """
        down, up = state.params[f"{self.module}.lora_A"], state.params[f"{self.module}.lora_B"]
        if self.name == "lora_A":
            return found.inputs, state.scaling * found.outputs @ up
        return state.scaling * found.inputs @ down.T, found.outputs


def _chosen(specs: Sequence[TargetSpec], config: LaplaceConfig) -> tuple[TargetSpec, ...]:
    """Return the modules whose factors have a posterior.

    Raises:
        ConfigError: It is to be lm_head, which is not adapted.
    """
    chosen = tuple(s for s in specs if config.subset == "all" or s.name == LM_HEAD)
    if not chosen:
        raise ConfigError(
            "method.subset last_layer needs lm_head among adapter.target_modules, got "
            f"{', '.join(s.name for s in specs) or 'no module'}"
        )
    return chosen


def _gradient_modules(specs: Sequence[TargetSpec], config: LaplaceConfig) -> tuple[str, ...]:
    return tuple(s.name for s in _chosen(specs, config))


def _factors(specs: Sequence[TargetSpec], r: int, config: LaplaceConfig) -> tuple[_Factor, ...]:
    return tuple(
        factor
        for s in _chosen(specs, config)
        for factor in (
            _Factor(s.name, "lora_A", r, s.d_in),
            _Factor(s.name, "lora_B", s.d_out, r),
        )
    )


def _rank(size: int, config: LaplaceConfig) -> int:
    """Return how many eigenvectors of a Kronecker factor of this size are kept."""
    if config.kfac_rank is None or size < _LARGE:
        return size
    return min(size, config.kfac_rank)


@dataclass(frozen=True)
class Spectrum:
    """Eigenvalues and eigenvectors of one factor's block of curvature, a Kronecker product.

    Attributes:
        out_values: (k_out,) of the output side, not negative.
        out_vectors: (d_out, k_out), orthonormal columns.
        in_values: (k_in,) of the input side.
        in_vectors: (d_in, k_in).
    """

    out_values: Tensor
    out_vectors: Tensor
    in_values: Tensor
    in_vectors: Tensor

    @property
    def products(self) -> Tensor:
        """Eigenvalues of the block that are kept, (k_out, k_in); all others count as zero."""
        return self.out_values.unsqueeze(1) * self.in_values

    def whitened(self, jacobian: Tensor, precision: Tensor) -> Iterator[Tensor]:
        """Yield the parts of J P^(-1/2), whose squares add up to the covariance.

        Args:
            jacobian: (C, B, d_out, d_in).
            precision: Prior precision (1,).

        Yields:
            (C, B, k_out, k_in) inside the kept eigenvectors; then, where some were cut, what lies
            outside of them, (C, B, d_out, d_in), of which the prior knows alone.
        """
        rotated = self.out_vectors.T @ jacobian @ self.in_vectors  # (C, B, k_out, k_in)
        yield rotated / (self.products + precision).sqrt()
        if any(v.shape[0] > v.shape[1] for v in (self.out_vectors, self.in_vectors)):
            inside = self.out_vectors @ rotated @ self.in_vectors.T  # (C, B, d_out, d_in)
            yield (jacobian - inside) / precision.sqrt()


_PARTS = ("out_values", "out_vectors", "in_values", "in_vectors")


def _spectrum_of(params: Mapping[str, Tensor], factor: _Factor, device: torch.device) -> Spectrum:
    return Spectrum(*(params[f"{factor.key}.{part}"].to(device) for part in _PARTS))


def _shapes(specs: Sequence[TargetSpec], r: int, config: LaplaceConfig) -> Shapes:
    shapes = factor_shapes(specs, r) | {PRIOR_PRECISION: (1,)}
    for factor in _factors(specs, r, config):
        for side, size in (("out", factor.d_out), ("in", factor.d_in)):
            shapes[f"{factor.key}.{side}_values"] = (_rank(size, config),)
            shapes[f"{factor.key}.{side}_vectors"] = (size, _rank(size, config))
    return shapes


# --- curvature ------------------------------------------------------------------------------


def _eigen(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Return ascending eigenvalues, not negative, and eigenvectors of a Gram matrix.

    The solver may fail on a tiny matrix with many equal eigenvalues, so it gets one of size 1 with
    a ridge below rounding.
    """
    size = gram.diagonal().amax().clamp_min(torch.finfo(gram.dtype).tiny)
    ridge = _RIDGE * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    values, vectors = torch.linalg.eigh(gram / size + ridge)
    return (values - _RIDGE).clamp_min(0) * size, vectors


class _Moments:
    """The running sum of x x^T over rows x (d,), whole or cut to its largest eigenvectors."""

    def __init__(self, size: int, rank: int, device: torch.device) -> None:
        self._size, self._rank, self._is_cut = size, rank, rank < size
        shape = (0, size) if self._is_cut else (size, size)
        self._kept = torch.zeros(shape, dtype=torch.float64, device=device)  # root, or the sum

    def add(self, rows: Tensor) -> None:
        """Add rows (n, d); in the last layer all but one token of a row may be zero."""
        wide = rows[rows.any(1)].double()
        self._kept = self._root(wide) if self._is_cut else self._kept + wide.T @ wide

    def _root(self, rows: Tensor) -> Tensor:
        """Return at most ``rank`` orthogonal rows whose moments are the largest part of the sum."""
        stacked = torch.cat([self._kept, rows])  # (k + n, d)
        wide = stacked.shape[0] <= stacked.shape[1]
        gram = stacked @ stacked.T if wide else stacked.T @ stacked
        values, vectors = _eigen(gram)
        top = vectors[:, -self._rank :]
        if wide:
            return top.T @ stacked
        return values[-self._rank :].sqrt().unsqueeze(1) * top.T

    def eigen(self, count: int) -> tuple[Tensor, Tensor]:
        """Return the eigenvalues (k,) and eigenvectors (d, k) of the sum divided by ``count``."""
        if not self._is_cut:
            return _eigen(self._kept / count)
        root = torch.zeros(self._rank, self._size, dtype=torch.float64, device=self._kept.device)
        root[: len(self._kept)] = self._kept
        # Rows that are zero to rounding point anywhere; the decomposition makes them orthogonal.
        _, lengths, directions = torch.linalg.svd(root, full_matrices=False)  # (k,), (k, d)
        return lengths.square() / count, directions.T


def _fisher_root(gradients: LabelGradients) -> Tensor:
    """Return R (B, C, C) with R^T R = diag(p) - p p^T, the Fisher matrix of the label logits.

    Row k is sqrt(p_k) times the derivative of -log p_k in the logits.
    """
    logits = gradients.logits
    if gradients.allowed is not None:
        logits = logits.masked_fill(~gradients.allowed, float("-inf"))
    probs = logits.softmax(-1)  # (B, C)
    errors = probs.unsqueeze(1) - torch.eye(probs.shape[-1], device=probs.device)  # (B, C, C)
    return probs.sqrt().unsqueeze(-1) * errors


def _curvature(
    state: AdapterState, config: LaplaceConfig, context: FitContext
) -> Mapping[str, Spectrum]:
    """Return the curvature of every factor, summed over the training rows."""
    factors = _factors(state.specs, state.r, config)
    device = next(iter(state.params.values())).device

    def moments(size: int) -> _Moments:
        return _Moments(size, _rank(size, config), device)

    sums = {f.key: (moments(f.d_out), moments(f.d_in)) for f in factors}
    counts = dict.fromkeys(sums, 0)
    for gradients in context.gradients(plain_pack(state, config), range(context.num_rows)):
        root = _fisher_root(gradients)
        for factor in factors:
            found = gradients.modules[factor.module]
            inputs, outputs = factor.gradient_parts(state, found)
            errors = torch.einsum("bkc,cbto->kbto", root, outputs)  # (C, B, T, d_out)
            out_sum, in_sum = sums[factor.key]
            out_sum.add(errors[:, found.is_token].flatten(0, 1))
            in_sum.add(inputs[found.is_token])
            counts[factor.key] += int(found.is_token.sum())
    spectra = {}
    for key, (out_sum, in_sum) in sums.items():
        count = counts[key] if config.kfac_mean_over == "tokens" else context.num_rows
        spectra[key] = Spectrum(*out_sum.eigen(1), *in_sum.eigen(count))
    return spectra


# --- prior precision ------------------------------------------------------------------------


def log_evidence(log_precision: Tensor, curvature: Tensor, squared_norm: Tensor) -> Tensor:
    """Return the log marginal likelihood, less the log-likelihood at the trained adapter.

    Args:
        log_precision: Log of the prior precision lambda0, a scalar.
        curvature: Eigenvalues of the curvature, (p,), not negative; zeros may be left out.
        squared_norm: Sum of squares of all parameters that have a posterior.

    Returns:
        A scalar, nats, differentiable in ``log_precision``.

    Source:
        docs/method.md, section 9, Laplace.
    """
    log_ratio = (curvature / log_precision.exp()).log1p().sum()  # log det P - p log lambda0
    return -0.5 * (log_ratio + log_precision.exp() * squared_norm)


def best_prior_precision(
    curvature: Tensor, squared_norm: Tensor, *, steps: int, lr: float
) -> float:
    """Return the prior precision of the largest marginal likelihood, by Adam on its log, from 1.

    Args:
        curvature: See ``log_evidence``.
        squared_norm: See ``log_evidence``.
        steps: Of Adam.
        lr: Of Adam.
    """
    log_precision = torch.zeros((), dtype=torch.float64, device=curvature.device)
    log_precision.requires_grad_()
    adam = torch.optim.Adam([log_precision], lr=lr)
    for _ in range(steps):
        adam.zero_grad()
        (-log_evidence(log_precision, curvature.double(), squared_norm.double())).backward()
        adam.step()
    return float(log_precision.detach().exp())


def _fit(state: AdapterState, config: LaplaceConfig, context: FitContext) -> dict[str, Tensor]:
    spectra = _curvature(state, config, context)
    curvature = torch.cat([s.products.flatten() for s in spectra.values()])
    squares = torch.stack([state.params[key].double().square().sum() for key in spectra])
    precision = config.prior_precision
    if precision is None:
        precision = best_prior_precision(
            curvature, squares.sum(), steps=config.evidence_steps, lr=config.evidence_lr
        )
    effective = float((curvature / (curvature + precision)).sum())
    context.report(
        f"curvature of {len(spectra)} factors over {context.num_rows} rows; prior precision "
        f"{precision:.4g}, {effective:.1f} effective parameters"
    )
    params = {name: state.params[name] for name in factor_shapes(state.specs, state.r)}
    params[PRIOR_PRECISION] = torch.tensor([precision])
    for key, spectrum in spectra.items():
        params |= {f"{key}.{part}": getattr(spectrum, part).float() for part in _PARTS}
    return params


# --- predictive -----------------------------------------------------------------------------


def _logit_covariance(
    state: AdapterState, config: LaplaceConfig, gradients: LabelGradients
) -> Tensor:
    """Return J P^-1 J^T (B, C, C), float64; a sum of squares, so never negative."""
    labels = gradients.logits.shape[-1]
    device = gradients.logits.device
    precision = state.params[PRIOR_PRECISION].to(device)
    total = torch.zeros(len(gradients.logits), labels, labels, dtype=torch.float64, device=device)
    for factor in _factors(state.specs, state.r, config):
        inputs, outputs = factor.gradient_parts(state, gradients.modules[factor.module])
        jacobian = torch.einsum("cbto,bti->cboi", outputs, inputs)  # (C, B, d_out, d_in)
        spectrum = _spectrum_of(state.params, factor, device)
        for part in spectrum.whitened(jacobian, precision):
            flat = part.flatten(2).double()  # (C, B, k)
            total += torch.einsum("cbk,dbk->bcd", flat, flat)
    return total


def _summary(state: AdapterState, config: LaplaceConfig) -> dict[str, Any]:
    precision = float(state.params[PRIOR_PRECISION])
    effective = {
        factor.key: float((products / (products + precision)).sum())
        for factor in _factors(state.specs, state.r, config)
        for products in [_spectrum_of(state.params, factor, torch.device("cpu")).products.double()]
    }
    return {
        "prior_precision": precision,
        "effective_parameters": sum(effective.values()),
        "effective_parameters_of": effective,
    }


METHOD = Method(
    settings=LaplaceConfig,
    stochastic=True,
    one_answer=lambda config: config.link == "probit",
    init=init_plain,
    train_pack=the_plain_pack,
    predict_pack=the_plain_pack,
    mean_pack=plain_pack,
    shapes=_shapes,
    trained_as=lambda config: config.trained_as,
    fit=_fit,
    gradient_modules=_gradient_modules,
    logit_covariance=_logit_covariance,
    summary=_summary,
)
