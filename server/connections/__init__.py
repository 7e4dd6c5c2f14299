"""Connections under limits: how many, how large a head, how slow a client.

uvicorn trusts its clients with time: one that sends its headers a byte at a time, or never takes
its answer, keeps its connection for ever. Here every state of a connection has an end:

* a head (request line and headers) must come within ``header_timeout_s`` and ``max_header_bytes``;
* a body that nobody reads must end within ``body_timeout_s`` (one that is read: the route's work);
* what was written must be taken within ``write_timeout_s``;
* an idle connection is closed by uvicorn's keep-alive time;
* when ``max_connections`` are open, a new one takes the place of the one that has waited longest
  without a request, strangers first; when all of them are at work, the new one is closed.
"""

from server.connections.gate import ConnectionGate, ConnectionLimits
from server.connections.guarded import GuardedConnection, guarded_by
from server.connections.tls import TlsSetupError, make_tls_context

__all__ = [
    "ConnectionGate",
    "ConnectionLimits",
    "GuardedConnection",
    "TlsSetupError",
    "guarded_by",
    "make_tls_context",
]
