"""``POST /v1/feedback``: the true label of an answer, by its signed id."""

import asyncio
import time

from fastapi import APIRouter, Request, Response
from starlette.requests import ClientDisconnect

from server.errors import ApiError
from server.feedback import (
    BadPredictionIdError,
    ExpiredPredictionError,
    FeedbackConflictError,
    FeedbackStore,
    FeedbackUnavailableError,
    PredictionClaim,
)
from server.lookup import close_names, quoted
from server.middleware import arrival_s
from server.parsing import check_body_headers, parse_document, read_body
from server.ports import AdapterCard
from server.routes.documents import error_documents
from server.ruling import INLINE
from server.schemas import FeedbackRequest, FeedbackResponse
from server.service import Service, service_of

__all__ = ["router"]

router = APIRouter(tags=["feedback"])

RETRY_S = 5
_REJECTIONS = {
    "prediction_not_found": "bad_prediction_id",
    "model_not_found": "unknown_adapter",
    "unknown_label": "unknown_label",
    "feedback_conflict": "conflict",
    "feedback_unavailable": "unavailable",
}
_BODY = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {"schema": {"$ref": "#/components/schemas/FeedbackRequest"}}
        },
    }
}


@router.post(
    "/v1/feedback",
    operation_id="give_feedback",
    summary="Say what the right label was",
    status_code=202,
    response_model=FeedbackResponse,
    responses=error_documents(400, 404, 408, 409, 413, 415, 422, 500, 503, 504),
    openapi_extra=_BODY,
)
async def give_feedback(request: Request) -> Response:
    """Store the true label of one answer; once this is 202, it outlives a crash.

    Sending the same label again changes nothing; another label for the same answer is a 409.
    """
    service = service_of(request)
    store = service.feedback
    if store is None:
        raise ApiError("feedback_disabled", "feedback is turned off here (feedback_url is off)")
    timeout_s = service.settings.request_timeout_s
    try:
        service.lifecycle.require_serving()
        check_body_headers(request, service.settings.max_body_bytes)
        async with asyncio.timeout(arrival_s(request) + timeout_s - time.monotonic()):
            return await _answer(service, store, request)
    except TimeoutError:
        detail = f"the label was not stored within {timeout_s:g} s, or just then; send it again"
        raise ApiError("deadline_exceeded", detail) from None
    except ClientDisconnect:
        raise ApiError("client_disconnected", "the client left before the answer") from None
    except FeedbackUnavailableError as error:
        service.telemetry.feedback_rejected("unavailable")
        retry = {"Retry-After": str(RETRY_S)}
        raise ApiError("feedback_unavailable", str(error), headers=retry) from None
    except ApiError as error:
        if error.code in _REJECTIONS:
            service.telemetry.feedback_rejected(_REJECTIONS[error.code])
        raise


async def _answer(service: Service, store: FeedbackStore, request: Request) -> Response:
    body = await read_body(request, service.settings)
    parsed = parse_document(body, FeedbackRequest)
    claim = _verify(service, parsed.prediction_id)
    label = true_label(_loaded_card(service, claim), parsed.label)
    try:
        with store.enter():  # only now: a client that is slow to send its body holds no place
            result = await store.add(claim, label, parsed.source)
    except FeedbackConflictError as error:
        fault = {"pointer": "#/label", "code": "feedback_conflict"}
        raise ApiError("feedback_conflict", str(error), errors=(fault,)) from None
    except ExpiredPredictionError as error:
        raise _not_found(str(error)) from None
    # answers with another sampling say nothing about the adapter as it is calibrated
    if result.stored and claim.default_sampling:
        service.telemetry.feedback(
            adapter=claim.adapter,
            revision=claim.revision,
            # an accept by a client's own limits is not held against the adapter's targets
            decision=None if claim.policy == INLINE else claim.decision,
            confidence=claim.confidence,
            correct=result.correct,
        )
    answer = FeedbackResponse(
        prediction_id=parsed.prediction_id,
        outcome="correct" if result.correct else "wrong",
        stored=result.stored,
    )
    return Response(answer.model_dump_json(), status_code=202, media_type="application/json")


def _verify(service: Service, prediction_id: str) -> PredictionClaim:
    try:
        return service.signer.verify(prediction_id)
    except BadPredictionIdError as error:
        raise _not_found(str(error)) from None


def _loaded_card(service: Service, claim: PredictionClaim) -> AdapterCard:
    """Return the adapter of a prediction, in whatever revision it is loaded now.

    Labels come in long after the answers; they are kept under the revision that answered.
    """
    for card in service.adapters.registry.cards:
        if card.name == claim.adapter:
            return card
    fault = {"pointer": "#/prediction_id", "code": "model_not_found"}
    detail = f"the adapter of this prediction, {claim.adapter}, is not loaded"
    raise ApiError("model_not_found", detail, errors=(fault,))


def true_label(card: AdapterCard, label: str | None) -> str | None:
    """Return a label as it is stored: None stands for "none of the adapter's labels".

    Raises:
        ApiError: 422 with close names when the adapter has no such label.
    """
    if label is None or label in card.labels:
        return label
    if label == card.out_of_scope_label:
        return None
    known = (*card.labels, *([card.out_of_scope_label] if card.out_of_scope_label else []))
    close = close_names(label, known)
    advice = f"close names: {', '.join(close)}" if close else "null says: none of its labels"
    raise ApiError(
        "unknown_label",
        f"adapter {card.name} has no label {quoted(label)}; {advice}",
        errors=({"pointer": "#/label", "code": "unknown_label", "close_names": close},),
    )


def _not_found(detail: str) -> ApiError:
    fault = {"pointer": "#/prediction_id", "code": "prediction_not_found"}
    return ApiError("prediction_not_found", detail, errors=(fault,))
