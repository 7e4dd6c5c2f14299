"""What can go wrong with feedback.

FeedbackError
    FeedbackSetupError: the server must not start like this.
    BadPredictionIdError: an id that this server's secrets did not sign.
    ExpiredPredictionError: an id that is older than what is kept.
    FeedbackConflictError: another label is stored for the prediction.
    FeedbackUnavailableError: the database cannot be reached now.
"""

__all__ = [
    "BadPredictionIdError",
    "ExpiredPredictionError",
    "FeedbackConflictError",
    "FeedbackError",
    "FeedbackSetupError",
    "FeedbackUnavailableError",
]


class FeedbackError(Exception):
    """Base of everything below."""


class FeedbackSetupError(FeedbackError):
    """A secret or a database that cannot be used; the text names the setting and the value."""


class BadPredictionIdError(FeedbackError):
    """The id carries no signature of ours."""

    def __init__(self) -> None:
        super().__init__("the prediction id is not signed by this server")


class ExpiredPredictionError(FeedbackError):
    """The prediction is older than the retention, so a label for it could not be kept."""

    def __init__(self, retention_days: int) -> None:
        super().__init__(
            f"the prediction was made more than {retention_days} days ago, "
            "the limit feedback_retention_days"
        )


class FeedbackConflictError(FeedbackError):
    """A different label is already stored for the same prediction."""

    def __init__(self) -> None:
        super().__init__("a different label is stored for this prediction")


class FeedbackUnavailableError(FeedbackError):
    """The database did not take the row; it may later."""
