"""What a call may ask of the driver that carries it out, and what it gets back.

A call is a generator: it yields steps and does no input or output of its own, so that the blocking
and the asyncio client share every decision there is.
"""

from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

__all__ = ["Ask", "Lost", "Received", "Send", "Sleep", "Step", "Steps"]

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Send:
    """Send a request; the reply is ``Received`` or ``Lost``.

    Attributes:
        method: ``GET`` or ``POST``.
        path: From the root of the server.
        headers: Besides those of the connection; the key is none of them.
        body: JSON in UTF-8; None for none.
        timeout_s: Time until the whole answer must be there, in seconds.
    """

    method: str
    path: str
    headers: Mapping[str, str]
    body: bytes | None = field(repr=False)
    timeout_s: float


@dataclass(frozen=True, slots=True)
class Sleep:
    """Wait for so many seconds."""

    seconds: float


@dataclass(frozen=True, slots=True)
class Ask:
    """Call a function of the user's; the reply is what it returns, awaited where the driver can."""

    function: Callable[[], object]


@dataclass(frozen=True, slots=True)
class Received:
    """An answer; ``headers`` have lower-case names."""

    status: int
    headers: Mapping[str, str]
    body: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class Lost:
    """No answer.

    Attributes:
        reason: What happened, for a person.
        timed_out: Whether the time of the request was up.
        too_large: Whether an answer came that is larger than any of a Dalorra server.
    """

    reason: str
    timed_out: bool = False
    too_large: bool = False


Step = Send | Sleep | Ask
Steps = Generator[Step, Any, T]
