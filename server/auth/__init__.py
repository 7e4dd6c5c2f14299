"""Who may come in, and how often: keys, their scopes and rates, and the doors that ask for them."""

from server.auth.command import keys_app
from server.auth.doors import Doors
from server.auth.exposure import exposure_fault
from server.auth.keys import KeyFileError
from server.auth.ring import KeyRing
from server.auth.table import ALL_SCOPES, PUBLIC_PATHS, SCOPES, Scope, route_template
from server.settings import Settings
from server.telemetry import Telemetry

__all__ = [
    "ALL_SCOPES",
    "PUBLIC_PATHS",
    "SCOPES",
    "Doors",
    "KeyFileError",
    "KeyRing",
    "Scope",
    "exposure_fault",
    "keys_app",
    "make_key_ring",
    "route_template",
]


def make_key_ring(settings: Settings, telemetry: Telemetry) -> KeyRing | None:
    """Return the keys of ``api_keys_file``; None when it is not set.

    Raises:
        KeyFileError: The file cannot be used.
    """
    if settings.api_keys_file is None:
        return None
    return KeyRing(settings.api_keys_file, on_failure=telemetry.keys_not_read)
