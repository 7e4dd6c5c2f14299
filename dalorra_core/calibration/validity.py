"""Whether a certificate speaks of the predictive at hand, and if not, what differs."""

from dalorra_core.artifact.calibration_record import MeasuredWith
from dalorra_core.predictive.predictor import Predictor, SamplingPlan

__all__ = ["measured_with", "void_reason"]

_SAMPLING = frozenset({"num_samples", "design", "seed", "estimator"})


def measured_with(predictor: Predictor, plan: SamplingPlan) -> MeasuredWith:
    """Return everything that a certificate made of these answers would depend on."""
    return MeasuredWith(
        adapter_sha256=predictor.artifact.sha256,
        num_samples=predictor.num_functions(plan),
        design=plan.design,
        seed=0 if predictor.fixed_functions is not None else plan.seed,
        estimator="mean_mask" if predictor.point_method else plan.estimator,
        temperature=predictor.temperature,
        dtype=str(predictor.dtype).removeprefix("torch."),
    )


def void_reason(measured: MeasuredWith, here: MeasuredWith, *, point_method: bool) -> str | None:
    """Return why something measured elsewhere says nothing here; None when it does.

    Args:
        measured: What it was measured with.
        here: What answers here.
        point_method: Nothing is sampled, so the sampling makes no difference.
    """
    ours = here.model_dump()
    differ = [
        f"{name} {_shown(value)} (here: {_shown(ours[name])})"
        for name, value in measured.model_dump().items()
        if value != ours[name] and not (point_method and name in _SAMPLING)
    ]
    return f"measured with {', '.join(differ)}" if differ else None


def _shown(value: object) -> str:
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return text[:12]  # of a sha256, as much as a revision has
