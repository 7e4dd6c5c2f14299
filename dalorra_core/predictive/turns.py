"""A lock that threads get in the order in which they asked for it."""

import threading
from collections import deque
from types import TracebackType

__all__ = ["Turns"]


class Turns:
    """Who uses the model now: a context manager around one forward pass.

    A plain lock may go back to the thread that has just let go of it, so a thread that answers
    one chunk after the other could keep another one waiting for long. Here it waits for one chunk.
    Not reentrant.
    """

    def __init__(self) -> None:
        self._mutex = threading.Lock()
        self._waiting: deque[threading.Lock] = deque()
        self._taken = False

    def __enter__(self) -> None:
        with self._mutex:
            if not self._taken:
                self._taken = True
                return
            turn = threading.Lock()
            turn.acquire()
            self._waiting.append(turn)
        turn.acquire()  # until the thread before this one hands over

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        with self._mutex:
            if self._waiting:
                self._waiting.popleft().release()  # it stays taken: by the next in line
            else:
                self._taken = False
