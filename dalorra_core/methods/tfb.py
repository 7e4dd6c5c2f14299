"""TFB: noise on a trained adapter, as strong as its own answers allow; nothing is trained for it.

The noise is Gaussian and isotropic inside the span of B's columns. One number, sigma_q, is searched
on training questions without their labels. Equations are those of docs/method.md, section 9.
"""

from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor

from dalorra_core.adapters.inject import TargetSpec
from dalorra_core.adapters.pack import ModulePack, SamplePack
from dalorra_core.adapters.state import AdapterState, Shapes, factor_shapes
from dalorra_core.config import MethodSettings
from dalorra_core.methods import dalorra
from dalorra_core.methods.blob import BlobConfig
from dalorra_core.methods.dalorra import PHI, DalorraConfig
from dalorra_core.methods.map_estimate import MapConfig
from dalorra_core.methods.method import (
    Draw,
    FitContext,
    Method,
    every_design,
    method_by_name,
)
from dalorra_core.methods.mle import MleConfig, init_plain, plain_pack, the_plain_pack
from dalorra_core.sampling.designs import sample_normals
from dalorra_core.sampling.streams import permutation

__all__ = ["METHOD", "SIGMA", "TfbConfig", "search_sigma", "span_of"]

SIGMA = "sigma_q"
"""Name of the noise's standard deviation (1,)."""

_NARROW = 5e-4
"""The published search by changed answers stops at an interval of this width."""


class TfbConfig(MethodSettings, frozen=True):
    """TFB: noise inside the span of a trained adapter's B, its strength searched afterwards."""

    name: Literal["tfb"] = "tfb"
    trained_as: Annotated[
        MleConfig | MapConfig | BlobConfig | DalorraConfig, Field(discriminator="name")
    ] = Field(
        default=MleConfig(),
        description="Method that trains the adapter before the search: `mle`, `map`, `blob` (whose "
        "mean is taken) or `dalorra` (whose gates stay).",
    )
    search: Literal["corrected", "faithful"] = Field(
        default="corrected",
        description="corrected: the largest tested noise within the tolerance; faithful: as "
        "published, see docs/method.md.",
    )
    criterion: Literal["nll", "answers"] = Field(
        default="nll",
        description="What may change by the tolerance: the NLL of the adapter's own answers, "
        "relatively, or the share of them.",
    )
    tolerance: float | None = Field(
        default=None,
        gt=0,
        le=10,
        description="Largest change; null: the published 0.003 for nll, 0.01 for answers.",
    )
    low: float | None = Field(
        default=None,
        ge=0,
        le=100,
        description="Least sigma_q of the search; null: 0, or 0.001 where it is faithful.",
    )
    high: float = Field(
        default=0.015, gt=0, le=100, description="Largest sigma_q of the search, above low."
    )
    search_steps: int | None = Field(
        default=None,
        ge=1,
        le=64,
        description="Halvings of the interval; null: 8, or 5 where it is faithful.",
    )
    search_samples: int = Field(default=10, ge=1, le=256, description="M of the search.")
    anchor_rows: int = Field(
        default=500, ge=1, le=100_000, description="Training rows that the search looks at."
    )

    _by_name = field_validator("trained_as", mode="before")(method_by_name)

    @model_validator(mode="after")
    def _interval_is_one(self) -> "TfbConfig":
        low, high = self.interval
        if low >= high:
            raise ValueError(f"low must be below high, got {low:g} and {high:g}")
        return self

    @property
    def largest_change(self) -> float:
        """The tolerance, or the published one of the criterion."""
        published = 0.003 if self.criterion == "nll" else 0.01
        return published if self.tolerance is None else self.tolerance

    @property
    def interval(self) -> tuple[float, float]:
        """Where the search begins."""
        low = 0.001 if self.search == "faithful" else 0.0
        return (low if self.low is None else self.low), self.high


def span_of(up: Tensor) -> Tensor:
    """Return an orthonormal basis of the columns of B, filled up with zero columns.

    Args:
        up: B (d_out, r).

    Returns:
        U (d_out, r), float32: the left singular vectors, zero where the singular value is zero to
        rounding, so that an adapter that does nothing gets no noise.

    Source:
        docs/method.md, section 9, TFB.
    """
    wide = up.detach().double()
    left, values, _ = torch.linalg.svd(wide, full_matrices=False)  # (d_out, k), (k,)
    limit = max(wide.shape) * torch.finfo(torch.float32).eps * values.amax()
    basis = torch.zeros_like(wide)
    basis[:, : len(values)] = left * (values > limit)
    return basis.float()


def _basis_name(spec: TargetSpec) -> str:
    return f"{spec.name}.basis"


def _kept(specs: Sequence[TargetSpec], r: int, config: TfbConfig) -> Shapes:
    """Return the shapes of what stays of the trained adapter."""
    shapes = factor_shapes(specs, r)
    if isinstance(config.trained_as, DalorraConfig):
        shapes[PHI] = (len(specs), r)
    return shapes


def _shapes(specs: Sequence[TargetSpec], r: int, config: TfbConfig) -> Shapes:
    bases = {_basis_name(spec): (spec.d_out, r) for spec in specs}
    return {**_kept(specs, r, config), **bases, SIGMA: (1,)}


def _without_noise(state: AdapterState, config: TfbConfig, draw: Draw) -> SamplePack:
    """Return what the noise is added to: one function, or the M of a gated adapter."""
    inner = config.trained_as
    if isinstance(inner, DalorraConfig):
        return dalorra.METHOD.predict_pack(state, inner, draw)
    return plain_pack(state, inner)


