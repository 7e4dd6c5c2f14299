"""The Open Inference Protocol (KServe v2): metadata, readiness and inference of text adapters.

``/v2/health/*`` stands with the other probes. Errors have the protocol's ``{"error": "..."}``; see
``server.errors``, which gives it to everything under ``/v2``.
"""

from functools import partial

from fastapi import APIRouter, Request, Response

from server import __version__
from server.errors import ApiError
from server.middleware import request_id_of
from server.parsing import check_limits, check_num_rows, parse_json, validate
from server.ports import AdapterCard
from server.routes.documents import error_documents
from server.routes.exchange import HEADER_PARAMETERS, answer, exchange, in_words_of
from server.schemas import ClassifyRequest
from server.schemas.examples import INFER_EXAMPLES
from server.schemas.kserve import (
    InferRequest,
    InferResponse,
    ModelMetadata,
    ModelReady,
    OutputName,
    OutputTensor,
    ServerMetadata,
    TensorMetadata,
)
from server.service import Outcome, service_of
from server.settings import Settings

__all__ = ["router"]

router = APIRouter(prefix="/v2", tags=["other shapes"])

_SCHEMA = "OipProblem"
_POINTERS = {
    "#/input": "#/inputs/0/data",
    "#/num_samples": "#/parameters/num_samples",
    "#/seed": "#/parameters/seed",
    "#/design": "#/parameters/design",
    "#/policy": "#/parameters/policy",
}
_BODY = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {
                "schema": {"$ref": "#/components/schemas/InferRequest"},
                "examples": INFER_EXAMPLES,
            }
        },
    },
    "parameters": HEADER_PARAMETERS,
}


@router.get(
    "", operation_id="server_metadata", summary="Name and version, for clients of KServe v2"
)
async def server_metadata() -> ServerMetadata:
    """What runs here; no extension of the protocol is spoken."""
    return ServerMetadata(version=__version__)


@router.get(
    "/models/{model}",
    operation_id="model_metadata",
    summary="Input and outputs of an adapter, for clients of KServe v2",
    responses=error_documents(404, 422, 503, schema=_SCHEMA),
)
async def model_metadata(request: Request, model: str) -> ModelMetadata:
    """The tensors of the adapter `name`, `name:revision` or `name@alias`."""
    service_of(request).lifecycle.require_serving()
    card = _card(request, model)
    return ModelMetadata(
        name=card.name,
        versions=[card.revision],
        inputs=[TensorMetadata(name="text", datatype="BYTES", shape=[-1])],
        outputs=[
            _form(name, -1, len(card.labels)) for name in _outputs_of(sampled=not card.point_method)
        ],
        labels=list(card.labels),
    )


@router.get(
    "/models/{model}/ready",
    operation_id="model_ready",
    summary="Whether an adapter can be asked, for clients of KServe v2",
    responses=error_documents(404, 422, 503, schema=_SCHEMA),
)
async def model_ready(request: Request, model: str) -> ModelReady:
    """Ready is 200; anything else is the reason why not."""
    service_of(request).lifecycle.require_ready()
    return ModelReady(name=_card(request, model).name)


@router.post(
    "/models/{model}/infer",
    operation_id="infer",
    summary="Classify as KServe v2 does",
    response_model=InferResponse,
    responses=error_documents(400, 404, 408, 413, 415, 422, 429, 500, 503, 504, schema=_SCHEMA),
    openapi_extra=_BODY,
)
async def infer(request: Request, model: str) -> Response:
    """One tensor of texts in, and label, probabilities, uncertainty and decision out.

    Tensors are JSON: the extension for binary data is not spoken. `mutual_information` is left out
    where nothing was sampled.
    """
    asked: list[InferRequest] = []
    if "inference-header-content-length" in request.headers:
        raise ApiError("unsupported_media_type", "binary tensors are not spoken here; send JSON")
    try:
        _, outcome = await exchange(request, partial(_parse, model=model, asked=asked))
        names = _outputs(asked[0], outcome)
    except ApiError as error:
        raise in_words_of(error, _POINTERS) from None
    return answer(request, outcome, lambda: _write(asked[0], names, outcome))


def _card(request: Request, model: str) -> AdapterCard:
    """Return the adapter of a path.

    Raises:
        ApiError: 404 when there is none, 422 when it answers questions, which no tensor here holds.
    """
    registry = service_of(request).adapters.registry
    card = registry.resolve(model, request_id_of(request))[0].card
    if card.kind != "text":
        detail = f"adapter {card.name} answers {card.kind} input, which only /v1/classify can carry"
        raise ApiError("invalid_request", detail, errors=({"code": "wrong_input_form"},))
    return card


def _parse(
    body: bytes, settings: Settings, *, model: str, asked: list[InferRequest]
) -> ClassifyRequest:
    """Return the request in our words, and put the original into ``asked``."""
    document = parse_json(body)
    check_num_rows(_data(document), "inputs/0/data", settings)
    asked.append(validate(document, InferRequest))
    request = validate(asked[0].as_classify(model), ClassifyRequest)
    check_limits(request, settings)
    return request


def _data(document: object) -> object:
    """Return what a body of any form has where the texts should be."""
    inputs = document.get("inputs") if isinstance(document, dict) else None
    first = inputs[0] if isinstance(inputs, list) and inputs else None
    return first.get("data") if isinstance(first, dict) else None


_MI: OutputName = "mutual_information"
_OUTPUTS: list[OutputName] = [
    "label",
    "probs",
    "confidence",
    _MI,
    "decision",
    "prediction_id",
]


def _outputs_of(*, sampled: bool) -> list[OutputName]:
    """Return all tensors that there are."""
    return [name for name in _OUTPUTS if sampled or name != _MI]


def _outputs(asked: InferRequest, outcome: Outcome) -> list[OutputName]:
    """Return the tensors to send back, in the order asked for."""
    sampled = all(scores.mutual_information is not None for scores in outcome.answer.rows)
    names = asked.output_names()
    if names is None:
        return _outputs_of(sampled=sampled)
    if _MI in names and not sampled:
        raise ApiError(
            "invalid_request",
            f"there is no {_MI} here: adapter {outcome.card.name} does not sample",
            errors=({"pointer": f"#/outputs/{names.index(_MI)}/name"},),
        )
    return names


def _form(name: OutputName, num_rows: int, num_labels: int) -> TensorMetadata:
    numbers = name in ("probs", "confidence", _MI)
    return TensorMetadata(
        name=name,
        datatype="FP64" if numbers else "BYTES",
        shape=[num_rows, num_labels] if name == "probs" else [num_rows],
    )


def _write(asked: InferRequest, names: list[OutputName], outcome: Outcome) -> str:
    rows = outcome.answer.rows
    tensors: dict[OutputName, list[str] | list[float]] = {
        "label": [scores.label for scores in rows],
        "probs": [prob for scores in rows for prob in scores.probs],  # (n, C), row after row
        "confidence": [scores.confidence for scores in rows],
        _MI: [scores.mutual_information or 0.0 for scores in rows],
        "decision": [verdict.decision for verdict in outcome.verdicts],
        "prediction_id": list(outcome.prediction_ids),
    }
    body = InferResponse(
        model_name=outcome.card.name,
        model_version=outcome.card.revision,
        id=asked.id,
        outputs=[
            OutputTensor(**dict(_form(name, len(rows), len(rows[0].labels))), data=tensors[name])
            for name in names
        ],
    )
    return body.model_dump_json(exclude={"id"} if asked.id is None else None)
