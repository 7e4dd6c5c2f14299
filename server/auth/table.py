"""Which route needs which scope: one table. What is neither in it nor public is refused.

A path is compared with the templates in the way the router compares it, on the same decoded path,
so no spelling of a path can reach a route past its scope. A path that fits several templates needs
the scope of each, so the order in which the router tries them does not matter.
"""

import functools
import re
from collections.abc import Mapping
from typing import Literal

from starlette.routing import compile_path

__all__ = [
    "ALL_SCOPES",
    "PUBLIC_PATHS",
    "SCOPES",
    "Scope",
    "is_public",
    "needed_scopes",
    "route_template",
]

Scope = Literal["infer", "feedback", "metrics", "admin"]
"""What a key may do."""

ALL_SCOPES: tuple[Scope, ...] = ("infer", "feedback", "metrics", "admin")

PROBES = frozenset(
    {
        "/health",
        "/health/live",
        "/health/ready",
        "/health/startup",
        "/livez",
        "/readyz",
        "/v2/health/live",
        "/v2/health/ready",
    }
)

PUBLIC_PATHS = PROBES | {"/docs", "/openapi.json"}
"""Paths that need no key; none of them has a parameter. The last two exist with ``docs`` only."""

SCOPES: Mapping[str, Scope] = {
    "/v1/classify": "infer",
    "/classify": "infer",
    "/predict": "infer",
    "/v2": "infer",
    "/v2/models/{model}": "infer",
    "/v2/models/{model}/ready": "infer",
    "/v2/models/{model}/infer": "infer",
    "/v1/models": "infer",
    "/v1/models/{model_id}": "infer",
    "/v1/models/{model_id}/risk-coverage": "infer",
    "/v1/policies/evaluate": "infer",
    "/version": "infer",
    "/v1/feedback": "feedback",
    "/metrics": "metrics",
    "/v1/adapters": "admin",
    "/v1/adapters/{name}": "admin",
    "/v1/aliases": "admin",
    "/v1/aliases/{name}": "admin",
}
"""Template of a route, as the router has it -> scope that all its methods need."""

_PATTERNS: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (compile_path(template)[0], template) for template in SCOPES if "{" in template
)


def is_public(path: str) -> bool:
    """Return whether a decoded path needs no key."""
    return path in PUBLIC_PATHS


def needed_scopes(path: str) -> frozenset[Scope]:
    """Return every scope that a decoded path needs; empty when it is on no list."""
    return frozenset(SCOPES[template] for template in _templates(path))


def route_template(path: str) -> str | None:
    """Return the route of a path as telemetry names it; None for probes and ``/metrics``."""
    if path in PROBES or path == "/metrics":
        return None
    if path in PUBLIC_PATHS:
        return path
    return next(iter(_templates(path)), "unmatched")


@functools.lru_cache(maxsize=256)
def _templates(path: str) -> tuple[str, ...]:
    if path in SCOPES and "{" not in path:
        return (path,)
    # fullmatch, unlike the router's match, also refuses a line end at the end
    return tuple(template for pattern, template in _PATTERNS if pattern.fullmatch(path))