def _mean_pack(state: AdapterState, config: TfbConfig) -> SamplePack:
    inner = config.trained_as
    if isinstance(inner, DalorraConfig):
        return dalorra.METHOD.mean_pack(state, inner)
    return plain_pack(state, inner)


def _noisy(state: AdapterState, config: TfbConfig, draw: Draw, sigma: float) -> SamplePack:
    """Return M samples ``U (U^T B diag(z) A + sigma eps)``; U U^T B is B."""
    quiet = _without_noise(state, config, draw)
    modules = {}
    for spec in state.specs:
        module = quiet.modules[spec.name]
        up, down = module.lora_B[0], module.lora_A[0]
        basis = state.params[_basis_name(spec)].to(up.device)  # (d_out, r)
        core = (basis.T @ up).unsqueeze(0)  # (1, r, r)
        if module.z is not None:
            core = core * module.z.to(up.device).unsqueeze(1)  # (M, r, r)
        key, shape = (*draw.key, "tfb", spec.name), (state.r, spec.d_in)
        eps = sample_normals(key, draw.num_samples, shape, draw.design)
        noisy = core @ down + sigma * eps.to(up.device)  # (M, r, d_in)
        modules[spec.name] = ModulePack(lora_A=noisy, lora_B=basis.unsqueeze(0))
    return SamplePack(draw.num_samples, state.scaling, modules)


def _predict_pack(state: AdapterState, config: TfbConfig, draw: Draw) -> SamplePack:
    return _noisy(state, config, draw, float(state.params[SIGMA]))


# --- the search -----------------------------------------------------------------------------


def search_sigma(change: Callable[[int, float], float], config: TfbConfig) -> float:
    """Return the strength of the noise that a bisection ends at.

    ``corrected`` returns the lower end of the last interval: the largest tested value whose change
    is within the tolerance, or ``low`` where none is. ``faithful`` returns its upper end, the
    smallest tested value whose change is beyond it, or ``high`` where none is.

    Args:
        change: (number of the test, sigma_q) -> change of the answers.
        config: Interval, tolerance and number of tests.

    Source:
        docs/method.md, section 9, TFB.
    """
    low, high = config.interval
    faithful = config.search == "faithful"
    for step in range(config.search_steps or (5 if faithful else 8)):
        if faithful and config.criterion == "answers" and high - low < _NARROW:
            break
        middle = (low + high) / 2
        if change(step, middle) <= config.largest_change:
            low = middle
        else:  # also where the noise made an answer NaN
            high = middle
    return high if faithful else low


def _mean_log_probs(log_probs: Tensor) -> Tensor:
    """Return (n, C): the log of the mean probability over M samples."""
    return log_probs.double().logsumexp(0) - torch.tensor(float(len(log_probs))).log()


def _changes(
    state: AdapterState, config: TfbConfig, context: FitContext
) -> Callable[[int, float], float]:
    """Return how much the answers to the anchor rows change with the noise."""
    order = permutation(("tfb", context.seed, "anchor"), context.num_rows)
    rows = [int(i) for i in order[: config.anchor_rows]]
    key = ("tfb", context.seed, "search")

    def answers(pack: SamplePack) -> Tensor:
        return _mean_log_probs(context.predict(pack, rows))  # (n, C)

    quiet = answers(_without_noise(state, config, Draw(key, config.search_samples)))
    labels = quiet.argmax(-1, keepdim=True)  # (n, 1)
    own_nll = -quiet.gather(-1, labels).mean()

    def change(step: int, sigma: float) -> float:
        # The same noise at every strength makes the change nearly monotone in it.
        name = (*key, step) if config.search == "faithful" else key
        found = answers(_noisy(state, config, Draw(name, config.search_samples), sigma))
        if config.criterion == "answers":
            return float((found.argmax(-1, keepdim=True) != labels).double().mean())
        nll = -found.gather(-1, labels).mean()
        relative = (nll - own_nll).abs() / own_nll.clamp_min(torch.finfo(torch.float64).tiny)
        return float(relative) / (len(rows) if config.search == "faithful" else 1)

    return change


def _fit(state: AdapterState, config: TfbConfig, context: FitContext) -> dict[str, Tensor]:
    params = {name: state.params[name] for name in _kept(state.specs, state.r, config)}
    for spec in state.specs:
        params[_basis_name(spec)] = span_of(params[f"{spec.name}.lora_B"])
    whole = AdapterState(state.specs, state.r, state.scaling, params)
    change = _changes(whole, config, context)

    def reported(step: int, sigma: float) -> float:
        found = change(step, sigma)
        limit = config.largest_change
        context.report(f"sigma_q {sigma:.6g}: change {found:.4g}, tolerance {limit:g}")
        return found

    sigma = search_sigma(reported, config)
    context.report(f"sigma_q {sigma:.6g} ({config.search} search)")
    return params | {SIGMA: torch.tensor([sigma])}


def _summary(state: AdapterState, config: TfbConfig) -> dict[str, Any]:
    return {
        "sigma_q": float(state.params[SIGMA]),
        "trained_as": config.trained_as.name,
        "span": {s.name: int(state.params[_basis_name(s)].any(0).sum()) for s in state.specs},
    }


METHOD = Method(
    settings=TfbConfig,
    stochastic=True,
    init=init_plain,
    train_pack=the_plain_pack,
    predict_pack=_predict_pack,
    mean_pack=_mean_pack,
    designs=every_design,
    shapes=_shapes,
    trained_as=lambda config: config.trained_as,
    fit=_fit,
    summary=_summary,
)
