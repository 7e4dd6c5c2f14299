"""Where the server may listen without keys: on loopback only, unless an operator says otherwise."""

import ipaddress
import re
from collections.abc import Sequence

from server.settings import Settings

__all__ = ["exposure_fault", "is_loopback", "names_loopback"]


_HOST = re.compile(r"(\[[0-9a-f:.]+\]|[a-z0-9.-]+)\.?(?::\d+)?")


def is_loopback(host: str) -> bool:
    """Return whether only this machine can reach an address.

    A name other than ``localhost`` is not resolved: what it means may change. An empty host stands
    for every address.
    """
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def names_loopback(hosts: Sequence[str]) -> bool:
    """Return whether the ``Host`` headers of a request name this machine, as ``name`` or with port.

    A page in a browser can reach loopback under a name of its own (DNS rebinding), but cannot keep
    that name out of ``Host``. No header at all is no browser.
    """
    if len(hosts) != 1:
        return not hosts
    found = _HOST.fullmatch(hosts[0].lower())
    return found is not None and (is_loopback(found[1]) or found[1].endswith(".localhost"))


def exposure_fault(settings: Settings) -> str | None:
    """Return why the server must not start with these settings; None when it may."""
    if settings.api_keys_file or settings.allow_unauthenticated or is_loopback(settings.host):
        return None
    return (
        f"host is {settings.host!r}, which other machines may reach, and there are no API keys, so "
        "anybody there could use the server: give api_keys_file (see `dalorra keys --help`), "
        "listen on 127.0.0.1, or set allow_unauthenticated if that is what you want"
    )
