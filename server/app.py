"""The app: parts put together, routes mounted, every error in one form."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.utils import get_openapi
from pydantic.json_schema import models_json_schema
from starlette.exceptions import HTTPException

from server import __version__
from server.batching import Admission, AdmissionLimits
from server.errors import ApiError, problem_response
from server.feedback import FeedbackStore, RiskMonitor, make_signer, make_store
from server.lifecycle import EngineFactory, Lifecycle
from server.middleware import Envelope, request_id_of
from server.parsing import MAX_FAULTS
from server.registry import AdapterRegistry
from server.routes import classify, feedback, health, models, policies
from server.schemas import ClassifyRequest, EvaluateRequest, FeedbackRequest, Problem
from server.service import Service, service_of
from server.settings import Settings
from server.telemetry import Telemetry

__all__ = ["create_app"]

_DESCRIPTION = (
    "Classification and multiple choice with a language model that says how far its answer can be "
    "trusted. Every answer carries probabilities, uncertainty in nats and a decision: `accept`, "
    "`review` or `abstain`. Abstaining is a 200."
)


def create_app(factory: EngineFactory, settings: Settings | None = None) -> FastAPI:
    """Return the app; the engine is made and loaded when the app starts, in a thread.

    Args:
        factory: Makes the engine; called once, in the loading thread, so it may import torch.
        settings: The environment's, if left out.

    Raises:
        FeedbackSetupError: The secret or the database of feedback cannot be used.
    """
    settings = settings or Settings()
    service = _make_service(factory, settings)
    app = FastAPI(
        title="Dalorra",
        version=__version__,
        description=_DESCRIPTION,
        openapi_url="/openapi.json" if settings.docs else None,
        docs_url="/docs" if settings.docs else None,
        redoc_url=None,
        redirect_slashes=False,
        lifespan=_lifespan,
    )
    app.state.service = service
    app.add_middleware(Envelope, telemetry=service.telemetry, error_base=settings.error_base)
    for routes in (classify, feedback, policies, models, health):
        app.include_router(routes.router)
    app.add_exception_handler(ApiError, _on_api_error)
    app.add_exception_handler(HTTPException, _on_http_error)
    app.add_exception_handler(RequestValidationError, _on_validation_error)
    app.openapi = lambda: _openapi(app)
    return app


def _make_service(factory: EngineFactory, settings: Settings) -> Service:
    telemetry = Telemetry(git_sha=settings.git_sha)
    registry = AdapterRegistry()
    limits = AdmissionLimits(
        max_requests=settings.max_requests,
        max_rows=settings.max_queued_rows,
        max_tokens=settings.max_queued_tokens,
    )
    admission = Admission(limits)
    return Service(
        settings=settings,
        telemetry=telemetry,
        registry=registry,
        admission=admission,
        lifecycle=Lifecycle(factory, settings, registry, admission, telemetry),
        encoders=ThreadPoolExecutor(settings.encode_threads, thread_name_prefix="dalorra-encode"),
        what_if=ThreadPoolExecutor(1, thread_name_prefix="dalorra-what-if"),
        signer=make_signer(settings),
        feedback=_make_feedback(settings, telemetry),
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
        await service.lifecycle.stop()
        for threads in (service.encoders, service.what_if):
            threads.shutdown(wait=False, cancel_futures=True)


def _problem(request: Request, error: ApiError) -> Response:
    return problem_response(
        error,
        instance=request.url.path,
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
        found = ApiError("not_found", f"there is no route {request.url.path[:200]}")
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
                (ClassifyRequest, "validation"),
                (EvaluateRequest, "validation"),
                (FeedbackRequest, "validation"),
                (Problem, "serialization"),
            ],
            ref_template="#/components/schemas/{model}",
        )
        document["components"]["schemas"] |= extra["$defs"]
        app.openapi_schema = document
    return app.openapi_schema
