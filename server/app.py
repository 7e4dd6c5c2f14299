"""The app: parts put together, routes mounted, every error in one form."""

import asyncio
import contextlib
import math
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.utils import get_openapi
from pydantic.json_schema import models_json_schema
from starlette.exceptions import HTTPException

from server import __version__
from server.adapters import AdapterManager
from server.auth import Doors, make_key_ring
from server.batching import Admission, AdmissionLimits
from server.errors import ApiError, problem_response
from server.feedback import FeedbackStore, RiskMonitor, make_signer, make_store
from server.lifecycle import EngineFactory, Lifecycle
from server.middleware import Envelope, instance_of, request_id_of
from server.parsing import MAX_FAULTS
from server.routes import (
    adapters,
    aliases,
    classify,
    feedback,
    health,
    kserve,
    models,
    policies,
    predict,
    reference,
)
from server.routes.documents import add_door_errors
from server.schemas import (
    AliasRequest,
    ClassifyRequest,
    EvaluateRequest,
    FeedbackRequest,
    InferRequest,
    LoadRequest,
    OipProblem,
    PinRequest,
    PredictRequest,
    Problem,
)
from server.service import Service, service_of
from server.settings import Settings
from server.shadow import Shadows
from server.telemetry import Telemetry
from server.tracing import make_tracing

__all__ = ["admission_limits", "create_app"]

_DESCRIPTION = (
    "Classification and multiple choice with a language model that says how far its answer can be "
    "trusted. Every answer carries probabilities, uncertainty in nats and a decision: `accept`, "
    "`review` or `abstain`. Abstaining is a 200."
)


def create_app(
    factory: EngineFactory, settings: Settings | None = None, *, administered: bool = True
) -> FastAPI:
    """Return the app; the engine is made and loaded when the app starts, in a thread.

    Args:
        factory: Makes the engine; called once, in the loading thread, so it may import torch.
        settings: The environment's, if left out.
        administered: Whether adapters and aliases can be changed over HTTP. Not where several
            replicas share one address: a change would reach one of them.

    Raises:
        FeedbackSetupError: The secret or the database of feedback cannot be used.
        KeyFileError: The file of API keys cannot be used.
        TracingSetupError: Traces cannot be sent as ``otel_endpoint`` says.
    """
    settings = settings or Settings()
    service = _make_service(factory, settings)
    app = FastAPI(
        title="Dalorra",
        version=__version__,
        description=_DESCRIPTION,
        openapi_url="/openapi.json" if settings.docs else None,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        lifespan=_lifespan,
    )
    app.state.service = service
    app.state.tracing = make_tracing(settings)
    keys = make_key_ring(settings, service.telemetry)
    app.add_middleware(
        Doors,
        keys=keys,
        local_only=keys is None and not settings.allow_unauthenticated,
        telemetry=service.telemetry,
        error_base=settings.error_base,
    )
    # added last, so it is the outermost
    app.add_middleware(
        Envelope,
        telemetry=service.telemetry,
        error_base=settings.error_base,
        tracing=app.state.tracing,
    )
    shapes = (classify, predict, kserve)
    administration = (adapters, aliases) if administered else ()
    for routes in (*shapes, feedback, policies, models, *administration, health):
        app.include_router(routes.router)
    if settings.docs:
        app.include_router(reference.router)
    app.add_exception_handler(ApiError, _on_api_error)
    app.add_exception_handler(HTTPException, _on_http_error)
    app.add_exception_handler(RequestValidationError, _on_validation_error)
    app.openapi = lambda: _openapi(app)
    return app


def _make_service(factory: EngineFactory, settings: Settings) -> Service:
    telemetry = Telemetry(git_sha=settings.git_sha)
    manager = AdapterManager(settings, telemetry)
    admission = Admission(admission_limits(settings))
    return Service(
        settings=settings,
        telemetry=telemetry,
        adapters=manager,
        admission=admission,
        lifecycle=Lifecycle(factory, settings, manager, admission, telemetry),
        encoders=ThreadPoolExecutor(settings.encode_threads, thread_name_prefix="dalorra-encode"),
        what_if=ThreadPoolExecutor(1, thread_name_prefix="dalorra-what-if"),
        shadows=Shadows(telemetry),
        signer=make_signer(settings),
        feedback=_make_feedback(settings, telemetry),
    )


