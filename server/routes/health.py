"""Probes, metrics and versions. A probe that fails answers 503 with its reason."""

from fastapi import APIRouter, Request, Response
from prometheus_client.exposition import choose_encoder

from server import __version__
from server.errors import ApiError
from server.routes.documents import error_documents
from server.schemas import HealthResponse, VersionResponse
from server.service import service_of
from server.telemetry import torch_version

__all__ = ["router"]

router = APIRouter(tags=["operations"])


@router.get("/health/live", operation_id="live", responses=error_documents(503))
@router.get("/livez", include_in_schema=False)
@router.head("/health/live", include_in_schema=False)
@router.head("/livez", include_in_schema=False)
async def live(request: Request) -> HealthResponse:
    """Whether the process works. 503 means that only a restart helps: the engine has died."""
    if service_of(request).lifecycle.engine_dead:
        raise ApiError("engine_unavailable", "the engine has died; restart the server")
    return HealthResponse()


@router.get("/health/ready", operation_id="ready", responses=error_documents(503))
@router.get("/readyz", include_in_schema=False)
@router.get("/health", include_in_schema=False)
@router.head("/health/ready", include_in_schema=False)
@router.head("/readyz", include_in_schema=False)
@router.head("/health", include_in_schema=False)
async def ready(request: Request) -> HealthResponse:
    """Whether new traffic is welcome: loaded, checked, not draining, engine alive and moving."""
    service_of(request).lifecycle.require_ready()
    return HealthResponse()


@router.get("/health/startup", operation_id="startup", responses=error_documents(503))
@router.head("/health/startup", include_in_schema=False)
async def startup(request: Request) -> HealthResponse:
    """Whether the model has been loaded; stays true while draining."""
    if service_of(request).lifecycle.phase in ("loading", "failed"):
        service_of(request).lifecycle.require_serving()
    return HealthResponse()


@router.get("/metrics", operation_id="metrics", response_class=Response)
async def metrics(request: Request) -> Response:
    """Prometheus metrics, as text or as OpenMetrics by `Accept`."""
    encode, content_type = choose_encoder(request.headers.get("accept", ""))
    text = encode(service_of(request).telemetry)
    return Response(text, headers={"Content-Type": content_type})


@router.get("/version", operation_id="version")
async def version(request: Request) -> VersionResponse:
    """What runs here."""
    git = service_of(request).settings.git_sha
    return VersionResponse(version=__version__, git=git, torch=torch_version())
