"""Signs of life of the engine thread: when the last one was, and how far apart they have been."""

import time

__all__ = ["Pulse"]


class Pulse:
    """Beats while a batch runs. One thread beats, any thread may look; there is no lock.

    Attributes:
        slowest_gap_s: The longest time between two signs of one batch so far, in seconds.
        last_sign_s: The last sign of the batch that runs, in seconds on the monotonic clock; None
            while the engine is idle, when silence means nothing.
    """

    def __init__(self) -> None:
        self.slowest_gap_s = 0.0
        self.last_sign_s: float | None = None

    @property
    def silent_for_s(self) -> float:
        """Time since the last sign of the batch that runs, in seconds; 0 while none does."""
        last_s = self.last_sign_s
        return 0.0 if last_s is None else time.monotonic() - last_s

    def beat(self) -> None:
        """Give a sign; the first of a batch begins it."""
        now_s = time.monotonic()
        if self.last_sign_s is not None:
            self.slowest_gap_s = max(self.slowest_gap_s, now_s - self.last_sign_s)
        self.last_sign_s = now_s

    def rest(self) -> None:
        """Give the last sign of a batch."""
        self.beat()
        self.last_sign_s = None
