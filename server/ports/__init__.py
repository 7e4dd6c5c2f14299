"""The values that travel through the server, and the Engine protocol that answers questions.

Plain Python: neither torch nor pydantic nor FastAPI. An engine turns a ``Question`` into an
``EncodedRow`` (any thread), and a batch of rows that share adapter and sampling into ``RowScores``
(the one engine thread). Everything here is a frozen value, so that it may cross threads freely.
"""

from server.ports.adapters import (
    AdapterCard,
    CalibrationCard,
    PredictionSetRule,
    ReferenceProfile,
    ScoreReference,
    UncertifiedTarget,
)
from server.ports.engine import (
    Engine,
)
from server.ports.errors import (
    EngineFatalError,
    EngineStoppedError,
    NotCalibratedError,
    RowRejectedError,
    RowTooLongError,
)
from server.ports.policies import (
    HIGHER_IS_SURER,
    AbstainGuarantee,
    FeedbackRisk,
    Guarantee,
    Limit,
    Policy,
    PolicyEvaluation,
    RiskCoveragePoint,
    ScoreName,
)
from server.ports.rows import (
    BatchKey,
    BatchScores,
    ChoiceOption,
    ChoiceQuestion,
    EncodedRow,
    Estimator,
    Question,
    RowScores,
    Sampling,
    TextQuestion,
    Truncate,
)

__all__ = [
    "HIGHER_IS_SURER",
    "AbstainGuarantee",
    "AdapterCard",
    "BatchKey",
    "BatchScores",
    "CalibrationCard",
    "ChoiceOption",
    "ChoiceQuestion",
    "EncodedRow",
    "Engine",
    "EngineFatalError",
    "EngineStoppedError",
    "Estimator",
    "FeedbackRisk",
    "Guarantee",
    "Limit",
    "NotCalibratedError",
    "Policy",
    "PolicyEvaluation",
    "PredictionSetRule",
    "Question",
    "ReferenceProfile",
    "RiskCoveragePoint",
    "RowRejectedError",
    "RowScores",
    "RowTooLongError",
    "Sampling",
    "ScoreName",
    "ScoreReference",
    "TextQuestion",
    "Truncate",
    "UncertifiedTarget",
]
