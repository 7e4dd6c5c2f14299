"""What an engine raises when it cannot answer."""

__all__ = [
    "AdapterBaseMismatchError",
    "AdapterLoadError",
    "AdapterSelfTestError",
    "AdapterUntrustedError",
    "EngineFatalError",
    "EngineMemoryError",
    "EngineStoppedError",
    "EngineUnavailableError",
    "NotCalibratedError",
    "RowRejectedError",
    "RowTooLongError",
]


class RowRejectedError(Exception):
    """The engine cannot turn this question into tokens; the text is meant for the client."""


class RowTooLongError(RowRejectedError):
    """A question has more tokens than the limit and truncation was not allowed.

    Attributes:
        actual: Tokens of the whole prompt.
        limit: The most tokens one prompt may have.
    """

    def __init__(self, actual: int, limit: int) -> None:
        super().__init__(f"the prompt has {actual} tokens; the limit is {limit}")
        self.actual = actual
        self.limit = limit


class EngineFatalError(Exception):
    """The engine can never answer again (a lost device): the engine thread must end."""


class EngineStoppedError(Exception):
    """No engine thread runs any more, so the work will not be done."""


class EngineUnavailableError(Exception):
    """What the engine depends on does not answer now; no row is to blame, and it may come back."""


class NotCalibratedError(LookupError):
    """The adapter stores no calibration rows, or not the score that was asked for."""


class EngineMemoryError(Exception):
    """A batch did not fit into memory; a smaller one may."""


class AdapterLoadError(Exception):
    """An adapter cannot be served; the text is for an administrator and names no host path."""


class AdapterBaseMismatchError(AdapterLoadError):
    """An adapter was trained on another base model than the one that is loaded.

    Attributes:
        expected: Fingerprint that the adapter was trained on.
        found: Fingerprint of the loaded base model.
    """

    def __init__(self, message: str, *, expected: str, found: str) -> None:
        super().__init__(message)
        self.expected = expected
        self.found = found


class AdapterUntrustedError(AdapterLoadError):
    """An adapter is not signed by a trusted key, and only such are served here."""


class AdapterSelfTestError(AdapterLoadError):
    """An adapter does not reproduce the probabilities that are stored with it."""
