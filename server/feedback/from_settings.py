"""From settings to a signer and a store, or a sentence that says which setting is at fault."""

import secrets
from pathlib import Path

from server.feedback.errors import FeedbackSetupError
from server.feedback.signing import PredictionSigner, load_secrets
from server.feedback.store import FeedbackStore
from server.settings import Settings

__all__ = ["make_signer", "make_store", "secret_path"]

OFF = "off"
SECRET_NAME = "secret"  # noqa: S105 - a file's name
DATABASE_NAME = "feedback.sqlite3"


def make_signer(settings: Settings) -> PredictionSigner:
    """Return the signer of prediction ids.

    The secret is read from ``secret_file``, else from the state directory, where it is made on the
    first start. With feedback off nobody will verify an id, so nothing is read or written.

    Raises:
        FeedbackSetupError: There is no secret to be had.
    """
    if settings.secret_file is not None:
        return PredictionSigner(load_secrets(settings.secret_file, create=False))
    if _url(settings) == OFF:
        return PredictionSigner([secrets.token_hex(32)])
    return PredictionSigner(load_secrets(_state_dir(settings) / SECRET_NAME, create=True))


def secret_path(settings: Settings) -> Path:
    """Return where the secrets lie that a server with these settings signs with.

    Raises:
        FeedbackSetupError: No setting says it, and this user has no home directory.
    """
    try:
        state_dir = settings.state_dir or settings.default_state_dir()
    except RuntimeError as error:
        raise FeedbackSetupError(f"state_dir: the default is not known: {error}") from None
    return settings.secret_file or state_dir / SECRET_NAME


def make_store(settings: Settings) -> FeedbackStore | None:
    """Return the store of true labels, its database opened; None when feedback is off.

    Raises:
        FeedbackSetupError: The database cannot be used.
    """
    url = _url(settings)
    if url == OFF:
        return None
    return FeedbackStore(
        url or f"sqlite:///{_state_dir(settings) / DATABASE_NAME}",
        retention_days=settings.feedback_retention_days,
    )


def _url(settings: Settings) -> str | None:
    return settings.feedback_url.get_secret_value() if settings.feedback_url else None


def _state_dir(settings: Settings) -> Path:
    """Return the state directory, made for this user only when it is not there."""
    try:
        path = settings.state_dir or settings.default_state_dir()
        path = path.absolute()
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    except (OSError, RuntimeError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        shown = settings.state_dir or "the default"
        raise FeedbackSetupError(
            f"state_dir: {shown} cannot be made: {reason}; "
            "set DALORRA_STATE_DIR to a directory this user may write to"
        ) from None
    return path
