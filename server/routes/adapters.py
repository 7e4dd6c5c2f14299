"""``/v1/adapters``: load, unload, pin and list adapters while the server runs (scope ``admin``)."""

import time

from fastapi import APIRouter, Request, Response

from server.adapters import Slot
from server.adapters.manager import StoredSource
from server.routes.bodies import read_document
from server.routes.documents import error_documents, json_body
from server.schemas import AdapterEntry, AdapterList, LoadRequest, PinRequest, Removed, StoredEntry
from server.service import Service, service_of

__all__ = ["router"]

router = APIRouter(prefix="/v1/adapters", tags=["administration"])


@router.get(
    "",
    operation_id="list_adapters",
    summary="List loaded adapters and those that can be loaded",
    responses=error_documents(401, 403, 503),
)
async def list_adapters(request: Request) -> AdapterList:
    """Everything known, in memory or put out of it, and what lies under the adapter root."""
    service = service_of(request)
    service.lifecycle.require_serving()
    manager = service.adapters
    stored = await manager.stored()
    return AdapterList(
        data=[_entry(service, slot) for slot in manager.registry.slots],
        stored=[_stored(one) for one in stored],
        memory_bytes=manager.residency.used_bytes,
        memory_limit_bytes=manager.residency.budget_bytes,
    )


@router.post(
    "",
    operation_id="load_adapter",
    summary="Load an adapter, or replace one under load",
    status_code=201,
    response_model=AdapterEntry,
    responses=error_documents(400, 401, 403, 404, 408, 409, 413, 415, 422, 429, 503),
    openapi_extra=json_body("LoadRequest"),
)
async def load_adapter(request: Request) -> Response:
    """Verify, load, warm and self-test an adapter, then let requests reach it.

    The answer comes when the adapter can be asked. Requests to the adapter that it replaces are
    finished by that one.
    """
    service = service_of(request)
    service.lifecycle.require_serving()
    asked = await read_document(request, LoadRequest)
    slot = await service.adapters.load(
        asked.source, name=asked.name, pin=asked.pin, activate=asked.activate
    )
    body = _entry(service, slot, saved=await service.adapters.save())
    return Response(body.model_dump_json(), status_code=201, media_type="application/json")


@router.patch(
    "/{name}",
    operation_id="pin_adapter",
    summary="Pin an adapter in memory, or let it go",
    response_model=AdapterEntry,
    responses=error_documents(400, 401, 403, 404, 408, 409, 413, 415, 422, 503),
    openapi_extra=json_body("PinRequest"),
)
async def pin_adapter(request: Request, name: str) -> AdapterEntry:
    """Change whether `name` or `name:revision` stays in memory however long nobody asks it."""
    service = service_of(request)
    service.lifecycle.require_serving()
    asked = await read_document(request, PinRequest)
    slot = service.adapters.pin(name, pinned=asked.pinned)
    return _entry(service, slot, saved=await service.adapters.save())


@router.delete(
    "/{name}",
    operation_id="unload_adapter",
    summary="Unload an adapter",
    responses=error_documents(401, 403, 404, 409, 503),
)
async def unload_adapter(request: Request, name: str) -> Removed:
    """Take `name` or `name:revision` out; what it is answering now is finished first."""
    service = service_of(request)
    service.lifecycle.require_serving()
    slot = service.adapters.unload(name)
    return Removed(id=slot.id, saved=await service.adapters.save())


def _entry(service: Service, slot: Slot, *, saved: bool | None = None) -> AdapterEntry:
    registry, card = service.adapters.registry, slot.card
    return AdapterEntry(
        id=slot.id,
        name=slot.name,
        revision=slot.revision,
        source=slot.source,
        current=registry.is_current(slot),
        state="resident" if slot.resident else "evicted",
        pinned=slot.pinned,
        aliases=registry.aliases_of(slot),
        method=card.method,
        num_classes=len(card.labels),
        memory_bytes=card.memory_bytes,
        signed_by=card.signed_by,
        in_flight=slot.leases,
        idle_s=max(0.0, time.monotonic() - slot.used_s),
        loaded_at=slot.loaded_at,
        saved=saved,
    )


def _stored(one: StoredSource) -> StoredEntry:
    stored = one.stored
    return StoredEntry(
        source=one.source,
        name=stored.name,
        revision=stored.revision,
        method=stored.method,
        num_classes=stored.num_labels,
        num_bytes=stored.num_bytes,
        signed=stored.signed,
        calibrated=stored.calibrated,
        problem=stored.problem,
    )
