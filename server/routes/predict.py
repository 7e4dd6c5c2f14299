"""``POST /predict``, as clients of text-embeddings-inference know it."""

from functools import partial

from fastapi import APIRouter, Request, Response
from pydantic import TypeAdapter

from server.errors import ApiError
from server.parsing import check_limits, check_num_rows, parse_json, validate
from server.ports import RowScores
from server.routes.documents import error_documents
from server.routes.exchange import HEADER_PARAMETERS, answer, exchange, in_words_of
from server.schemas import ClassifyRequest
from server.schemas.examples import PREDICT_EXAMPLES
from server.schemas.predict import Prediction, PredictRequest
from server.settings import Settings

__all__ = ["router"]

router = APIRouter(tags=["other shapes"])

_Answer = list[Prediction] | list[list[Prediction]]
_ANSWER: TypeAdapter[_Answer] = TypeAdapter(_Answer)
_POINTERS = {"#/input": "#/inputs"}
_BODY = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {
                "schema": {"$ref": "#/components/schemas/PredictRequest"},
                "examples": PREDICT_EXAMPLES,
            }
        },
    },
    "parameters": [
        {
            "name": "model",
            "in": "query",
            "required": False,
            "schema": {"type": "string"},
            "description": "Adapter, where the body does not name one.",
        },
        *HEADER_PARAMETERS,
    ],
}


@router.post(
    "/predict",
    operation_id="predict",
    summary="Classify as text-embeddings-inference does",
    response_model=_Answer,
    responses=error_documents(400, 404, 408, 413, 415, 422, 429, 500, 503, 504),
    openapi_extra=_BODY,
)
async def predict(request: Request) -> Response:
    """All labels of each text with their probabilities, best first: a list, or a list of lists.

    The header `X-Decision` has the decision of each text, `accept`, `review` or `abstain`, with
    commas between them.
    """
    try:
        parse = partial(_parse, asked=request.query_params.get("model"))
        parsed, outcome = await exchange(request, parse)
    except ApiError as error:
        raise in_words_of(error, _POINTERS) from None
    rows = [_ranked(scores) for scores in outcome.answer.rows]
    found: _Answer = rows if isinstance(parsed.input, list) else rows[0]
    response = answer(request, outcome, lambda: _ANSWER.dump_json(found).decode())
    response.headers["X-Decision"] = ",".join(verdict.decision for verdict in outcome.verdicts)
    return response


def _parse(body: bytes, settings: Settings, *, asked: str | None) -> ClassifyRequest:
    document = parse_json(body)
    rows = document.get("inputs") if isinstance(document, dict) else None
    check_num_rows(rows, "inputs", settings)
    parsed = validate(document, PredictRequest)
    if asked is not None and parsed.model not in (None, asked):
        detail = "the body names another model than the query"
        raise ApiError("invalid_request", detail, errors=({"pointer": "#/model"},))
    request = validate(parsed.as_classify(asked or parsed.model), ClassifyRequest)
    check_limits(request, settings)
    return request


def _ranked(scores: RowScores) -> list[Prediction]:
    # a stable sort: equal probabilities keep the order of the labels
    pairs = sorted(zip(scores.labels, scores.probs, strict=True), key=lambda pair: -pair[1])
    return [Prediction(label=label, score=prob) for label, prob in pairs]
