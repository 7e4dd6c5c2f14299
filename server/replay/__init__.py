"""``dalorra replay``: a past answer, computed again from its id and its question."""

from server.replay.command import replay_command
from server.replay.comparison import Comparison, Line, compare, sampling_of

__all__ = ["Comparison", "Line", "compare", "replay_command", "sampling_of"]
