"""How the answers to a request are sampled."""

from dataclasses import replace

from server.errors import ApiError
from server.ports import AdapterCard, Design, Estimator, Sampling
from server.schemas import ClassifyRequest

__all__ = ["resolve_sampling"]


def resolve_sampling(request: ClassifyRequest, card: AdapterCard) -> Sampling:
    """Return the sampling of a request: the adapter's defaults with what the request changes.

    Raises:
        ApiError: 422 when the adapter has one sampling only and the request asks for another, when
            another number of samples is asked for than there are functions, or
            more than fit into the memory that the engine grants, or a design that the adapter
            cannot follow or that would have no effect, or an estimator that it has not.
    """
    if card.fixed_sampling is not None:
        _check_fixed(request, card, card.fixed_sampling)
    estimator = _estimator(request, card)
    defaults = (card.sampled or card.defaults) if estimator == "monte_carlo" else card.defaults
    there_are = _fixed_number(estimator, card)
    asked, most = request.num_samples, card.max_num_samples
    if there_are is not None and asked not in (None, there_are):
        raise ApiError(
            "invalid_request",
            f"num_samples must be {there_are} or left out: {_why_fixed(card, estimator)}",
            errors=({"pointer": "#/num_samples", "limit": there_are, "actual": asked},),
        )
    if there_are is None and asked is not None and most is not None and asked > most:
        raise ApiError(
            "invalid_request",
            f"num_samples must be at most {most} for adapter {card.name}, got {asked}: its samples "
            "take memory",
            errors=({"pointer": "#/num_samples", "limit": most, "actual": asked},),
        )
    own: tuple[Design, ...] = ("iid",) if estimator == "linearised" else (defaults.design,)
    allowed = card.designs if there_are is None else own
    if request.design not in (None, *allowed):
        why = (
            f"method {card.method} of adapter {card.name} draws no other"
            if there_are is None
            else _why_fixed(card, estimator)
        )
        raise ApiError(
            "invalid_request",
            f"design must be {' or '.join(allowed)} or left out, got {request.design}: {why}",
            errors=({"pointer": "#/design"},),
        )
    drawn = there_are is None or estimator == "linearised"
    return replace(
        defaults,
        estimator=estimator,
        design=request.design or (own[0] if there_are is not None else defaults.design),
        num_samples=there_are or asked or defaults.num_samples,
        # what is not drawn has no seed; leaving the default lets such rows share batches
        seed=defaults.seed if request.seed is None or not drawn else request.seed,
    )


def _estimator(request: ClassifyRequest, card: AdapterCard) -> Estimator:
    """Return what is to answer; who names a number or a design asks for samples.

    Raises:
        ApiError: 422 when the adapter cannot be linearised.
    """
    if request.estimator is None:
        samples_asked = request.num_samples is not None or request.design is not None
        linearised = card.defaults.estimator == "linearised"
        return "monte_carlo" if samples_asked and linearised else card.defaults.estimator
    if request.estimator == "linearised" and card.linearised_draws is None:
        raise ApiError(
            "invalid_request",
            "estimator must be monte_carlo or mean_mask or left out, got linearised: that needs "
            "method dalorra with hard masks, few labels and the engine in this process; adapter "
            f"{card.name} is of method {card.method} and has {len(card.labels)} labels",
            errors=({"pointer": "#/estimator"},),
        )
    return request.estimator


def _fixed_number(estimator: Estimator, card: AdapterCard) -> int | None:
    """Return how many answers are averaged where nobody can choose; else None."""
    if estimator == "linearised":
        return card.linearised_draws
    if estimator == "mean_mask" or card.point_method:
        return 1
    return card.fixed_functions


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


def _why_fixed(card: AdapterCard, estimator: Estimator) -> str:
    if card.point_method:
        return f"adapter {card.name} does not sample (method {card.method})"
    if estimator == "linearised":
        return "draws of the linearised network cost no pass"
    if estimator == "mean_mask":
        return "the mean_mask estimator is one deterministic pass"
    return f"adapter {card.name} has {card.fixed_functions} functions (method {card.method})"
