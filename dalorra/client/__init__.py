"""A client for Dalorra servers, blocking or for asyncio; see ``docs/client.md``.

Both clients are thin drivers over the same steps (``calls``), so they decide alike. Errors are
drawn as a tree in ``dalorra.client.errors``.
"""

from dalorra.client.answers import (
    Answer,
    Decision,
    Feedback,
    Guarantee,
    Model,
    Policy,
    Row,
    Sampling,
    TopLabel,
    Uncertainty,
    Usage,
)
from dalorra.client.asynchronous import AsyncClient
from dalorra.client.blocking import Client
from dalorra.client.errors import (
    ApiError,
    Conflict,
    ConnectionFailed,
    DalorraError,
    DeadlineExceeded,
    Forbidden,
    InvalidRequest,
    NotFound,
    Overloaded,
    ServerFailed,
    Unauthorized,
    UnreadableAnswer,
)
from dalorra.client.hooks import AsyncHook, Hook
from dalorra.client.questions import Choice, Options, Question, Text
from dalorra.client.retries import Retries

__all__ = [
    "Answer",
    "ApiError",
    "AsyncClient",
    "AsyncHook",
    "Choice",
    "Client",
    "Conflict",
    "ConnectionFailed",
    "DalorraError",
    "DeadlineExceeded",
    "Decision",
    "Feedback",
    "Forbidden",
    "Guarantee",
    "Hook",
    "InvalidRequest",
    "Model",
    "NotFound",
    "Options",
    "Overloaded",
    "Policy",
    "Question",
    "Retries",
    "Row",
    "Sampling",
    "ServerFailed",
    "Text",
    "TopLabel",
    "Unauthorized",
    "Uncertainty",
    "UnreadableAnswer",
    "Usage",
]
