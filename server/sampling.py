"""How the answers to a request are sampled."""

from dataclasses import replace

from server.errors import ApiError
from server.ports import AdapterCard, Sampling
from server.schemas import ClassifyRequest

__all__ = ["resolve_sampling"]


def resolve_sampling(request: ClassifyRequest, card: AdapterCard) -> Sampling:
    """Return the sampling of a request: the adapter's defaults with what the request changes.

    Raises:
        ApiError: 422 when the adapter has one sampling only and the request asks for another, when
            another number of samples is asked for than there are functions, or
            more than fit into the memory that the engine grants, or a design that the adapter
            cannot follow or that would have no effect.
    """
    if card.fixed_sampling is not None:
        _check_fixed(request, card, card.fixed_sampling)
    estimator = request.estimator or card.defaults.estimator
    single = estimator == "mean_mask" or card.point_method
    there_are = 1 if single else card.fixed_functions
    if there_are is not None and request.num_samples not in (None, there_are):
        raise ApiError(
            "invalid_request",
            f"num_samples must be {there_are} or left out: {_why_fixed(card, single=single)}",
            errors=(
                {"pointer": "#/num_samples", "limit": there_are, "actual": request.num_samples},
            ),
        )
    defaults, asked, most = card.defaults, request.num_samples, card.max_num_samples
    if not single and asked is not None and most is not None and asked > most:
        raise ApiError(
            "invalid_request",
            f"num_samples must be at most {most} for adapter {card.name}, got {asked}: its samples "
            "take memory",
            errors=({"pointer": "#/num_samples", "limit": most, "actual": asked},),
        )
    allowed = card.designs if there_are is None else (defaults.design,)
    if request.design not in (None, *allowed):
        why = (
            f"method {card.method} of adapter {card.name} draws no other"
            if there_are is None
            else _why_fixed(card, single=single)
        )
        raise ApiError(
            "invalid_request",
            f"design must be {' or '.join(allowed)} or left out, got {request.design}: {why}",
            errors=({"pointer": "#/design"},),
        )
    return replace(
        defaults,
        estimator=estimator,
        design=request.design or defaults.design,
        num_samples=there_are or asked or defaults.num_samples,
        # what is not drawn has no seed; leaving the default lets such rows share batches
        seed=defaults.seed if there_are or request.seed is None else request.seed,
    )


def _check_fixed(request: ClassifyRequest, card: AdapterCard, reason: str) -> None:
    """Refuse every other sampling than the adapter's own, also what has no effect elsewhere."""
    for name in ("num_samples", "seed", "estimator", "design"):
        asked, own = getattr(request, name), getattr(card.defaults, name)
        if asked not in (None, own):
            raise ApiError(
                "invalid_request",
                f"{name} must be {own} or left out, got {asked}: {reason}",
                errors=({"pointer": f"#/{name}"},),
            )


def _why_fixed(card: AdapterCard, *, single: bool) -> str:
    if card.point_method:
        return f"adapter {card.name} does not sample (method {card.method})"
    if single:
        return "the mean_mask estimator is one deterministic pass"
    return f"adapter {card.name} has {card.fixed_functions} functions (method {card.method})"
