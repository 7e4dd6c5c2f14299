"""The HTTP schema: what a request may hold, and what an answer holds."""

from server.schemas.requests import ClassifyRequest, QuestionItem, TextItem
from server.schemas.responses import (
    ClassifyResponse,
    HealthResponse,
    ModelCard,
    ModelList,
    Problem,
    VersionResponse,
)

__all__ = [
    "ClassifyRequest",
    "ClassifyResponse",
    "HealthResponse",
    "ModelCard",
    "ModelList",
    "Problem",
    "QuestionItem",
    "TextItem",
    "VersionResponse",
]
