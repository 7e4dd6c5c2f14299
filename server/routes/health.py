"""Probes, metrics and versions. A probe that fails answers 503 with its reason.

No probe touches the model or a lock that the engine holds.
"""

from fastapi import APIRouter, Request, Response
from prometheus_client.exposition import choose_encoder

from server import __version__
from server.routes.documents import error_documents
from server.schemas import HealthResponse, VersionResponse
from server.service import service_of
from server.telemetry import torch_version

__all__ = ["router"]

router = APIRouter(tags=["operations"])
_V2_ERRORS = error_documents(503, schema="OipProblem")


@router.get("/health/live", operation_id="live", responses=error_documents(503))
@router.get("/v2/health/live", operation_id="v2_live", responses=_V2_ERRORS)
@router.get("/livez", include_in_schema=False)
@router.head("/health/live", include_in_schema=False)
@router.head("/v2/health/live", include_in_schema=False)
@router.head("/livez", include_in_schema=False)
async def live(request: Request) -> HealthResponse:
    """Whether the process works. 503: the engine was lost too often, and only a restart helps."""
    service_of(request).lifecycle.require_alive()
    return HealthResponse()


@router.get("/health/ready", operation_id="ready", responses=error_documents(503))
@router.get("/v2/health/ready", operation_id="v2_ready", responses=_V2_ERRORS)
@router.get("/readyz", include_in_schema=False)
@router.get("/health", include_in_schema=False)
@router.head("/health/ready", include_in_schema=False)
@router.head("/v2/health/ready", include_in_schema=False)
@router.head("/readyz", include_in_schema=False)
@router.head("/health", include_in_schema=False)
async def ready(request: Request) -> HealthResponse:
    """Whether new traffic is welcome: loaded, not draining, engine at work, self tests passed."""
    service_of(request).lifecycle.require_ready()
    return HealthResponse()


@router.get("/health/startup", operation_id="startup", responses=error_documents(503))
@router.head("/health/startup", include_in_schema=False)
async def startup(request: Request) -> HealthResponse:
    """Whether the model has been loaded; stays true while draining or restarting the engine."""
    service_of(request).lifecycle.require_started()
    return HealthResponse()


@router.get("/metrics", operation_id="metrics", response_class=Response)
async def metrics(request: Request) -> Response:
    """Prometheus metrics, as text or as OpenMetrics by `Accept`."""
    try:
        encode, content_type = choose_encoder(request.headers.get("accept", ""))
    except (TypeError, ValueError):  # a version of the format that is no version
        encode, content_type = choose_encoder("")
    text = encode(service_of(request).telemetry)
    return Response(text, headers={"Content-Type": content_type})


@router.get("/version", operation_id="version")
async def version(request: Request) -> VersionResponse:
    """What runs here."""
    git = service_of(request).settings.git_sha
    return VersionResponse(version=__version__, git=git, torch=torch_version())
