"""TLS: how connections are encrypted, and whose certificate clients must show."""

import ssl

from server.settings import Settings

__all__ = ["TlsSetupError", "make_tls_context"]


class TlsSetupError(Exception):
    """The certificate, its key or the client authorities cannot be used."""


def make_tls_context(settings: Settings) -> ssl.SSLContext | None:
    """Return how connections are encrypted, TLS 1.2 at least; None for plain HTTP.

    Raises:
        TlsSetupError: A file cannot be used; the message names its setting.
    """
    if settings.tls_cert is None:
        return None
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    try:
        # a key with a password would otherwise be asked for on the terminal
        context.load_cert_chain(settings.tls_cert, settings.tls_key, password="")
    except OSError as error:
        raise TlsSetupError(f"tls_cert or tls_key cannot be used: {_why(error)}") from None
    if settings.tls_client_ca is not None:
        context.verify_mode = ssl.CERT_REQUIRED
        try:
            context.load_verify_locations(settings.tls_client_ca)
        except OSError as error:
            raise TlsSetupError(f"tls_client_ca cannot be used: {_why(error)}") from None
    return context


def _why(error: OSError) -> str:
    """Return the reason without the path that the error may hold."""
    return getattr(error, "reason", None) or error.strerror or type(error).__name__
