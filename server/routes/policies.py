"""What-if questions: the risk-coverage curve of an adapter, and dry runs of policies."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from dataclasses import asdict
from typing import Annotated

from fastapi import APIRouter, Query, Request
from starlette.requests import ClientDisconnect

from server.errors import ApiError
from server.middleware import arrival_s
from server.parsing import check_body_headers, parse_document, read_body
from server.routes.documents import error_documents
from server.routes.receipts import policy_card, side_that_passes
from server.schemas import (
    EvaluateRequest,
    EvaluationResponse,
    RiskCoverageQuery,
    RiskCoverageResponse,
)
from server.schemas.examples import EVALUATE_EXAMPLES
from server.schemas.receipts import RiskPoint
from server.service import service_of
from server.what_if import evaluate_policy, risk_coverage

__all__ = ["router"]

router = APIRouter(tags=["policies"])

_BODY = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {
                "schema": {"$ref": "#/components/schemas/EvaluateRequest"},
                "examples": EVALUATE_EXAMPLES,
            }
        },
    },
}


@router.get(
    "/v1/models/{model_id}/risk-coverage",
    operation_id="risk_coverage",
    summary="Show what accepting at each threshold does",
    responses=error_documents(404, 422, 503, 504),
)
async def get_risk_coverage(
    request: Request, model_id: str, query: Annotated[RiskCoverageQuery, Query()]
) -> RiskCoverageResponse:
    """Coverage, risk and its upper bound on the stored calibration rows, surest threshold first.

    To choose a threshold, name the risk you accept (`{"policy": {"max_risk": 0.05}}`): a bound
    of the best of many points is too low.
    """
    _check_each_once(request)
    async with _deadline(request):
        curve = await risk_coverage(service_of(request), model_id, query)
    return RiskCoverageResponse(
        model=f"{curve.card.name}:{curve.card.revision}",
        score=curve.score,
        passes=side_that_passes(curve.score),
        out_of_scope_share=curve.out_of_scope_share,
        delta=query.delta,
        points=[RiskPoint(**asdict(point)) for point in curve.points],
        void=curve.card.calibration.void if curve.card.calibration else None,
    )


@router.post(
    "/v1/policies/evaluate",
    operation_id="evaluate_policy",
    summary="Try a policy on the stored calibration rows",
    responses=error_documents(400, 404, 408, 413, 415, 422, 503, 504),
    openapi_extra=_BODY,
)
async def evaluate(request: Request) -> EvaluationResponse:
    """Expected shares of accept, review and abstain, and the risk of the accepted answers.

    Nothing is classified, and nothing on the server changes.
    """
    service = service_of(request)
    service.lifecycle.require_serving()
    check_body_headers(request, service.settings.max_body_bytes)
    async with _deadline(request):
        try:
            body = await read_body(request, service.settings)
        except ClientDisconnect:
            raise ApiError("client_disconnected", "the client left before the answer") from None
        asked = parse_document(body, EvaluateRequest)
        found = await evaluate_policy(service, asked)
    return EvaluationResponse(
        model=f"{found.card.name}:{found.card.revision}",
        policy=policy_card(found.policy),
        out_of_scope_share=found.out_of_scope_share,
        delta=asked.delta,
        **asdict(found.result),
        void=found.card.calibration.void if found.card.calibration else None,
    )


@contextlib.asynccontextmanager
async def _deadline(request: Request) -> AsyncIterator[None]:
    """Give up what is not done in time, and turn that into a 504."""
    timeout_s = service_of(request).settings.request_timeout_s
    try:
        async with asyncio.timeout(arrival_s(request) + timeout_s - time.monotonic()):
            yield
    except TimeoutError:
        detail = f"no answer within the deadline of {timeout_s:g} s"
        raise ApiError("deadline_exceeded", detail) from None


def _check_each_once(request: Request) -> None:
    """Refuse a parameter that is given twice, as a key given twice in a body is."""
    names = [name for name, _ in request.query_params.multi_items()]
    for name in request.query_params:
        if names.count(name) > 1:
            raise ApiError("invalid_request", f"query parameter {name} is given twice")
