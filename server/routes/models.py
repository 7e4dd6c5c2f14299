"""``GET /v1/models`` and ``GET /v1/models/{id}``: what is loaded."""

from fastapi import APIRouter, Request

from server.routes.documents import error_documents
from server.routes.present import model_card
from server.schemas import ModelCard, ModelList
from server.service import service_of

__all__ = ["router"]

router = APIRouter(prefix="/v1/models", tags=["models"], responses=error_documents(503))


@router.get("", operation_id="list_models", summary="List the loaded adapters")
async def list_models(request: Request) -> ModelList:
    """Return the card of every adapter that can be asked now."""
    service = service_of(request)
    service.lifecycle.require_serving()
    created = service.lifecycle.loaded_at
    cards = service.registry.cards
    return ModelList(data=[model_card(card, service.settings, created) for card in cards])


@router.get(
    "/{model_id}",
    operation_id="get_model",
    summary="Show one adapter",
    responses=error_documents(404),
)
async def get_model(request: Request, model_id: str) -> ModelCard:
    """Return the card of the adapter `name` or `name:revision`."""
    service = service_of(request)
    service.lifecycle.require_serving()
    card = service.registry.find(model_id)
    return model_card(card, service.settings, service.lifecycle.loaded_at)
