"""How the answers to a request are sampled."""

from dataclasses import replace

from server.errors import ApiError
from server.ports import AdapterCard, Sampling
from server.schemas import ClassifyRequest

__all__ = ["resolve_sampling"]


def resolve_sampling(request: ClassifyRequest, card: AdapterCard) -> Sampling:
    """Return the sampling of a request: the adapter's defaults with what the request changes.

    Raises:
        ApiError: 422 when several samples are asked of something that has one function only.
    """
    estimator = request.estimator or card.defaults.estimator
    single = estimator == "mean_mask" or card.point_method
    if single and request.num_samples not in (None, 1):
        reason = (
            f"adapter {card.name} does not sample (method {card.method})"
            if card.point_method
            else "the mean_mask estimator is one deterministic pass"
        )
        raise ApiError(
            "invalid_request",
            f"num_samples must be 1 or left out: {reason}",
            errors=({"pointer": "#/num_samples", "limit": 1, "actual": request.num_samples},),
        )
    defaults = card.defaults
    return replace(
        defaults,
        estimator=estimator,
        num_samples=1 if single else (request.num_samples or defaults.num_samples),
        # one function has no seed; leaving the default lets such rows share batches
        seed=defaults.seed if single or request.seed is None else request.seed,
    )
