"""``POST /v1/classify`` and its alias, which vLLM's clients know."""

import time
import uuid

from fastapi import APIRouter, Request, Response

from server.parsing import parse_request
from server.routes.documents import error_documents
from server.routes.exchange import HEADER_PARAMETERS, answer, exchange
from server.routes.present import present_rows, sampling_card
from server.routes.receipts import policy_card, prediction_sets_card
from server.schemas import ClassifyRequest, ClassifyResponse
from server.schemas.examples import CLASSIFY_EXAMPLES
from server.schemas.responses import Timings, Usage
from server.service import Outcome

__all__ = ["router"]

router = APIRouter(tags=["classify"])

_BODY = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {
                "schema": {"$ref": "#/components/schemas/ClassifyRequest"},
                "examples": CLASSIFY_EXAMPLES,
            }
        },
    },
    "parameters": HEADER_PARAMETERS,
}


@router.post(
    "/v1/classify",
    operation_id="classify",
    summary="Classify texts, or answer multiple-choice questions, with uncertainty",
    response_model=ClassifyResponse,
    response_model_exclude_none=False,
    responses=error_documents(400, 404, 408, 413, 415, 422, 429, 500, 503, 504),
    openapi_extra=_BODY,
)
@router.post("/classify", include_in_schema=False)
async def classify(request: Request) -> Response:
    """Answer every row with a label, calibrated probabilities, uncertainty and a decision.

    Abstaining is a 200: read `decision` and `reasons`.
    """
    parsed, outcome = await exchange(request, parse_request)
    return answer(request, outcome, lambda: _write(parsed, outcome))


def _write(request: ClassifyRequest, outcome: Outcome) -> str:
    found, card, ruling = outcome.answer, outcome.card, outcome.ruling
    tokens = sum(row.num_tokens for row in outcome.rows)
    timings = Timings(
        queue_s=found.queue_s,
        tokenize_s=outcome.tokenize_s,
        forward_s=found.forward_s,
        uq_s=found.uq_s,
    )
    body = ClassifyResponse(
        id=f"classify-{uuid.uuid4().hex}",
        created=int(time.time()),
        model=f"{card.name}:{card.revision}",
        data=present_rows(request, outcome),
        policy=policy_card(ruling.policy, ruling.combined_with) if ruling.policy else None,
        prediction_sets=prediction_sets_card(card) if ruling.default_sampling else None,
        sampling=sampling_card(outcome.key.sampling, outcome.card, outcome.mask_set),
        usage=Usage(prompt_tokens=tokens, total_tokens=tokens),
        timings=timings if "timings" in request.include else None,
        metadata=request.metadata,
    )
    unasked = {"data": {"__all__": _unasked(request)}} | {
        name: True for name in ("timings", "metadata") if getattr(body, name) is None
    }
    return body.model_dump_json(exclude=unasked)


def _unasked(request: ClassifyRequest) -> set[str]:
    """Return the optional fields of a row that the request did not ask for."""
    asked = {"top": request.top_k is not None, "samples": "samples" in request.include}
    return {name for name, wanted in asked.items() if not wanted}
