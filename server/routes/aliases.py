"""``/v1/aliases``: names such as ``triage@prod``, canaries and shadows (scope ``admin``)."""

import re

from fastapi import APIRouter, Request, Response

from server.adapters import NAME_PATTERN, Alias, ShadowTarget, Target
from server.errors import ApiError
from server.lookup import quoted
from server.routes.bodies import read_document
from server.routes.documents import error_documents, json_body
from server.schemas import AliasEntry, AliasList, AliasRequest, Removed
from server.schemas.adapters import AliasShadow, AliasTarget
from server.service import service_of

__all__ = ["router"]

router = APIRouter(prefix="/v1/aliases", tags=["administration"])

_NAME = re.compile(NAME_PATTERN.removeprefix("^").removesuffix("$"))


@router.get(
    "",
    operation_id="list_aliases",
    summary="List the aliases",
    responses=error_documents(401, 403, 503),
)
async def list_aliases(request: Request) -> AliasList:
    """Every alias with its targets and its shadow."""
    service = service_of(request)
    service.lifecycle.require_serving()
    return AliasList(data=[_entry(alias) for alias in service.adapters.registry.aliases])


@router.put(
    "/{name}",
    operation_id="set_alias",
    summary="Let an alias stand for adapters",
    response_model=AliasEntry,
    responses={
        201: {"model": AliasEntry, "description": "The alias is new."},
        **error_documents(400, 401, 403, 404, 408, 413, 415, 422, 503),
    },
    openapi_extra=json_body("AliasRequest"),
)
async def set_alias(request: Request, name: str) -> Response:
    """Point `name@alias` at one or more adapters, by weight, and at a shadow.

    The change holds for every request that comes after it; no request is failed by it.
    """
    service = service_of(request)
    service.lifecycle.require_serving()
    base, _, own = name.partition("@")
    if not (_NAME.fullmatch(base) and _NAME.fullmatch(own)):
        raise ApiError(
            "invalid_request",
            f"an alias is written name@alias, of letters, digits, '.', '_' and '-'; "
            f"got {quoted(name)}",
        )
    asked = await read_document(request, AliasRequest)
    shadow = ShadowTarget(asked.shadow.model, asked.shadow.share) if asked.shadow else None
    targets = tuple(Target(target.model, target.weight) for target in asked.targets)
    value = Alias(name, targets, shadow)
    new = service.adapters.set_alias(value)
    body = _entry(value, saved=await service.adapters.save())
    return Response(
        body.model_dump_json(), status_code=201 if new else 200, media_type="application/json"
    )


@router.delete(
    "/{name}",
    operation_id="remove_alias",
    summary="Remove an alias",
    responses=error_documents(401, 403, 404, 503),
)
async def remove_alias(request: Request, name: str) -> Removed:
    """Requests that name it are 404 from now on; the adapters stay."""
    service = service_of(request)
    service.lifecycle.require_serving()
    service.adapters.remove_alias(name)
    return Removed(id=name, saved=await service.adapters.save())


def _entry(alias: Alias, *, saved: bool | None = None) -> AliasEntry:
    total = sum(target.weight for target in alias.targets)
    return AliasEntry(
        id=alias.name,
        targets=[
            AliasTarget(model=one.model, weight=one.weight, share=one.weight / total)
            for one in alias.targets
        ],
        shadow=AliasShadow(model=alias.shadow.model, share=alias.shadow.share)
        if alias.shadow
        else None,
        saved=saved,
    )