def admission_limits(settings: Settings) -> AdmissionLimits:
    """Return how much may be inside the server under these settings."""
    return AdmissionLimits(
        max_requests=settings.max_requests,
        max_rows=settings.max_queued_rows,
        max_tokens=settings.max_queued_tokens,
        # by then everything that is inside now has met its deadline
        max_retry_after_s=math.ceil(settings.max_request_timeout_s),
        batch_share=settings.batch_priority_share,
    )


def _make_feedback(settings: Settings, telemetry: Telemetry) -> FeedbackStore | None:
    store = make_store(settings)
    if store is not None:
        telemetry.watch_feedback(RiskMonitor(store).read)
    return store


@contextlib.asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    service: Service = app.state.service
    service.lifecycle.start()
    if service.feedback is not None:
        service.feedback.start()
    try:
        yield
    finally:
        if service.feedback is not None:
            await asyncio.to_thread(service.feedback.close)
        await service.shadows.close()
        await service.lifecycle.stop()
        for threads in (service.encoders, service.what_if):
            threads.shutdown(wait=False, cancel_futures=True)
        await asyncio.to_thread(app.state.tracing.close)


def _problem(request: Request, error: ApiError) -> Response:
    return problem_response(
        error,
        instance=instance_of(request.scope),
        request_id=request_id_of(request),
        type_base=service_of(request).settings.error_base,
    )


async def _on_api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)  # noqa: S101 - registered for this type
    return _problem(request, error)


async def _on_http_error(request: Request, error: Exception) -> Response:
    """Turn the router's own errors into problems: unknown routes and methods."""
    assert isinstance(error, HTTPException)  # noqa: S101 - registered for this type
    headers = dict(error.headers or {})
    if error.status_code == 404:  # noqa: PLR2004
        found = ApiError("not_found", "there is no such route")
    elif error.status_code == 405:  # noqa: PLR2004
        allowed = headers.get("Allow") or headers.get("allow") or "another"
        detail = f"{request.method} is not allowed here; allowed: {allowed}"
        found = ApiError("method_not_allowed", detail, headers=headers)
    else:
        detail = str(error.detail)
        found = ApiError("http_error", detail, headers=headers, status=error.status_code)
    return _problem(request, found)


async def _on_validation_error(request: Request, error: Exception) -> Response:
    """Turn FastAPI's own validation (parameters of the path and the query) into a problem."""
    assert isinstance(error, RequestValidationError)  # noqa: S101 - registered for this type
    details = "; ".join(
        f"{fault['loc'][0]} parameter {str(fault['loc'][-1])[:64]}: {fault['msg']}"
        for fault in error.errors()[:MAX_FAULTS]
    )
    return _problem(request, ApiError("invalid_request", details))


def _openapi(app: FastAPI) -> dict[str, Any]:
    """Return the OpenAPI document; adds the schemas that routes read by hand."""
    if app.openapi_schema is None:
        document = get_openapi(
            title=app.title,
            version=app.version,
            description=app.description,
            routes=app.routes,
        )
        _, extra = models_json_schema(
            [
                (AliasRequest, "validation"),
                (ClassifyRequest, "validation"),
                (EvaluateRequest, "validation"),
                (FeedbackRequest, "validation"),
                (InferRequest, "validation"),
                (PredictRequest, "validation"),
                (LoadRequest, "validation"),
                (PinRequest, "validation"),
                (OipProblem, "serialization"),
                (Problem, "serialization"),
            ],
            ref_template="#/components/schemas/{model}",
        )
        document["components"]["schemas"] |= extra["$defs"]
        add_door_errors(document)
        app.openapi_schema = document
    return app.openapi_schema
