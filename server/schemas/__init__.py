"""The HTTP schema: what a request may hold, and what an answer holds."""

from server.schemas.adapters import (
    AdapterEntry,
    AdapterList,
    AliasEntry,
    AliasList,
    AliasRequest,
    LoadRequest,
    PinRequest,
    Removed,
    StoredEntry,
)
from server.schemas.feedback import FeedbackRequest, FeedbackResponse
from server.schemas.kserve import InferRequest, OipProblem
from server.schemas.policies import EvaluateRequest, RiskCoverageQuery
from server.schemas.predict import PredictRequest
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
    "AdapterEntry",
    "AdapterList",
    "AliasEntry",
    "AliasList",
    "AliasRequest",
    "ClassifyRequest",
    "ClassifyResponse",
    "EvaluateRequest",
    "EvaluationResponse",
    "FeedbackRequest",
    "FeedbackResponse",
    "HealthResponse",
    "InferRequest",
    "LoadRequest",
    "ModelCard",
    "ModelList",
    "OipProblem",
    "PinRequest",
    "PredictRequest",
    "Problem",
    "QuestionItem",
    "Removed",
    "RiskCoverageQuery",
    "RiskCoverageResponse",
    "StoredEntry",
    "TextItem",
    "VersionResponse",
]
