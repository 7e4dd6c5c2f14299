"""Questions about policies, answered from the rows an adapter was calibrated on."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from server.errors import ApiError
from server.logs import current_request_id
from server.ports import (
    AdapterCard,
    EngineStoppedError,
    NotCalibratedError,
    Policy,
    PolicyEvaluation,
    RiskCoveragePoint,
    ScoreName,
)
from server.ruling import check_applicable, choose_policy
from server.schemas import EvaluateRequest, RiskCoverageQuery
from server.service import Service, engine_stopped

__all__ = ["Curve", "Evaluation", "evaluate_policy", "risk_coverage"]

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Curve:
    """A risk-coverage curve and what it was asked for."""

    card: AdapterCard
    score: ScoreName
    out_of_scope_share: float
    points: tuple[RiskCoveragePoint, ...]


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What a policy would do, and what was asked."""

    card: AdapterCard
    policy: Policy
    out_of_scope_share: float
    result: PolicyEvaluation


async def risk_coverage(service: Service, model: str, query: RiskCoverageQuery) -> Curve:
    """Return the risk-coverage curve of a score.

    Raises:
        ApiError: 404 for an unknown adapter, 422 when its stored rows cannot answer this.
    """
    service.lifecycle.require_serving()
    async with service.adapters.lease(model, current_request_id()) as lease:
        card, engine = lease.card, lease.engine
        share = _share(card, query.out_of_scope_share)
        score = query.score or _first_score(card)
        points = await _in_thread(
            service,
            lambda: engine.risk_coverage(
                card.key, score, out_of_scope_share=share, delta=query.delta
            ),
        )
    return Curve(card, score, share, points)


async def evaluate_policy(service: Service, request: EvaluateRequest) -> Evaluation:
    """Return what a policy would do; a locked policy plays no part in it.

    Raises:
        ApiError: 404 for an unknown adapter, 422 when there is no such policy or the adapter's
            stored rows cannot answer this.
    """
    service.lifecycle.require_serving()
    async with service.adapters.lease(request.model, current_request_id()) as lease:
        card, engine = lease.card, lease.engine
        policy = choose_policy(card, request.policy)
        check_applicable(policy, card.defaults, card)
        share = _share(card, request.out_of_scope_share)
        result = await _in_thread(
            service,
            lambda: engine.evaluate_policy(
                card.key, policy, out_of_scope_share=share, delta=request.delta
            ),
        )
    return Evaluation(card, policy, share, result)


async def _in_thread(service: Service, ask: Callable[[], T]) -> T:
    try:
        return await asyncio.get_running_loop().run_in_executor(service.what_if, ask)
    except EngineStoppedError:
        raise engine_stopped() from None
    except NotCalibratedError as error:
        raise ApiError("not_calibrated", str(error)) from None
    except ValueError as error:
        fault = {"pointer": "#/out_of_scope_share"}
        raise ApiError("invalid_request", str(error), errors=(fault,)) from None


def _share(card: AdapterCard, asked: float | None) -> float:
    """Return the asked out-of-scope share, else that of the adapter's first certificate, else 0."""
    if asked is not None:
        return asked
    shares = (policy.guarantee.out_of_scope_share for policy in card.policies if policy.guarantee)
    return next(shares, 0.0)


def _first_score(card: AdapterCard) -> ScoreName:
    for policy in card.policies:
        for limit in policy.accept or ():
            return limit.score
    return "confidence"
