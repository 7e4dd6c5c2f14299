"""Every Prometheus metric of the server, in one registry per app.

Only this package knows metric names. Label values are the adapters' own names and fixed sets, never
something a client wrote.
"""

from server.telemetry.edges import DRIFT_EDGES
from server.telemetry.feedback import FEEDBACK_REJECTIONS
from server.telemetry.recorder import Telemetry, torch_version
from server.telemetry.work import Loss

__all__ = ["DRIFT_EDGES", "FEEDBACK_REJECTIONS", "Loss", "Telemetry", "torch_version"]
