"""``GET /v1/models`` and ``GET /v1/models/{id}``: what is loaded."""

from fastapi import APIRouter, Request

from server.adapters import Slot
from server.middleware import request_id_of
from server.routes.documents import error_documents
from server.routes.present import model_card
from server.schemas import ModelCard, ModelList
from server.service import Service, service_of

__all__ = ["router"]

router = APIRouter(prefix="/v1/models", tags=["models"], responses=error_documents(503))


@router.get("", operation_id="list_models", summary="List the loaded adapters")
async def list_models(request: Request) -> ModelList:
    """Return the card of every adapter that can be asked."""
    service = service_of(request)
    service.lifecycle.require_serving()
    return ModelList(data=[_card(service, slot) for slot in service.adapters.registry.slots])


@router.get(
    "/{model_id}",
    operation_id="get_model",
    summary="Show one adapter",
    responses=error_documents(404),
)
async def get_model(request: Request, model_id: str) -> ModelCard:
    """Return the card of the adapter `name`, `name:revision` or `name@alias`."""
    service = service_of(request)
    service.lifecycle.require_serving()
    slot, _ = service.adapters.registry.resolve(model_id, request_id_of(request))
    return _card(service, slot)


def _card(service: Service, slot: Slot) -> ModelCard:
    """Return the card of an adapter, under the name that reaches it."""
    current = service.adapters.registry.is_current(slot)
    model_id = slot.name if current else slot.id
    return model_card(slot.card, service.settings, model_id=model_id, created=slot.loaded_at)
