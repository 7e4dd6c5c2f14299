"""The key of a caller."""

import os

__all__ = ["KEY_VARIABLE", "find_key"]

KEY_VARIABLE = "DALORRA_API_KEY"


def find_key(api_key: str | None) -> str | None:
    """Return the key to send: the argument, else that of the environment; None for none.

    Raises:
        ValueError: It cannot stand in a header. The message does not show it.
    """
    key = os.environ.get(KEY_VARIABLE) if api_key is None else api_key
    if not key:
        return None
    if not (key.isascii() and key.isprintable() and " " not in key):
        raise ValueError(f"api_key ({KEY_VARIABLE}) must be printable ASCII without spaces")
    return key
