"""The HTTP server of Dalorra: admission, batching, decisions and telemetry around one engine."""

from dalorra_core import __version__

__all__ = ["__version__"]
