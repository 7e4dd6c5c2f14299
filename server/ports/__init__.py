"""The values that travel through the server, and the Engine protocol that answers questions.

Plain Python: neither torch nor pydantic nor FastAPI. An engine turns a ``Question`` into an
``EncodedRow`` (any thread), and a batch of rows with equal numbers of passes into ``RowScores``
(the one engine thread). Everything here is a frozen value, so that it may cross threads freely.
"""

from server.ports.adapters import (
    AdapterCard,
    CalibrationCard,
    PredictionSetRule,
    ReferenceProfile,
    ScoreReference,
    SelfTest,
    StoredAdapter,
    UncertifiedTarget,
)
from server.ports.engine import (
    Engine,
)
from server.ports.errors import (
    AdapterBaseMismatchError,
    AdapterLoadError,
    AdapterSelfTestError,
    AdapterUntrustedError,
    EngineFatalError,
    EngineMemoryError,
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
    BatchRow,
    BatchScores,
    ChoiceOption,
    ChoiceQuestion,
    EncodedRow,
    Estimator,
    Priority,
    Question,
    RowScores,
    Sampling,
    TextQuestion,
    Truncate,
    Wanted,
)

__all__ = [
    "HIGHER_IS_SURER",
    "AbstainGuarantee",
    "AdapterBaseMismatchError",
    "AdapterCard",
    "AdapterLoadError",
    "AdapterSelfTestError",
    "AdapterUntrustedError",
    "BatchKey",
    "BatchRow",
    "BatchScores",
    "CalibrationCard",
    "ChoiceOption",
    "ChoiceQuestion",
    "EncodedRow",
    "Engine",
    "EngineFatalError",
    "EngineMemoryError",
    "EngineStoppedError",
    "Estimator",
    "FeedbackRisk",
    "Guarantee",
    "Limit",
    "NotCalibratedError",
    "Policy",
    "PolicyEvaluation",
    "PredictionSetRule",
    "Priority",
    "Question",
    "ReferenceProfile",
    "RiskCoveragePoint",
    "RowRejectedError",
    "RowScores",
    "RowTooLongError",
    "Sampling",
    "ScoreName",
    "ScoreReference",
    "SelfTest",
    "StoredAdapter",
    "TextQuestion",
    "Truncate",
    "UncertifiedTarget",
    "Wanted",
]
