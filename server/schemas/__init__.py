"""The HTTP schema: what a request may hold, and what an answer holds."""

from server.schemas.feedback import FeedbackRequest, FeedbackResponse
from server.schemas.policies import EvaluateRequest, RiskCoverageQuery
from server.schemas.receipts import EvaluationResponse, RiskCoverageResponse
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
    "EvaluateRequest",
    "EvaluationResponse",
    "FeedbackRequest",
    "FeedbackResponse",
    "HealthResponse",
    "ModelCard",
    "ModelList",
    "Problem",
    "QuestionItem",
    "RiskCoverageQuery",
    "RiskCoverageResponse",
    "TextItem",
    "VersionResponse",
]
